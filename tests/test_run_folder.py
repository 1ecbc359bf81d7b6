"""The folder of a run: TensorBoard sees every event, wherever the folder lies and however often the run began anew."""

from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model import run_folder
from model.run_folder import RunFolder
from shards.errors import UserError
from shards.storage import open_store
from tests.buckets import Outside, patience
from tests.seaweed import S3Server, aws_environment


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "disk" else f"{request.getfixturevalue('s3_uri')}/run"


def losses(uri: str, copy: Path) -> dict[int, float]:
    """What TensorBoard shows of a folder, after a copy of its files."""
    copy.mkdir()
    store = open_store(uri)
    for entry in store.list():
        (copy / entry.name).write_bytes(store.read(entry.name))
    events = EventAccumulator(str(copy))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


def write(folder: RunFolder, steps: range, value: float, first: int | None = None) -> None:
    writer = folder.writer(steps.start if first is None else first)
    for step in steps:
        writer.add_scalar("loss", value, step)
        folder.sync()


def test_events_are_there_after_each_sync_and_after_a_new_begin(place: str, tmp_path: Path) -> None:
    first = RunFolder(place)
    write(first, range(1, 5), 1.0)
    assert losses(place, tmp_path / "a") == dict.fromkeys(range(1, 5), 1.0)
    # Nobody closed the first, as after a kill; its events from step 3 on are forgotten.
    second = RunFolder(place)
    write(second, range(3, 6), 2.0)
    second.close()
    assert losses(place, tmp_path / "b") == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0}
    assert len(list(open_store(place).list("events.out.tfevents."))) == 2
    first.close()


def test_what_was_written_last_is_there_after_close(place: str, tmp_path: Path) -> None:
    folder = RunFolder(place)
    folder.writer(1).add_scalar("loss", 3.0, 1)
    folder.close()
    folder.close()
    folder.sync()
    assert losses(place, tmp_path / "a") == {1: 3.0}


def test_long_event_files_are_not_sent_again_and_again(
    s3_uri: str, outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "ROTATE", 300)
    # The second in a file's name is what TensorBoard orders files by.
    clock = SimpleNamespace(time=partial(next, itertools.count(1_700_000_000)))
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)
    folder = RunFolder(s3_uri)
    write(folder, range(1, 31), 1.0)
    folder.close()
    files = outside.names()
    assert len(files) > 3
    assert all(len(outside.read(name)) < 500 for name in files)
    assert losses(s3_uri, tmp_path / "a") == dict.fromkeys(range(1, 31), 1.0)


def test_events_that_the_bucket_refuses_are_kept_and_sent_later(
    s3_uri: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = RunFolder(s3_uri)
    with monkeypatch.context() as denied:
        aws_environment(denied, s3_server.read_only_env, tmp_path)
        patience(denied)
        folder = RunFolder(s3_uri)
        with pytest.warns(UserWarning, match="events are kept in .*f2v-events-.*access denied"):
            write(folder, range(1, 2), 1.0)
        with pytest.raises(UserError, match="access denied"):
            folder.note("a.json", "{}")
        with pytest.warns(UserWarning, match="events are kept"):
            folder.close()
    kept = next(tmp_path.glob("f2v-events-*"))
    assert os.listdir(kept)
    patience(monkeypatch)
    folder = RunFolder(s3_uri)
    write(folder, range(2, 4), 1.0)
    folder.close()
    assert losses(s3_uri, tmp_path / "a") == {2: 1.0, 3: 1.0}
    assert list(tmp_path.glob("f2v-events-*")) == [kept]


def test_notes_lie_in_the_folder(place: str) -> None:
    folder = RunFolder(place)
    address = folder.note("step-00000012-not-finite.json", '{"keys": ["é"]}')
    assert address == f"{place}/step-00000012-not-finite.json"
    assert open_store(place).read("step-00000012-not-finite.json").decode() == '{"keys": ["é"]}'


def test_addresses(tmp_path: Path) -> None:
    assert (RunFolder(tmp_path).uri, RunFolder(tmp_path).is_local) == (str(tmp_path), True)
    assert RunFolder(f"file://{tmp_path}/").uri == str(tmp_path)
    bucket = RunFolder(Path("s3://bucket/a/run"))
    assert (bucket.uri, bucket.is_local) == ("s3://bucket/a/run", False)
    with pytest.raises(UserError, match="only read"):
        RunFolder("https://host/run")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no folder"):
        RunFolder(tmp_path / "file")
