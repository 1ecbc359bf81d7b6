"""Datasets change in place: narrow reruns, added and removed clips, second tries, and builds at the same time."""

from __future__ import annotations

import json
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.build
from cli.main import main
from pipeline.build import Summary, build, plan_build
from pipeline.columns import Column, Refused
from pipeline.selection import Selection
from pipeline.stage import Reason
from pipeline.stages.energy import Energy
from pipeline.survey import Wanted, survey
from shards.dataset import Dataset, QuarantineRow
from shards.errors import UserError
from shards.history import find_garbage
from shards.local_store import LocalStore
from shards.manifest import Manifest, column_record
from shards.verify import verify
from tests.conftest import cluster, small_build
from tests.toy import everything, tars

Built = tuple[Dataset, Summary]


@pytest.fixture
def copy(built: Built, tmp_path: Path) -> Dataset:
    """The built dataset again, to be changed."""
    shutil.copytree(built[0].uri, tmp_path / "copy")
    return Dataset(str(tmp_path / "copy"))


def columns(dataset: Dataset) -> dict[str, str]:
    """Every column object with its stamp."""
    return {found.name: found.stamp for found in dataset.store.list("columns/")}


def test_one_changed_setting_reruns_its_stage_alone(built: Built, copy: Dataset) -> None:
    shards = len(copy.manifest().shards)
    before = columns(copy)
    summary = build(None, copy.uri, small_build(energy={"kind": "norm"}))
    assert summary.tasks == shards
    # Old columns stay as they are; only energy has new ones.
    after = columns(copy)
    assert before.items() <= after.items()
    assert {name.split("/")[1] for name in after.keys() - before.keys()} == {"energy"}
    changed = everything(copy)
    for key, values in everything(built[0]).items():
        for name, value in values.items():
            same = np.array_equal(value, changed[key][name], equal_nan=name == "pitch") if name != "meta" else True
            assert same == (name != "energy"), (key, name)
        # The other kind of energy is the plain norm of the linear mel frame.
        norm = np.linalg.norm(np.exp(changed[key]["mel"].astype(np.float64)), axis=1)
        np.testing.assert_allclose(changed[key]["energy"], norm, rtol=1e-4)
    assert verify(copy.uri).problems == []


def test_a_second_build_reads_no_media_and_no_network(
    corpus: Path, built: Built, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[Path] = []
    plain = LocalStore.open

    def watched(store: LocalStore, name: str) -> Any:
        opened.append(store.path(name))
        return plain(store, name)

    monkeypatch.setattr(LocalStore, "open", watched)
    monkeypatch.setattr("pipeline.fingerprint.file_sha256", lambda path: opened.append(path))
    monkeypatch.setattr("pipeline.networks.ctranslate2.read_model", None, raising=False)
    assert main(["build", str(corpus), built[0].uri]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert [path for path in opened if not path.is_relative_to(built[0].uri)] == []


def test_settings_are_the_datasets_own_unless_a_file_says_otherwise(
    copy: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", copy.uri]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["plan", copy.uri, "--set", "pitch.fmax=500"]) == 0
    text = capsys.readouterr().out
    shards = len(copy.manifest().shards)
    assert f"fmax 600.0 -> 500.0, {shards} shards" in text
    assert f"to do: {shards} stage shards, {len(copy.index().shards)} shards to pack" in text
    assert "estimate" in text
    # A file is the whole truth: what it leaves out has its default.
    (tmp_path / "build.yaml").write_text("pack: {shard_clips: 6}\n")
    assert main(["build", copy.uri, "--config", str(tmp_path / "build.yaml"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "centroids are fitted first" in text


def test_added_clips_leave_the_shards_before_them_alone(corpus: Path, copy: Dataset, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(corpus, source)
    first = next(iter(sorted((source / "train").rglob("*.mp4"))))
    shutil.copy(first, source / "train" / "newcomer.mp4")
    before, old = tars(copy), columns(copy)
    summary = build(str(source), copy.uri, small_build())
    assert summary.clips == 13
    assert summary.packed == 1
    assert before.items() <= tars(copy).items()
    assert old.items() <= columns(copy).items()
    assert verify(copy.uri).problems == []


def test_changed_media_are_noticed(corpus: Path, copy: Dataset, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(corpus, source)  # with new times, but the same content
    assert build(str(source), copy.uri, small_build()).tasks == 0
    one, other = sorted((source / "train").rglob("*.mp4"))[:2]
    shutil.copy(one, other)
    summary = build(None, copy.uri, small_build())
    assert summary.tasks == 11  # every stage of the one shard
    key = other.relative_to(source).with_suffix("").as_posix()
    row = next(row for row in copy.clips() if row.key == key)
    assert row.digest == LocalStore(str(one.parent)).sha256(one.name)
    assert verify(copy.uri).problems == []


def test_clips_that_are_gone_are_kept_until_said_otherwise(corpus: Path, copy: Dataset, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(corpus, source)
    shutil.rmtree(source / "test")
    before = copy.manifest()
    with pytest.raises(UserError, match=r"does not have, or cannot read, 1 clip of .*, e\.g\. test/.*--drop-missing"):
        build(str(source), copy.uri, small_build())
    with pytest.raises(UserError, match="without narrowing"):
        build(str(source), copy.uri, small_build(), Selection(only=("energy",)), drop_missing=True)
    assert copy.manifest() == before
    summary = build(str(source), copy.uri, small_build(), drop_missing=True)
    assert summary.clips == 11
    assert {row.split for row in copy.clips()} == {"train", "valid"}
    assert verify(copy.uri).problems == []


def test_media_that_vanish_do_not_empty_the_dataset(corpus: Path, built: Built, tmp_path: Path) -> None:
    """A table names every clip, whether its media are there or not."""
    media = tmp_path / "media"
    media.mkdir()
    for number, path in enumerate(sorted((corpus / "train").rglob("*.mp4"))[:2]):
        shutil.copy(path, media / f"{number}.mp4")
    (tmp_path / "list.csv").write_text("uri\nmedia/0.mp4\nmedia/1.mp4\nmedia/never-there.mp4\n")
    dataset = Dataset(str(tmp_path / "ds"))
    summary = build(str(tmp_path / "list.csv"), dataset.uri, small_build())
    assert (summary.clips, summary.quarantined) == (2, {"unreadable": 1})
    before = tars(dataset)
    media.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"cannot read, 2 clips of the dataset, e\.g\. media/0"):
        build(None, dataset.uri, small_build())
    assert tars(dataset) == before
    (tmp_path / "elsewhere").rename(media)
    assert build(None, dataset.uri, small_build()).tasks == 0


def test_narrow_builds_add_up_to_a_whole_one(corpus: Path, built: Built, tmp_path: Path) -> None:
    """A dataset built piece by piece, in an odd order, has the bytes of one built in one go."""
    dataset = Dataset(str(tmp_path / "pieces"))
    summary = build(str(corpus), dataset.uri, small_build(), Selection(only=("audio", "faces"), shards="train:0"))
    assert (summary.tasks, summary.clips, summary.pending) == (2, 0, 18)
    assert {row.state for row in dataset.clips()} == {"pending"}
    assert verify(dataset.uri).problems == []
    summary = build(None, dataset.uri, small_build(), Selection(shards="0"))
    assert summary.pending > 0
    assert verify(dataset.uri).problems == []
    assert tars(dataset).items() < tars(built[0]).items()
    summary = build(None, dataset.uri, small_build())
    assert summary.pending == 0
    assert tars(dataset) == tars(built[0])


def test_a_stage_that_is_behind_is_not_trained_on(
    copy: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """New mels beside energies of the old ones."""
    summary = build(None, copy.uri, small_build(mel={"filterbank": "slaney"}), Selection(only=("mel",)))
    assert summary.left == len(copy.manifest().shards)
    assert main(["status", copy.uri]) == 0
    assert "energy: in" in capsys.readouterr().out
    assert main(["train", copy.uri, str(tmp_path / "run"), "--size", "tiny", "--steps", "1"]) == 2
    assert "energy follow from columns that were made anew since" in capsys.readouterr().err
    build(None, copy.uri, wanted())
    assert not copy.index().recipe("train")["energy"].settings.keys() - {"kind"}
    assert verify(copy.uri).problems == []


def test_shards_of_different_settings_are_not_trained_on_together(
    copy: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(None, copy.uri, small_build(pitch={"fmax": 500}), Selection(only=("pitch",), shards="train:1"))
    assert verify(copy.uri).problems == []
    assert main(["status", copy.uri]) == 0
    assert "pitch: shards made in 2 ways" in capsys.readouterr().out
    assert main(["train", copy.uri, str(tmp_path / "run"), "--size", "tiny", "--steps", "1"]) == 2
    assert "pitch was made otherwise than in other shards of split train (fmax" in capsys.readouterr().err


def test_damaged_centroids_are_not_used(built: Built, copy: Dataset) -> None:
    book = copy.manifest().codebook
    assert book is not None
    path = Path(copy.uri) / book.name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert any(book.name in problem for problem in verify(copy.uri).problems)
    with pytest.raises(UserError, match="damaged; delete it and build again"):
        build(None, copy.uri, small_build())
    path.unlink()
    assert build(None, copy.uri, small_build()).tasks == 0
    assert copy.manifest().codebook == book
    assert verify(copy.uri).problems == []


def test_given_centroids_move_with_the_dataset(built: Built, copy: Dataset, tmp_path: Path) -> None:
    given = tmp_path / "units.npy"
    centroids = np.random.default_rng(0).normal(size=(20, 384)).astype(np.float32)
    np.save(given, centroids)
    config = small_build(speech={"clusters": 20, "centroids": str(given)})
    build(None, copy.uri, config)
    book = copy.manifest().codebook
    assert book is not None
    np.testing.assert_array_equal(np.load(Path(copy.uri) / book.name), centroids)
    before = tars(copy)
    given.unlink()
    Path(copy.uri).rename(tmp_path / "moved")
    moved = Dataset(str(tmp_path / "moved"))
    assert build(None, moved.uri, wanted()).tasks == 0
    for column in (tmp_path / "moved" / "columns" / "speech").glob("*.tar"):
        column.unlink()
    assert build(None, moved.uri, wanted()).tasks == len(moved.manifest().shards)
    assert tars(moved) == before
    assert verify(moved.uri).problems == []


def test_damaged_and_lost_objects_are_made_again(built: Built, copy: Dataset) -> None:
    root = Path(copy.uri)
    shard = root / copy.index().shards[0].name
    shard.write_bytes(shard.read_bytes()[:-1024])
    next(iter((root / "columns" / "energy").glob("*.tar"))).unlink()
    assert verify(copy.uri, full=False).problems
    summary = build(None, copy.uri, small_build())
    assert (summary.tasks, summary.packed) == (1, 1)
    assert verify(copy.uri).problems == []
    assert tars(copy) == tars(built[0])


def _fault(dataset: Dataset, stage: str, followers: tuple[str, ...]) -> str:
    """As if a stage had run out of memory on one clip, and the ones after it had gone on without; returns its key."""
    manifest, version = dataset.current()
    assert manifest is not None
    entry = dataset.index().shards[0]
    key, shard = entry.clips[0].key, entry.shard
    refs = {name: dict(row) for name, row in manifest.columns.items()}
    for name in (stage, *followers):
        record = column_record(name, shard, refs[name][shard].fingerprint)
        column = Column.model_validate_json(dataset.store.read(record))
        refused = [Refused(key=key, reason=Reason.FAULT, message="MemoryError", traceback="Traceback ...")]
        clips = {other: clip for other, clip in column.clips.items() if other != key}
        refused = [*column.refused, *(refused if name == stage else [])]
        column = column.model_copy(update={"clips": clips, "refused": refused})
        dataset.store.write(record, column.model_dump_json().encode())
        refs[name][shard] = column.ref(refs[name][shard].recipe)
    dataset.store.delete([found.name for found in dataset.store.list(f"packs/{shard}")])
    dataset.commit(manifest.model_copy(update={"columns": refs}), version)
    return key


def test_quarantine_names_faults_and_requeue_tries_again(
    built: Built, copy: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    key = _fault(copy, "mel", ("energy",))
    summary = build(None, copy.uri, small_build())
    assert (summary.tasks, summary.packed, summary.clips) == (0, 0, 11)  # its shard had this clip alone
    assert summary.changed
    assert any("--requeue fault" in note for note in summary.notes)
    row = next(row for row in copy.quarantine() if row.key == key)
    assert (row.stage, row.reason, row.attempt, row.retriable) == ("mel", "fault", 1, True)
    assert row.traceback
    assert verify(copy.uri, full=False).problems == []  # the tar still has the clip
    # A plain build leaves it alone; asked for, the stage and what follows it run again for that shard.
    assert build(None, copy.uri, small_build()).tasks == 0
    assert main(["build", copy.uri, "--requeue", "no_audio", "--dry-run"]) == 0
    assert "asked for again" in capsys.readouterr().out
    assert main(["build", copy.uri, "--requeue", "several_faces"]) == 0
    assert "no clip is in quarantine for several_faces" in capsys.readouterr().out
    summary = build(None, copy.uri, small_build(), Selection(requeue=("fault",)))
    assert (summary.tasks, summary.clips) == (2, 12)
    assert tars(copy) == tars(built[0])
    assert build(None, copy.uri, small_build()).tasks == 0


def test_a_second_refusal_counts_the_attempts(copy: Dataset) -> None:
    build(None, copy.uri, small_build(), Selection(requeue=("silent",)))
    attempts = {row.key: row.attempt for row in copy.quarantine()}
    assert attempts["faulty/silent"] == 2
    assert attempts["faulty/no_face"] == 1


@pytest.mark.parametrize("stage", ["pack", "sync"])
def test_lengths_that_differ_are_asked_of_the_stages_that_decode(copy: Dataset, stage: str) -> None:
    manifest, version = copy.current()
    assert manifest is not None
    row = next(row for row in copy.clips() if row.state == "packed")
    facts: dict[str, Any] = {
        "key": row.key,
        "uri": row.uri,
        "split": row.split,
        "shard": row.shard,
        "stage": stage,
        "attempt": 1,
    }
    lost = QuarantineRow(**facts, reason="audio_length", message="", traceback="", retriable=False)
    table = copy.put_rows(QuarantineRow, [*copy.quarantine(), lost])
    copy.commit(manifest.model_copy(update={"quarantine": table}), version)
    plan = plan_build(survey(None, copy.uri, wanted()), Selection(requeue=("audio_length",)))
    again = {(name, shard) for name, cells in plan.cells.items() for shard, cell in cells.items() if cell.run}
    assert {("faces", row.shard), ("audio", row.shard)} <= again
    assert {shard for _, shard in again} == {row.shard}


def wanted(*overrides: str) -> Wanted:
    """Settings as from the command line."""
    return Wanted(None, (*overrides, f"run.ray_address={cluster()}"))


@pytest.mark.parametrize(("theirs", "ours"), [("pitch", Selection(only=("energy",))), ("whole", Selection())])
def test_two_builds_at_once_both_arrive(
    copy: Dataset, monkeypatch: pytest.MonkeyPatch, theirs: str, ours: Selection
) -> None:
    """Another build commits between this one's plan and its commit: the result is as if one had run after the other."""
    plain = pipeline.build.commit_build
    seen: list[Manifest] = []

    def late(*arguments: Any) -> Any:
        if not seen:
            seen.append(copy.manifest())
            selection = Selection(only=("pitch",)) if theirs == "pitch" else Selection()
            build(None, copy.uri, wanted("pitch.fmax=500"), selection)
        return plain(*arguments)

    monkeypatch.setattr(pipeline.build, "commit_build", late)
    summary = build(
        None, copy.uri, small_build(energy={"kind": "norm"}, pitch={"fmax": 500}), Selection(only=("energy",))
    )
    assert summary.changed
    recipes = copy.index().recipe("train")
    assert recipes["energy"].settings["kind"] == "norm"
    assert recipes["pitch"].settings["fmax"] == 500
    assert build(None, copy.uri, wanted()).tasks == 0
    assert verify(copy.uri).problems == []
    # The columns of the first try were taken up, not computed twice.
    energy = [found.name for found in copy.store.list("columns/energy/") if found.name.endswith(".tar")]
    assert len(energy) == 2 * len(copy.manifest().shards)


def test_a_reader_of_the_old_state_reads_on_during_a_rerun(built: Built, copy: Dataset) -> None:
    manifest = copy.manifest()
    index, rows = copy.index(manifest), copy.clips(manifest)
    build(None, copy.uri, small_build(energy={"kind": "norm"}))
    assert copy.index(manifest) == index
    assert copy.clips(manifest) == rows
    old = {shard.name: copy.store.read(shard.name) for shard in index.shards}
    assert old == tars(built[0])


def test_gc_after_a_rerun_leaves_a_dataset_that_goes_on(copy: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    for found in copy.store.list():
        os.utime(Path(copy.uri) / found.name, (1, 1))
    before = {found.name for found in copy.store.list()}
    build(None, copy.uri, small_build(energy={"kind": "norm"}))
    assert main(["gc", copy.uri]) == 0
    text = capsys.readouterr().out
    assert "columns/" not in text  # the state before was replaced a moment ago
    assert "tables/" in text  # but not the one before that
    assert main(["gc", copy.uri, "--grace", "0s", "--delete"]) == 0
    after = {found.name for found in copy.store.list()}
    assert {name.split("/")[0] for name in before - after} == {"columns", "train", "packs", "tables", "manifests"}
    assert {name.split("/")[1] for name in before - after if name.startswith("columns")} == {"energy"}
    assert verify(copy.uri).problems == []
    assert build(None, copy.uri, small_build(energy={"kind": "norm"})).tasks == 0


def test_a_new_version_of_a_stage_is_a_reason(copy: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Energy, "version", Energy.version + 1)
    from pipeline.build import plan_build
    from pipeline.survey import survey

    plan = plan_build(survey(None, copy.uri, small_build()), Selection())
    shard = next(iter(plan.cells["energy"]))
    assert plan.cells["energy"][shard].why == f"version {Energy.version - 1} -> {Energy.version}"
    assert {task.stage for task in plan.tasks()} == {"energy"}


def test_two_clips_of_one_key_are_both_named(tmp_path: Path) -> None:
    for name in ("a b.mp4", "a%20b.mp4", "c.mp4", "c.mov"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"'c' names two clips: .*c\.mov and .*c\.mp4"):
        build(str(tmp_path), str(tmp_path / "ds"), small_build())


def test_an_empty_source_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match="no clips found"):
        build(str(tmp_path / "source"), str(tmp_path / "ds"), small_build())
    assert not (tmp_path / "ds").exists()


def test_quarantine_rows_are_a_table_for_everyone(built: Built) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(f"{built[0].uri}/quarantine.parquet").to_pylist()
    assert [QuarantineRow(**row) for row in table] == built[0].quarantine()
    assert find_garbage(built[0], timedelta(days=1)).foreign == []


def test_quarantine_in_words(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quarantine", built[0].uri]) == 0
    text = capsys.readouterr().out
    assert text.startswith("6 clips in quarantine\n")
    assert "1  silent (audio): e.g. faulty/silent: " in text
    assert main(["quarantine", built[0].uri, "--list", "--reason", "no_face"]) == 0
    assert capsys.readouterr().out.startswith("faulty/no_face: faces: no_face: ")
    assert main(["quarantine", built[0].uri, "--json"]) == 0
    assert {json.loads(line)["attempt"] for line in capsys.readouterr().out.splitlines()} == {1}
    assert main(["quarantine", built[0].uri, "--reason", "silence"]) == 2
    assert "choose from" in capsys.readouterr().err
