"""Kill anywhere: whatever dies and whenever, the next build ends with the shards of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from shards.dataset import Dataset
from shards.storage import TEMPORARY
from shards.verify import verify
from tests.toy import digests

MARK = "F2V_TEST_RUN"
VICTIMS = {"worker": "ray::Worker", "node": "raylet/raylet"}


@dataclass(frozen=True)
class Reference:
    """A source, what an undisturbed build makes of it, and the seconds that this took."""

    source: Path
    digests: dict[str, str]
    seconds: float


class Run:
    """A build in processes of its own, all of which can be found."""

    def __init__(self, source: Path, dataset: Path) -> None:
        self.id = uuid.uuid4().hex
        small = ("pack.shard_clips=2", "speech.clusters=20", "run.cpus=2")
        command = [sys.executable, "-m", "cli.main", "build", str(source), str(dataset)]
        command += [part for setting in small for part in ("--set", setting)]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, MARK: self.id},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def others(self, word: str = "") -> list[int]:
        """Processes of this run besides the driver, whose command line has `word`."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"{MARK}={self.id}".encode() in (folder / "environ").read_bytes().split(b"\0")
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if ours and int(folder.name) != self.process.pid and word in line and line:
                found.append(int(folder.name))
        return found

    def kill(self, victim: str) -> str:
        """SIGKILL to the driver, to a worker or to the Ray node; returns what was killed."""
        found = self.others(VICTIMS[victim]) if victim in VICTIMS else []
        if not found:
            self.process.kill()
            return "driver"
        os.kill(random.choice(found), signal.SIGKILL)
        return victim

    def end(self, timeout: float = 120) -> tuple[int, str, str]:
        """Exit status and output; what is left of a killed run is cleared away."""
        try:
            output, errors = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
            for pid in self.others():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return self.process.returncode, output, errors


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("kill")
    source = folder / "source"
    for path in [*sorted((corpus / "train").rglob("*.mp4"))[:3], *(corpus / "test").rglob("*.mp4")]:
        target = source / path.relative_to(corpus)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copy(corpus / "faulty" / "silent.mp4", source / "silent.mp4")
    begin = time.monotonic()
    status, _, errors = Run(source, folder / "ds").end()
    assert status == 0, errors
    return Reference(source, digests(Dataset(str(folder / "ds"))), time.monotonic() - begin)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(str(tmp_path / "ds"))


def check_next_build(reference: Reference, dataset: Dataset) -> str:
    status, output, errors = Run(reference.source, Path(dataset.uri)).end()
    assert status == 0, errors
    assert digests(dataset) == reference.digests
    assert verify(dataset.uri).problems == []
    assert not [found.name for found in dataset.store.list() if TEMPORARY in found.name]
    return output


def check_killed(reference: Reference, dataset: Dataset, victim: str, seed: int) -> None:
    delay = random.Random(seed).uniform(0.3, reference.seconds)
    run = Run(reference.source, Path(dataset.uri))
    time.sleep(delay)
    killed = run.kill(victim)
    status, _, errors = run.end()
    if killed == "worker":
        # Its task is given to another worker, and the build goes on.
        assert status == 0, errors
    elif killed == "node":
        # Ray's own code ends the process with 1 where the node goes while it connects.
        assert status in (0, 2) or (status == 1 and "raylet" in errors.lower()), errors
        assert "Traceback" not in errors, errors
    # Whatever a reader finds in between is whole.
    if dataset.exists():
        assert not [line for line in verify(dataset.uri).problems if "not the current table" not in line]
    check_next_build(reference, dataset)


@pytest.mark.parametrize(("victim", "seed"), [("driver", 1), ("worker", 2), ("node", 3)])
def test_kill_and_build_again(reference: Reference, dataset: Dataset, victim: str, seed: int) -> None:
    check_killed(reference, dataset, victim, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100, 121))
def test_kill_anywhere(reference: Reference, dataset: Dataset, seed: int) -> None:
    check_killed(reference, dataset, ("driver", "worker", "node")[seed % 3], seed)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_signals_end_it_soon_and_say_how_to_go_on(
    reference: Reference, dataset: Dataset, number: int, status: int
) -> None:
    run = Run(reference.source, Path(dataset.uri))
    while not run.others("ray::Worker") and run.process.poll() is None:
        time.sleep(0.2)
    time.sleep(1.5)
    begin = time.monotonic()
    os.kill(run.process.pid, number)
    try:
        found = run.process.wait(timeout=30), time.monotonic() - begin
        left = run.others("ray::")
    finally:
        _, _, errors = run.end()
    assert found[0] == status, errors
    assert found[1] < 15
    assert errors.rstrip().endswith("stopped; run the same command again to go on"), errors
    assert not left
    assert not [entry.name for entry in dataset.store.list() if TEMPORARY in entry.name]
    assert not [line for line in verify(dataset.uri).problems if "not the current table" not in line]
