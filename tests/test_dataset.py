"""The dataset's tables, and its one way to commit: nobody's work is lost, and nobody sees half of it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.main import main
from shards.dataset import ClipRow, Dataset, QuarantineRow
from shards.errors import UserError
from shards.manifest import (
    CLIPS,
    HISTORY,
    INDEX,
    MANIFEST,
    OWN,
    QUARANTINE,
    Codebook,
    Index,
    Manifest,
    PackedClip,
    PackedShard,
    PackRef,
    Recipe,
    column_record,
    column_tar,
    difference,
    pack_record,
)
from shards.schema import SCHEMA_VERSION
from shards.storage import Conflict, Store
from shards.verify import verify
from tests.toy import toy_dataset

texts = st.text(max_size=12)
counts = st.integers(0, 2**62)
times = st.none() | st.floats(allow_nan=False, allow_infinity=False)
clip_rows = st.builds(
    ClipRow, texts, texts, counts, texts, texts, texts, texts, texts, times, times, counts, texts, texts
)
refused_rows = st.builds(QuarantineRow, texts, texts, texts, texts, texts, texts, texts, texts, counts, st.booleans())


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return toy_dataset(tmp_path / "ds", [[14], [13]])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Manifest]:
    found = toy_dataset(tmp_path_factory.mktemp("tables"), [[14]])
    return found, found.manifest()


@given(st.lists(clip_rows, max_size=5), st.lists(refused_rows, max_size=5))
def test_tables_come_back_as_they_were(
    scratch: tuple[Dataset, Manifest], rows: list[ClipRow], refused: list[QuarantineRow]
) -> None:
    dataset, manifest = scratch
    tables = {"clips": dataset.put_rows(ClipRow, rows), "quarantine": dataset.put_rows(QuarantineRow, refused)}
    manifest = manifest.model_copy(update=tables)
    assert dataset.clips(manifest) == rows
    assert dataset.quarantine(manifest) == refused
    plain = pq.read_table(dataset.store.path(tables["clips"].name)).to_pylist()
    assert [(row["key"], row["start"]) for row in plain] == [(row.key, row.start) for row in rows]


def test_an_empty_table_keeps_its_column_types(dataset: Dataset) -> None:
    clips = pq.read_table(dataset.store.path(dataset.put_rows(ClipRow, []).name))
    types = {name: clips.schema.field(name).type for name in ("key", "bytes", "start", "frames")}
    assert types == {"key": pa.string(), "bytes": pa.int64(), "start": pa.float64(), "frames": pa.int64()}
    refused = pq.read_table(dataset.store.path(dataset.put_rows(QuarantineRow, []).name))
    assert refused.schema.field("retriable").type == pa.bool_()
    assert clips.num_rows == refused.num_rows == 0


@pytest.mark.parametrize(
    "table", [{"key": ["a"]}, {**{name: ["1"] for name in ClipRow.__dataclass_fields__}}], ids=["columns", "types"]
)
def test_a_table_of_other_columns_or_types_is_refused(dataset: Dataset, table: dict[str, list[str]]) -> None:
    pq.write_table(pa.table(table), dataset.store.path(dataset.manifest().clips.name))
    with pytest.raises(UserError, match="no table of this schema"):
        dataset.clips()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7), st.booleans())
def test_a_damaged_table_is_one_error(scratch: tuple[Dataset, Manifest], place: int, bit: int, cut: bool) -> None:
    """Parquet's reader raises many kinds of exception; a flipped value may also read well (`verify` finds that)."""
    dataset, manifest = scratch
    path = dataset.store.path(manifest.clips.name)
    whole = path.read_bytes()
    place %= len(whole)
    damaged = bytearray(whole[:place] if cut else whole)
    if not cut:
        damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    said = manifest.clips.name
    try:
        dataset.clips(manifest)
    except UserError as error:
        said = str(error)
    finally:
        path.write_bytes(whole)
    assert manifest.clips.name in said
    assert "\n" not in said


@pytest.mark.parametrize("copy", [CLIPS, QUARANTINE, INDEX])
@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_what_an_error_says_of_a_table_mends_it(
    dataset: Dataset, copy: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = dataset.manifest()
    ref = {CLIPS: manifest.clips, QUARANTINE: manifest.quarantine, INDEX: manifest.index}[copy]
    path = dataset.store.path(ref.name)
    path.unlink() if damage == "missing" else path.write_bytes(b"{" * ref.bytes)
    assert main(["verify", dataset.uri]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert ref.name in error
    assert f"put its copy {copy} in its place" in error
    path.write_bytes(dataset.store.read(copy))
    assert verify(dataset.uri).problems == []


def test_storing_a_table_again_mends_a_flipped_byte(dataset: Dataset) -> None:
    rows = dataset.clips()
    path = dataset.store.path(dataset.manifest().clips.name)
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    dataset.put_rows(ClipRow, rows)
    assert path.read_bytes() == whole


def counted(manifest: Manifest, count: int) -> Manifest:
    return manifest.model_copy(update={"config": {"count": count}})


def test_of_two_committers_one_wins(dataset: Dataset) -> None:
    (first, one), (second, other) = dataset.current(), dataset.current()
    assert first is not None
    assert second is not None
    dataset.commit(counted(first, 1), one)
    with pytest.raises(Conflict):
        dataset.commit(counted(second, 2), other)
    with pytest.raises(Conflict):
        dataset.commit(counted(second, 2), None)  # as if there were no dataset yet
    assert dataset.manifest().config == {"count": 1}


def test_of_two_first_commits_one_wins(dataset: Dataset, tmp_path: Path) -> None:
    fresh, manifest = Dataset(str(tmp_path / "new")), dataset.manifest()
    assert fresh.current() == (None, None)
    fresh.commit(counted(manifest, 1), None)
    with pytest.raises(Conflict):
        fresh.commit(counted(manifest, 2), None)
    assert fresh.manifest().config == {"count": 1}


def test_a_commit_that_loses_at_the_last_moment_changes_nothing(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, version = dataset.current()
    assert manifest is not None
    kind = type(dataset.store)
    swap = kind.swap

    def overtaken(store: Store, name: str, data: bytes, expected: object) -> None:
        monkeypatch.setattr(kind, "swap", swap)
        Dataset(dataset.uri).commit(counted(manifest, 1), dataset.current()[1])
        swap(store, name, data, expected)

    monkeypatch.setattr(kind, "swap", overtaken)
    with pytest.raises(Conflict):
        dataset.commit(counted(manifest, 2), version)
    assert dataset.manifest().config == {"count": 1}


def test_many_committers_lose_nothing(dataset: Dataset) -> None:
    conflicts = []
    together = threading.Barrier(8)

    def work() -> None:
        mine = Dataset(dataset.uri)
        manifest, version = mine.current()
        together.wait()
        done = 0
        while done < 6:
            assert manifest is not None
            try:
                mine.commit(counted(manifest, manifest.config.get("count", 0) + 1), version)
                done += 1
            except Conflict as conflict:
                conflicts.append(conflict)
            manifest, version = mine.current()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dataset.manifest().config == {"count": 48}
    assert len(conflicts) >= 7  # all began with the same version
    # Every state that readers may have seen is kept for `gc` to judge: the first one, and 1 to 47.
    history = [dataset.replaced(found.name) for found in dataset.store.list(HISTORY)]
    assert sorted(found.config.get("count", 0) for found in history if found) == list(range(48))


def test_readers_never_see_a_mixture(dataset: Dataset) -> None:
    done = threading.Event()
    seen: set[int] = set()
    mixed: list[str] = []
    clip, index = dataset.clips()[0], dataset.index()

    def read() -> None:
        mine = Dataset(dataset.uri)
        while not done.is_set():
            manifest = mine.manifest()
            if not manifest.config:
                continue
            count = manifest.config["count"]
            said = (
                [row.frames for row in mine.clips(manifest)],
                [row.attempt for row in mine.quarantine(manifest)],
                mine.index(manifest).widths,
            )
            if said != ([count] * (count % 3 + 1), [count] * (count % 2), {"D_identity": count}):
                mixed.append(f"{count}: {said}")
            seen.add(count)

    reader = threading.Thread(target=read)
    reader.start()
    refusal = QuarantineRow("k", "", "train", "train-000000", "faces", "no_face", "", "", 0, False)
    count = 0
    while count < 40 or (len(seen) < 6 and not mixed and count < 2000):
        count += 1
        manifest, version = dataset.current()
        assert manifest is not None
        rows = [ClipRow(**{**vars(clip), "frames": count})] * (count % 3 + 1)
        refused = [QuarantineRow(**{**vars(refusal), "attempt": count})] * (count % 2)
        tables = {
            "clips": dataset.put_rows(ClipRow, rows),
            "quarantine": dataset.put_rows(QuarantineRow, refused),
            "index": dataset.put_index(index.model_copy(update={"widths": {"D_identity": count}})),
        }
        dataset.commit(counted(manifest, count).model_copy(update=tables), version)
        dataset.refresh_copies(dataset.manifest())
    done.set()
    reader.join()
    assert mixed == []
    assert len(seen) > 5


def test_copies_follow_the_last_commit_whoever_refreshes_them(dataset: Dataset) -> None:
    """A build that commits first and copies last must not bring its older tables back."""
    earlier, version = dataset.current()
    assert earlier is not None
    rows = dataset.clips()
    later = earlier.model_copy(update={"clips": dataset.put_rows(ClipRow, rows[:1])})
    dataset.commit(later, version)
    dataset.refresh_copies(later)
    dataset.refresh_copies(earlier)
    assert dataset.store.read(CLIPS) == dataset.store.read(later.clips.name)
    assert pq.read_table(dataset.store.path(CLIPS)).num_rows == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe{", "damaged, not JSON"),
        (b"[" * 100_000, "damaged, not JSON"),
        (b"[]", "schema version None"),
        (b'{"schema_version": 99}', "schema version 99"),
        (json.dumps({"schema_version": SCHEMA_VERSION, "profile": 3}).encode(), "wrong entries"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "status", "gc", "quarantine", "export"])
def test_an_unusable_manifest_is_one_line(
    dataset: Dataset, command: str, content: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.store.write(MANIFEST, content)
    extra = [f"{dataset.uri}-plain", "--fields", "mel"] if command == "export" else []
    assert main([command, dataset.uri, *extra]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_file_in_place_of_the_dataset_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["status", str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


RECIPE = Recipe(version=3, settings={"fmax": 600, "fmin": 60}, weights="a")


def index_of(*shards: tuple[str, str]) -> Index:
    """An index with shards of (split, recipe key of pitch)."""
    other = RECIPE.model_copy(update={"settings": {"fmax": 500, "fmin": 60}})
    return Index(
        schema_version=SCHEMA_VERSION,
        profile="offline",
        fields=["pitch"],
        widths={},
        recipes={"pitch": {"old": RECIPE, "new": other}},
        shards=[
            PackedShard(
                name=f"train/{number}.tar",
                shard=f"{split}-{number:06d}",
                split=split,
                sha256="",
                bytes=0,
                behind=[],
                recipes={"pitch": key},
                clips=[PackedClip(key="k", frames=1, members={})],
            )
            for number, (split, key) in enumerate(shards)
        ],
    )


def test_a_split_made_in_two_ways_is_refused_in_words() -> None:
    index = index_of(("train", "old"), ("test", "new"), ("train", "old"))
    assert index.recipe("train") == {"pitch": RECIPE}
    assert index.recipe("test")["pitch"].settings["fmax"] == 500
    assert index.recipe("valid") == {}
    with pytest.raises(UserError, match=r"train-000001: pitch was made otherwise .*split train \(fmax 600 -> 500\)"):
        index_of(("train", "old"), ("train", "new")).recipe("train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"version": 4}, ["version 3 -> 4"]),
        ({"settings": {"fmax": 500, "fmin": 60}}, ["fmax 600 -> 500"]),
        ({"settings": {"fmax": 600, "kind": "yin"}}, ["fmin is gone", "kind is new (yin)"]),
        ({"weights": "b"}, ["network files differ"]),
        ({"codebook": "b"}, ["centroids differ"]),
    ],
)
def test_the_difference_of_two_recipes_is_said_in_words(change: dict[str, object], words: list[str]) -> None:
    assert difference(RECIPE, RECIPE.model_copy(update=change)) == words


def test_a_manifest_names_all_that_a_dataset_holds(dataset: Dataset) -> None:
    """All but itself, its copies and the lock; whatever it does not name, `gc` deletes."""
    found = {found.name: found.size for found in dataset.store.list()}
    plain = {MANIFEST, CLIPS, QUARANTINE, INDEX, ".lock"}
    said = dataset.manifest().objects()
    assert set(said) == set(found) - plain
    assert {name: size for name, size in said.items() if size is not None}.items() <= found.items()
    lost = PackRef(
        inputs="f" * 16,
        record="",
        behind=[],
        name=None,
        sha256="",
        bytes=0,
        clips=0,
        frames=0,
        refused={"fault": 1},
        seconds=1,
    )
    book = Codebook(name=f"codebooks/units-{'0' * 16}.npy", fit="x", sha256="", bytes=1)
    more = dataset.manifest().model_copy(update={"packs": {"train-000000": lost}, "codebook": book})
    assert {pack_record("train-000000", "f" * 16), book.name} <= set(more.objects())
    assert None not in more.objects()


@given(st.from_regex(r"[a-zA-Z0-9_]{1,12}", fullmatch=True), st.integers(0, 10**7), st.text("0123456789abcdef"))
def test_names_that_a_build_gives_are_its_own(split: str, number: int, digits: str) -> None:
    shard, mark, digest = f"{split}-{number:06d}", (digits * 16 + "0" * 16)[:16], (digits * 64 + "0" * 64)[:64]
    for name in (
        column_record("pitch", shard, mark),
        column_tar("pitch", shard, mark, digest),
        pack_record(shard, mark),
        f"train/{shard}-{digest[:12]}.tar",
    ):
        assert OWN.fullmatch(name), name


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "train/zzz.tar",
        "train/train-000000.tar",
        "train/train-000000-2574ab19bbb0.tar.bak",
        "columns/pitch/train-000000.tar",
        "columns/pitch/more/train-000000-0000000000000000.json",
        "tables/clips.parquet",
        "tables/other-000000000000.parquet",
        "manifests/1.json",
        "sub/dataset.json",
        "dataset.json\n",
        "Xdataset.json",
        ".writing-/x",
    ],
)
def test_other_names_are_foreign(name: str) -> None:
    assert not OWN.fullmatch(name)


def test_a_commit_leaves_no_temporary_objects(dataset: Dataset) -> None:
    manifest, version = dataset.current()
    assert manifest is not None
    dataset.commit(counted(manifest, 1), version)
    assert [name for name in os.listdir(dataset.uri) if name.startswith(".writing-")] == []
