"""`gc` deletes what nobody can need any more, and nothing else."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.main import main
from pipeline.columns import Column
from shards.dataset import ClipRow, Dataset
from shards.errors import UserError
from shards.export import export
from shards.history import delete_garbage, find_garbage
from shards.manifest import COPIES, HISTORY, MANIFEST, ColumnRef, Manifest, column_record, column_tar, segments_record
from shards.reader import read_fields
from shards.schema import FIELDS
from shards.storage import Conflict, StorageError
from shards.verify import verify
from tests.toy import toy_dataset

DAY = 86_400
GRACE = 7


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return toy_dataset(tmp_path / "ds", [[14], [13]])


def age(dataset: Dataset, days: float, names: Iterable[str] | None = None) -> None:
    """Make objects (all, if not named) as old as that."""
    then = time.time() - days * DAY
    for name in [found.name for found in dataset.store.list()] if names is None else names:
        os.utime(dataset.store.path(name), (then, then))


def names(dataset: Dataset) -> set[str]:
    return {found.name for found in dataset.store.list()}


def rerun(dataset: Dataset, days: float | None = None) -> set[str]:
    """A build that made the clip table and the energy column of the first shard anew, so many days ago; the names that
    the dataset named before and does not name now."""
    before, version = dataset.current()
    assert before is not None
    shard, ref = next(iter(before.columns["energy"].items()))
    mark = f"{int(ref.fingerprint, 16) + 256:016x}"
    tar = dataset.store.read(column_tar("energy", shard, ref.fingerprint, ref.sha256))
    dataset.store.write(column_tar("energy", shard, mark, ref.sha256), tar)
    column = Column.model_validate_json(dataset.store.read(column_record("energy", shard, ref.fingerprint)))
    column = column.model_copy(update={"task": column.task.model_copy(update={"fingerprint": mark})})
    dataset.store.write(column_record("energy", shard, mark), column.record().encode())
    columns = {**before.columns["energy"], shard: column.ref(ref.recipe)}
    rows = [ClipRow(**{**vars(row), "text": mark}) for row in dataset.clips(before)]
    after = before.model_copy(update={"columns": {"energy": columns}, "clips": dataset.put_rows(ClipRow, rows)})
    dataset.commit(after, version)
    dataset.refresh_copies(after)
    if days is not None:
        age(dataset, days, [name for name in names(dataset) if name.startswith(HISTORY)])
    return set(before.objects()) - set(after.objects())


def test_gc_lists_and_deletes_only_when_told(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    gone = rerun(dataset, days=8)
    age(dataset, 30, gone)
    copies = {name for name in names(dataset) if name.startswith(HISTORY)}
    before = names(dataset)
    assert main(["gc", dataset.uri]) == 0
    listed = capsys.readouterr().out
    for name in gone | copies:
        assert name in listed
    assert "4 objects" in listed
    assert "to delete (add --delete)" in listed
    assert names(dataset) == before
    assert main(["gc", dataset.uri, "--delete"]) == 0
    assert "deleted" in capsys.readouterr().out
    assert names(dataset) == before - gone - copies
    assert verify(dataset.uri).problems == verify(dataset.uri).notes == []
    assert main(["gc", dataset.uri, "--delete"]) == 0
    assert "0 objects" in capsys.readouterr().out


def test_gc_says_the_same_as_json(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    gone = rerun(dataset, days=8)
    age(dataset, 30, gone)
    (Path(dataset.uri) / "notes.txt").write_text("x")
    assert main(["gc", dataset.uri, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {old["name"] for old in found["old"]} >= gone
    assert (found["foreign"], found["deleted"]) == (["notes.txt"], False)


@pytest.mark.parametrize(
    "grace", ["", "7", "d", "-1d", "1w", "1.5d", "7 d", "٣d", "9999999999d", "999999999d", "40000d", "nan"]
)
def test_a_bad_grace_is_one_line(dataset: Dataset, grace: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(dataset)
    assert main(["gc", dataset.uri, f"--grace={grace}", "--delete"]) == 2
    error = capsys.readouterr().err
    assert "--grace" in error
    assert len(error.splitlines()) == 1
    assert names(dataset) == before


@pytest.mark.parametrize(
    ("grace", "kept"), [("0s", False), ("7199s", False), ("119m", False), ("1h", False), ("3h", True), ("36500d", True)]
)
def test_grace_is_a_time_with_a_unit(dataset: Dataset, grace: str, kept: bool) -> None:
    gone = rerun(dataset, days=2 / 24)
    age(dataset, 2 / 24, gone)
    assert main(["gc", dataset.uri, "--grace", grace, "--delete"]) == 0
    assert (gone <= names(dataset)) is kept
    assert verify(dataset.uri).problems == []


def test_a_reader_of_the_manifest_before_reads_on_within_grace(dataset: Dataset) -> None:
    """However old its objects are: what counts is when it was replaced."""
    age(dataset, 400)
    manifest = dataset.manifest()
    rerun(dataset, days=GRACE - 0.1)
    delete_garbage(dataset, find_garbage(dataset, timedelta(days=GRACE)).old)
    assert [row.text for row in dataset.clips(manifest)] == ["", ""]
    assert dataset.quarantine(manifest) == []
    for shard in dataset.index(manifest).shards:
        for clip in shard.clips:
            assert set(read_fields(dataset, shard, clip, list(FIELDS))) == set(FIELDS)
    assert set(manifest.objects()) <= names(dataset)


def test_a_commit_that_lost_does_not_age_the_one_that_won(dataset: Dataset) -> None:
    """A is replaced by B for long, while somebody loses against B; then C replaces B: readers of B keep it."""
    age(dataset, 100)
    first, version = dataset.current()
    assert first is not None
    rerun(dataset, days=60)
    with pytest.raises(Conflict):
        dataset.commit(first.model_copy(update={"config": {"loser": True}}), version)
    age(dataset, 50)
    second = dataset.manifest()
    rerun(dataset)
    delete_garbage(dataset, find_garbage(dataset, timedelta(days=GRACE)).old)
    assert set(second.objects()) <= names(dataset)
    assert dataset.clips(second)


def test_a_commit_that_was_killed_does_not_age_the_current_one(dataset: Dataset) -> None:
    manifest, version = dataset.current()
    assert manifest is not None

    killed = patch.object(type(dataset.store), "swap", side_effect=KeyboardInterrupt)
    with killed, pytest.raises(KeyboardInterrupt):
        dataset.commit(manifest.model_copy(update={"config": {"killed": True}}), version)
    age(dataset, 50)
    delete_garbage(dataset, find_garbage(dataset, timedelta(days=GRACE)).old)
    assert dataset.manifest() == manifest
    rerun(dataset)
    delete_garbage(dataset, find_garbage(dataset, timedelta(days=GRACE)).old)
    assert set(manifest.objects()) <= names(dataset)


def test_a_manifest_that_comes_back_counts_from_its_last_day(dataset: Dataset) -> None:
    """A, B, A again, C: A was replaced long ago and a moment ago."""
    age(dataset, 100)
    first = dataset.manifest()
    rerun(dataset, days=60)
    dataset.commit(first, dataset.current()[1])
    age(dataset, 50)
    rerun(dataset)
    delete_garbage(dataset, find_garbage(dataset, timedelta(days=GRACE)).old)
    assert set(first.objects()) <= names(dataset)


def test_a_commit_during_gc_keeps_what_it_replaces_and_what_it_names(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit comes after the listing and before the manifest is read, then another one before the deletion."""
    spare = rerun(dataset, days=60)
    age(dataset, 50)
    second, version = dataset.current()
    assert second is not None
    read = Dataset.manifest

    def late(self: Dataset) -> Manifest:
        monkeypatch.setattr(Dataset, "manifest", read)
        rerun(self)
        return read(self)

    monkeypatch.setattr(Dataset, "manifest", late)
    found = find_garbage(dataset, timedelta(days=GRACE))
    assert set(second.objects()).isdisjoint(old.name for old in found.old)
    assert spare <= {old.name for old in found.old}
    # A build that found the old column and took it up again.
    current, version = dataset.current()
    assert current is not None
    shard, old = next(iter(second.columns["energy"].items()))
    back = old.model_copy(update={"fingerprint": f"{int(old.fingerprint, 16) - 256:016x}"})
    dataset.commit(current.model_copy(update={"columns": {"energy": {shard: back}}}), version)
    delete_garbage(dataset, found.old)
    assert set(dataset.manifest().objects()) <= names(dataset)


def test_a_commit_does_not_name_what_gc_deleted_meanwhile(dataset: Dataset) -> None:
    """A build found a column of old settings again; gc took it for garbage before the build came to its commit."""
    first = dataset.manifest()
    gone = rerun(dataset, days=60)
    age(dataset, 50)
    manifest, version = dataset.current()
    assert manifest is not None
    assert main(["gc", dataset.uri, "--delete"]) == 0
    assert names(dataset).isdisjoint(gone)
    with pytest.raises(Conflict, match="is gone"):
        dataset.commit(first, version)
    assert dataset.manifest() == manifest
    assert verify(dataset.uri).problems == []


@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_gc_that_breaks_off_is_finished_by_the_next(dataset: Dataset, done: int) -> None:
    for days in (90, 60, 30):
        gone = rerun(dataset, days)
        age(dataset, days, gone)
    manifest = dataset.manifest()
    garbage = {old.name for old in find_garbage(dataset, timedelta(days=GRACE)).old}
    assert len(garbage) > 6
    delete = type(dataset.store).delete

    def breaks(doomed: Iterable[str]) -> None:
        delete(dataset.store, list(doomed)[:done])
        raise StorageError("not reachable")

    with patch.object(type(dataset.store), "delete", side_effect=breaks):
        assert main(["gc", dataset.uri, "--delete"]) == 2
    assert len(garbage & names(dataset)) == len(garbage) - done
    assert verify(dataset.uri).problems == []
    assert main(["gc", dataset.uri, "--delete"]) == 0
    assert names(dataset).isdisjoint(garbage)
    assert set(manifest.objects()) <= names(dataset)
    assert verify(dataset.uri).problems == []


def test_temporary_objects_of_killed_writers_go(dataset: Dataset) -> None:
    for name, days in ((".writing-old_1", 8), (".writing-new2", 6)):
        dataset.store.write(name, b"half")
        age(dataset, days, [name])
    before = names(dataset)
    assert main(["gc", dataset.uri, "--delete"]) == 0
    assert before - names(dataset) == {".writing-old_1"}


def test_what_was_found_in_recordings_stays_while_they_are_clips(dataset: Dataset) -> None:
    """Of the current clip table and of recent ones, by whatever settings; others may be a build's that is at work."""
    rows = dataset.clips()
    media = {"now": rows[0].digest, "recent": "a" * 64, "never": "b" * 64, "young": "c" * 64}
    records = {segments_record(digest, f"{number:016x}"): name for name, digest in media.items() for number in range(2)}
    for name in records:
        dataset.store.write(name, b"{}")
    manifest, version = dataset.current()
    assert manifest is not None
    recent = [replace(rows[0], digest=media["recent"]), *rows[1:]]
    table = dataset.put_rows(ClipRow, recent)
    dataset.commit(manifest.model_copy(update={"clips": table}), version)
    dataset.commit(manifest, dataset.current()[1])
    age(dataset, 30, [name for name, whose in records.items() if whose != "young"])

    def sorts() -> dict[str, set[str]]:
        found = find_garbage(dataset, timedelta(days=GRACE))
        halves = {"old": found.old, "young": found.young, "kept": found.kept}
        return {kind: {records[one.name] for one in half if one.name in records} for kind, half in halves.items()}

    assert sorts() == {"old": {"never"}, "young": {"young"}, "kept": {"recent"}}
    old = find_garbage(dataset, timedelta(days=GRACE)).old
    # Its recording comes back before it is deleted.
    back = dataset.put_rows(ClipRow, [replace(rows[0], digest=media["never"]), *rows[1:]])
    dataset.commit(manifest.model_copy(update={"clips": back}), dataset.current()[1])
    delete_garbage(dataset, old)
    assert {records[name] for name in names(dataset) if name in records} == set(media)
    dataset.commit(manifest, dataset.current()[1])
    age(dataset, 30, [name for name in names(dataset) if name.startswith(HISTORY)])
    delete_garbage(dataset, find_garbage(dataset, timedelta(days=GRACE)).old)
    assert {records[name] for name in names(dataset) if name in records} == {"now", "young"}


def test_a_damaged_copy_of_a_recent_manifest_stops_gc(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody knows what its readers need. One past its grace is garbage like any other."""
    gone = rerun(dataset)
    age(dataset, 100, gone)
    (copy,) = [name for name in names(dataset) if name.startswith(HISTORY)]
    dataset.store.write(copy, b"{")
    before = names(dataset)
    assert main(["gc", dataset.uri, "--delete"]) == 2
    error = capsys.readouterr().err
    assert copy in error
    assert len(error.splitlines()) == 1
    assert names(dataset) == before
    age(dataset, 8, [copy])
    assert main(["gc", dataset.uri, "--delete"]) == 0
    assert before - names(dataset) == {copy, *gone}


def test_a_dataset_in_a_bucket_is_committed_checked_cleaned_and_exported(s3_uri: str) -> None:
    dataset = toy_dataset(f"{s3_uri}/ds", [[14], [13]])
    first, version = dataset.current()
    assert first is not None
    gone = rerun(dataset)
    with pytest.raises(Conflict):
        dataset.commit(first, version)
    assert verify(dataset.uri).problems == []
    assert main(["gc", dataset.uri, "--grace", "1h", "--delete"]) == 0
    assert gone <= names(dataset)
    assert dataset.clips(first)
    before = names(dataset)
    assert main(["gc", dataset.uri, "--grace", "0s", "--delete"]) == 0
    assert {name for name in before - names(dataset) if not name.startswith(HISTORY)} == gone
    assert verify(dataset.uri).problems == verify(dataset.uri).notes == []
    assert len(export(dataset.uri, f"{s3_uri}/plain", ["mel"]).shards) == 2
    with pytest.raises(UserError, match="inside the dataset"):
        export(dataset.uri, f"{dataset.uri}/plain", ["mel"])
    tar = dataset.index().shards[0].name
    dataset.store.write(tar, dataset.store.read(tar)[:-1024])
    assert any("without an end marker" in line for line in verify(dataset.uri).problems)


@dataclass(frozen=True)
class Step:
    """A commit of a simulated history.

    Attributes:
        columns: numbers of the columns that it names.
        days: since the commit before.
        fate: what became of it; one that lost or was killed never was current.
    """

    columns: frozenset[int]
    days: int
    fate: str


NUMBERS = range(6)
OTHERS = ("notes.txt", "train/zzz.tar", "columns/x", ".writing-k1")
steps = st.builds(
    Step,
    st.frozensets(st.sampled_from(NUMBERS), max_size=4),
    st.integers(0, 9),
    st.sampled_from(["done", "done", "done", "lost", "killed"]),
)


def column(number: int) -> tuple[str, str]:
    ref = reference(number)
    stage, shard = f"stage{number}", "train-000000"
    return column_record(stage, shard, ref.fingerprint), column_tar(stage, shard, ref.fingerprint, ref.sha256)


def reference(number: int) -> ColumnRef:
    facts = {"recipe": "0", "reads": {}, "media": "", "attempt": 1, "clips": 0, "refused": 0, "seconds": 0}
    return ColumnRef(record="", fingerprint=f"{number:016x}", sha256=f"{number:064x}", bytes=number, **facts)


def attempt(dataset: Dataset, step: Step) -> None:
    """Commit a manifest that names the columns of a step, or fail to, as its fate says."""
    before, version = dataset.current()
    assert before is not None
    columns = {f"stage{number}": {"train-000000": reference(number)} for number in step.columns}
    columns["energy"] = before.columns["energy"]
    after = before.model_copy(update={"columns": columns})
    if step.fate == "done":
        dataset.commit(after, version)
        return
    # At the last moment: all that comes before the swap has happened.
    fault = Conflict("taken") if step.fate == "lost" else KeyboardInterrupt()
    with patch.object(type(dataset.store), "swap", side_effect=fault), pytest.raises(type(fault)):
        dataset.commit(after, version)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(steps, min_size=1, max_size=7),
    st.integers(0, 9),
    st.lists(st.integers(0, 40), min_size=len(NUMBERS), max_size=len(NUMBERS)),
    st.dictionaries(st.sampled_from(OTHERS), st.integers(0, 40)),
)
def test_gc_keeps_by_the_rule_alone(history: list[Step], rest: int, ages: list[int], others: dict[str, int]) -> None:
    """Kept is what the current manifest names, what one names that was replaced less than the grace ago, what is
    younger than that, and what is not ours."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = toy_dataset(Path(folder), [[2]])
        age(dataset, 99)
        # Times are whole days and a half before now, so that none falls on the limit.
        for name, days in [*((name, ages[number]) for number in NUMBERS for name in column(number)), *others.items()]:
            dataset.store.write(name, b"")
            age(dataset, days + 0.5, [name])
        current: frozenset[int] = frozenset()
        replaced: list[tuple[frozenset[int], float]] = []
        now = rest + sum(step.days for step in history) + 0.5
        for step in history:
            now -= step.days
            attempt(dataset, step)
            # What the store wrote just now was written then.
            written = [
                found for found in dataset.store.list(HISTORY) if found.modified.timestamp() > time.time() - 3600
            ]
            age(dataset, now, [found.name for found in written])
            if step.fate == "done":
                replaced.append((current, now))
                current = step.columns
        recent = frozenset[int]().union(*(columns for columns, days in replaced if days < GRACE))
        expected = {
            name
            for number in NUMBERS
            for name in column(number)
            if number in current | recent or ages[number] + 0.5 < GRACE
        }
        expected |= {name for name, days in others.items() if name != ".writing-k1" or days + 0.5 < GRACE}
        manifest = dataset.manifest()
        assert main(["gc", dataset.uri, "--grace", f"{GRACE}d", "--delete"]) == 0
        left = names(dataset)
        assert {name for name in left if name.startswith("columns/stage") or name in OTHERS} == expected
        assert left >= {MANIFEST, *COPIES, *manifest.objects()}
        assert dataset.manifest() == manifest
        copies = {name for name in left if name.startswith(HISTORY)}
        assert len(copies) <= len([days for _, days in replaced if days < GRACE]) + 1
