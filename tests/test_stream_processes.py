"""Worker processes and memory of the training stream."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shards.errors import UserError
from tests.streams import same, stream, take


def test_a_killed_worker_costs_nothing(toy_folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    whole = take(stream(toy_folder), 0, 30)
    killed = []
    with stream(toy_folder, workers=2) as source:
        found = []
        for step, batch in enumerate(itertools.islice(source.batches(0), 30)):
            found.append({name: value.clone() if name != "keys" else value for name, value in batch.items()})
            if step in (3, 4, 15):
                for process in workers_of(os.getpid())[: 1 if step == 4 else 2]:
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
    assert len(set(killed)) >= 4
    line = "data worker {} was ended by signal 9 (out of memory?); another takes its place, no sample is lost"
    assert {str(warning.message) for warning in recwarn} == {line.format(0), line.format(1)}
    assert all(same(a, b) for a, b in zip(whole, found, strict=True))


def test_workers_that_die_again_and_again_end_the_run(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        pytest.warns(UserWarning, match="exit with status 1"),
        pytest.raises(UserError, match=r"die again and again .* over the clips s\d"),
    ):
        take(stream(toy_folder, workers=1), 0, 1)


def test_workers_end_with_their_parent(toy_folder: Path) -> None:
    code = (
        "import itertools, sys, time\n"
        "from shards.stream import StreamConfig, TrainingStream\n"
        f"source = TrainingStream({str(toy_folder)!r}, StreamConfig(batch=4, crop_frames=20, workers=2), 0)\n"
        "list(itertools.islice(source.batches(0), 2))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    children = workers_of(process.pid)
    assert len(children) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end, "workers outlive the process that they worked for"
        time.sleep(0.05)


def workers_of(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            status = Path(path.parent, "status").read_text()
            if any(b"shards.filler" in word for word in words) and f"PPid:\t{parent}\n" in status:
                found.append(int(path.parent.name))
    return found


def test_batches_that_are_kept_stay_as_they_are(toy_folder: Path) -> None:
    with stream(toy_folder, workers=1) as source:
        batches = source.host_batches(0)
        kept = list(itertools.islice(batches, 12))
        copies = [{name: value.clone() for name, value in part.items() if name != "keys"} for part in kept]
        list(itertools.islice(batches, 5))
        assert all(same(a, b) for a, b in zip(copies, kept, strict=True))


def test_memory_is_used_again(toy_folder: Path) -> None:
    with stream(toy_folder, workers=1) as source:
        places = {batch["lips"].data_ptr() for batch in itertools.islice(source.host_batches(0), 40)}
    assert len(places) <= 5


def test_many_small_batches_ahead_do_not_block(toy_folder: Path) -> None:
    with stream(toy_folder, workers=1, prefetch=500) as source:
        assert len(list(itertools.islice(source.host_batches(0), 3))) == 3


def test_closing_does_not_wait_for_somebody_elses_child(toy_folder: Path) -> None:
    with stream(toy_folder, workers=1) as source:
        next(source.host_batches(0))
        child = os.fork()
        if not child:
            time.sleep(20)
            os._exit(0)
        begin = time.monotonic()
        source.close()
        taken = time.monotonic() - begin
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert taken < 5


def test_interrupting_ends_a_wait(toy_folder: Path) -> None:
    with stream(toy_folder, workers=1) as source:
        batches = source.batches(0)
        next(batches)
        for process in workers_of(os.getpid()):
            os.kill(process, signal.SIGSTOP)
        timer = threading.Timer(0.5, source.interrupt)
        timer.start()
        assert len(list(batches)) < 5
        for process in workers_of(os.getpid()):
            os.kill(process, signal.SIGCONT)


def test_a_module_of_the_working_folder_is_not_taken_for_ours(toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shards.py").write_text("raise SystemExit('not this one')")
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')")
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert len(take(stream(toy_folder, workers=1), 0, 2)) == 2
    finally:
        os.chdir(before)


def test_a_stream_that_is_dropped_ends_its_workers(toy_folder: Path) -> None:
    source = stream(toy_folder, workers=2)
    next(source.batches(0))
    assert len(workers_of(os.getpid())) == 2
    del source
    gc.collect()
    assert not workers_of(os.getpid())
