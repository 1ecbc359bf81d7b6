"""`verify` finds every kind of damage and obeys none; plain webdataset reads what it passes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.main import main
from shards.dataset import ClipRow, Dataset, QuarantineRow
from shards.manifest import CLIPS, INDEX, QUARANTINE, column_record, column_tar, pack_record
from shards.verify import verify
from tests.toy import toy_dataset, toy_values

SHARD = "train-000000"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return toy_dataset(tmp_path / "ds", [[14, 20], [13]])


def shard_path(dataset: Dataset, number: int = 0) -> Path:
    return dataset.store.path(dataset.index().shards[number].name)


def column_path(dataset: Dataset) -> Path:
    ref = dataset.manifest().columns["energy"][SHARD]
    return dataset.store.path(column_tar("energy", SHARD, ref.fingerprint, ref.sha256))


def edit(path: Path, offset: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def recommit(dataset: Dataset, **changes: Any) -> None:
    """Commit a manifest with other entries, so that copies and checksums agree with what is there."""
    manifest, version = dataset.current()
    assert manifest is not None
    manifest = manifest.model_copy(update=changes)
    dataset.commit(manifest, version)
    dataset.refresh_copies(manifest)


def reshard(dataset: Dataset, data: bytes) -> None:
    """Other bytes for the first shard, with index and manifest that vouch for them."""
    manifest, index = dataset.manifest(), dataset.index()
    shard_path(dataset).write_bytes(data)
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    shards = [index.shards[0].model_copy(update=facts), *index.shards[1:]]
    packs = {**manifest.packs, SHARD: manifest.packs[SHARD].model_copy(update=facts)}
    recommit(dataset, packs=packs, index=dataset.put_index(index.model_copy(update={"shards": shards})))


def checked(dataset: Dataset, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """The lines of a check that finds something, without the last one, which counts."""
    capsys.readouterr()
    assert main(["verify", dataset.uri, *options]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert " problem" in last
    return lines


@pytest.mark.parametrize("options", [[], ["--full"], ["--quick"]])
def test_a_good_dataset_passes(dataset: Dataset, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", dataset.uri, *options]) == 0
    size = sum(path.stat().st_size for path in (shard_path(dataset, 0), shard_path(dataset, 1)))
    line = f"{dataset.uri}: 2 shards, 3 clips, {size / 1e6:.1f} MB: all right\n"
    assert capsys.readouterr().out == line


def test_json_says_the_same(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    shard_path(dataset).unlink()
    assert main(["verify", dataset.uri, "--quick", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["shards"], found["clips"], found["notes"]) == (2, 3, [])
    assert found["problems"] == [f"train/{dataset.index().shards[0].name[6:]}: missing"]


def test_three_lines_of_webdataset_read_it(dataset: Dataset) -> None:
    urls = [str(shard_path(dataset, number)) for number in (0, 1)]
    samples = {sample["__key__"]: sample for sample in wds.WebDataset(urls, shardshuffle=False).decode("rgb8")}
    assert set(samples) == {"s0c0", "s0c1", "s1c0"}
    expected = toy_values("s0c1", 20)
    np.testing.assert_array_equal(samples["s0c1"]["mel.npy"], expected["mel"])
    assert samples["s0c1"]["json"]["frames"] == 20
    assert samples["s0c1"]["face.jpg"].shape == (20 * 112, 112, 3)
    assert samples["s0c1"]["lips.jpg"].shape[:2] == (20 * 96, 96)


@pytest.mark.parametrize("kind", ["shard", "column"])
def test_a_tar_cut_between_two_members_is_found(
    dataset: Dataset, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shard_path(dataset) if kind == "shard" else column_path(dataset)
    with tarfile.open(path) as archive:
        cut = archive.getmembers()[1].offset
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with tarfile.open(path) as archive:  # an ordinary reader sees a shorter archive and says nothing
        assert len(archive.getmembers()) == 1
    name = path.relative_to(dataset.uri).as_posix()
    assert checked(dataset, capsys, "--quick") == [f"{name}: {cut} bytes, the manifest says {len(data)}"]
    lines = checked(dataset, capsys)
    assert f"{name}: byte {cut}: archive ends without an end marker" in lines
    assert any(line.startswith(name) and "members missing" in line for line in lines)
    assert all(line.startswith(name) for line in lines)


@pytest.mark.parametrize("field", ["mel", "lips", "wav", "units"])
def test_a_flipped_byte_in_a_member_is_found(dataset: Dataset, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = shard_path(dataset)
    offset, size = dataset.index().shards[0].clips[1].members[field]
    edit(path, offset + size - 3)
    assert main(["verify", dataset.uri, "--quick"]) == 0
    assert f"train/{path.name}: sha256 differs from the manifest; delete it and build again" in checked(dataset, capsys)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_flipped_bit_anywhere_is_found(damaged: Dataset, data: st.DataObject) -> None:
    """In tars, records, tables and their copies. The manifest has no checksum but is held against the rest, which
    misses some flips (a measured time); nothing in it may confuse the check itself."""
    names = sorted(found.name for found in damaged.store.list() if found.size)
    name = data.draw(st.sampled_from(names))
    path = damaged.store.path(name)
    whole = path.read_bytes()
    edit(path, data.draw(st.integers(0, len(whole) - 1)), 1 << data.draw(st.integers(0, 7)))
    try:
        status = main(["verify", damaged.uri])
    finally:
        path.write_bytes(whole)
    assert status in (1, 2) or (status == 0 and name == "dataset.json")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("damaged"), [[2], [3]])


def lost_shard(dataset: Dataset) -> str:
    return shard_path(dataset).relative_to(dataset.uri).as_posix()


def lost_column(dataset: Dataset) -> str:
    return column_path(dataset).relative_to(dataset.uri).as_posix()


def lost_column_record(dataset: Dataset) -> str:
    return column_record("energy", SHARD, dataset.manifest().columns["energy"][SHARD].fingerprint)


def lost_pack_record(dataset: Dataset) -> str:
    return pack_record(SHARD, dataset.manifest().packs[SHARD].inputs)


@pytest.mark.parametrize("named", [lost_shard, lost_column, lost_column_record, lost_pack_record])
@pytest.mark.parametrize("option", ["--quick", "--full"])
def test_a_missing_object_is_one_line(
    dataset: Dataset, named: Callable[[Dataset], str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = named(dataset)
    dataset.store.delete([name])
    assert checked(dataset, capsys, option) == [f"{name}: missing"]


def test_a_flipped_byte_in_a_column_is_found(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    path = column_path(dataset)
    edit(path, 512 + 200)
    assert main(["verify", dataset.uri, "--quick"]) == 0
    name = path.relative_to(dataset.uri).as_posix()
    assert checked(dataset, capsys) == [f"{name}: sha256 differs from the manifest; delete it and build again"]


@pytest.mark.parametrize("named", [lost_column_record, lost_pack_record])
def test_a_record_that_says_something_else_is_found(
    dataset: Dataset, named: Callable[[Dataset], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Later builds read by these offsets."""
    name = named(dataset)
    text = dataset.store.read(name).decode()
    shifted = text.replace('"energy":[512,', '"energy":[513,').replace('"frames":14', '"frames":15')
    assert shifted != text
    for content in (shifted, text[:-9], "[]", "7"):
        dataset.store.write(name, content.encode())
        lines = checked(dataset, capsys)
        assert len(lines) == 1
        assert SHARD in lines[0]


@pytest.mark.parametrize("name", ["train/zzz.tar", "notes.txt", "columns/energy/notes.txt", "a b/c"])
@pytest.mark.parametrize("option", ["--quick", "--full"])
def test_a_foreign_object_is_named(
    dataset: Dataset, name: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.store.write(name, b"x")
    assert checked(dataset, capsys, option) == [f"{name}: foreign object, no build made it"]


def test_a_hostile_file_name_stays_on_one_line(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(dataset.uri) / "a\nall right\x1b[2J").write_text("x")
    with open(os.fsencode(dataset.uri) + b"/b\xff", "w"):
        pass
    first, second = checked(dataset, capsys)
    assert first == "a\\nall right\\x1b[2J: foreign object, no build made it"
    assert second == "b\\udcff: foreign object, no build made it"


def test_leftovers_of_other_builds_are_a_note(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"columns/energy/{SHARD}-{'e' * 16}.json", f"train/{SHARD}-{'e' * 12}.tar", ".writing-abc_1"]
    for name in names:
        dataset.store.write(name, b"x")
    verdict = verify(dataset.uri)
    assert verdict.problems == []
    assert len(verdict.notes) == 1
    assert "3 objects of other builds" in verdict.notes[0]
    assert main(["verify", dataset.uri]) == 0
    assert "f2v gc" in capsys.readouterr().out


def test_replaced_manifests_are_no_leftovers(dataset: Dataset) -> None:
    recommit(dataset, config={"changed": True})
    assert any(dataset.store.list("manifests/"))
    assert (verify(dataset.uri).notes, verify(dataset.uri).problems) == ([], [])


@pytest.mark.parametrize("copy", [CLIPS, QUARANTINE, INDEX])
def test_stale_and_damaged_copies_are_found(dataset: Dataset, copy: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = dataset.store.path(copy)
    whole = path.read_bytes()
    path.write_bytes(whole + b"x")
    for option in ("--quick", "--full"):
        (line,) = checked(dataset, capsys, option)
        assert line.startswith(f"{copy}: not the current table")
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    (line,) = checked(dataset, capsys)
    assert line.startswith(f"{copy}: not the current table")
    path.unlink()
    (line,) = checked(dataset, capsys)
    assert line.startswith(f"{copy}: not the current table")
    dataset.refresh_copies(dataset.manifest())
    assert verify(dataset.uri).problems == []


def test_a_flipped_byte_that_a_table_hides_is_found(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """The index reads well, but one of its characters is another."""
    name = dataset.manifest().index.name
    text = dataset.store.read(name).replace(b'"clusters":11', b'"clusters":13')
    dataset.store.write(name, text)
    (line,) = checked(dataset, capsys)
    assert line == f"{name}: sha256 differs from the manifest; put its copy {INDEX} in its place"


def test_values_that_break_the_schema_are_found(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """Checksums that agree with the bytes do not help values that are wrong."""
    offset, size = dataset.index().shards[0].clips[0].members["mel"]
    data = bytearray(shard_path(dataset).read_bytes())
    data[offset + size - 4 : offset + size] = np.float32(np.nan).tobytes()
    reshard(dataset, bytes(data))
    assert main(["verify", dataset.uri, "--quick"]) == 0
    lines = checked(dataset, capsys)
    assert any("s0c0: mel: 1 values are not finite" in line for line in lines)
    assert not any("sha256" in line for line in lines)


def test_a_clip_of_another_length_is_found(dataset: Dataset) -> None:
    index = dataset.index()
    clips = [index.shards[0].clips[0].model_copy(update={"frames": 15}), index.shards[0].clips[1]]
    shards = [index.shards[0].model_copy(update={"clips": clips}), index.shards[1]]
    recommit(dataset, index=dataset.put_index(index.model_copy(update={"shards": shards})))
    problems = verify(dataset.uri).problems
    assert any("index and manifest disagree" in line for line in problems)
    assert any(line.startswith("s0c0: clips.parquet says 14 frames") for line in problems)
    assert any("s0c0: energy: shape (28,)" in line for line in problems)


def test_widths_that_the_shards_do_not_have_are_found(dataset: Dataset) -> None:
    index = dataset.index()
    recommit(dataset, index=dataset.put_index(index.model_copy(update={"widths": {**index.widths, "D_timbre": 6}})))
    assert any("timbre: shape (5,)" in line for line in verify(dataset.uri).problems)


def with_rows(dataset: Dataset, rows: list[ClipRow], refused: list[QuarantineRow] | None = None) -> list[str]:
    tables = {"clips": dataset.put_rows(ClipRow, rows), "quarantine": dataset.put_rows(QuarantineRow, refused or [])}
    recommit(dataset, **tables)
    problems = verify(dataset.uri, full=False).problems
    assert problems == [line for line in verify(dataset.uri).problems if "packs/" not in line]
    return problems


def refusal(key: str, shard: str = SHARD, reason: str = "no_face") -> QuarantineRow:
    return QuarantineRow(key, "", "train", shard, "faces", reason, "", "", 1, False)


def test_a_clip_without_a_row_is_found(dataset: Dataset) -> None:
    problems = with_rows(dataset, dataset.clips()[1:])
    assert "s0c0: in shards or quarantine.parquet but not in clips.parquet" in problems
    assert f"{SHARD}: 1 clips in, 2 packed, 0 quarantined" in problems


def test_a_row_without_a_clip_is_found(dataset: Dataset) -> None:
    rows = dataset.clips()
    problems = with_rows(dataset, [*rows, replace(rows[0], key="ghost", state="quarantined")])
    assert "ghost: clips.parquet says quarantined, found nowhere" in problems
    assert f"{SHARD}: 3 clips in, 2 packed, 0 quarantined" in problems
    assert f"{SHARD}: 3 clips in clips.parquet, the manifest counts 2" in problems


def test_doubled_rows_are_found_even_where_counts_agree(dataset: Dataset) -> None:
    rows = dataset.clips()
    problems = with_rows(dataset, [rows[0], rows[0], rows[2]])
    assert "s0c0: 2 rows in clips.parquet" in problems
    assert "s0c1: in shards or quarantine.parquet but not in clips.parquet" in problems


def test_a_clip_that_is_packed_twice_is_found(dataset: Dataset) -> None:
    index = dataset.index()
    twice = index.shards[1].model_copy(update={"clips": [*index.shards[1].clips, index.shards[0].clips[0]]})
    recommit(dataset, index=dataset.put_index(index.model_copy(update={"shards": [index.shards[0], twice]})))
    assert "s0c0: packed 2 times" in verify(dataset.uri, full=False).problems


def test_a_clip_in_two_places_is_found(dataset: Dataset) -> None:
    problems = with_rows(dataset, dataset.clips(), [refusal("s0c0"), refusal("s0c0")])
    assert "s0c0: clips.parquet says packed, found packed and quarantined" in problems
    assert "s0c0: 2 rows in quarantine.parquet" in problems
    assert f"{SHARD}: 2 more no_face in quarantine.parquet than in the manifest" in problems


def test_a_clip_in_another_shard_than_its_row_says_is_found(dataset: Dataset) -> None:
    rows = dataset.clips()
    moved = [replace(row, shard="train-000001" if row.shard == SHARD else SHARD) for row in rows]
    problems = with_rows(dataset, moved)
    assert f"s0c0: clips.parquet says 14 frames in train-000001, the index 14 in {SHARD}" in problems


def test_clips_that_vanish_between_stages_are_found_in_their_shard(dataset: Dataset) -> None:
    """In = out + quarantined holds in total here, but in no shard."""
    manifest = dataset.manifest()
    other = "train-000001"
    more = manifest.packs[SHARD].model_copy(update={"refused": {"no_face": 1}})
    recommit(
        dataset,
        packs={**manifest.packs, SHARD: more},
        shards={SHARD: 2, other: 2},
        clips=dataset.put_rows(
            ClipRow, [*dataset.clips(), replace(dataset.clips()[0], key="x", shard=other, state="quarantined")]
        ),
        quarantine=dataset.put_rows(QuarantineRow, [refusal("x", other)]),
    )
    problems = verify(dataset.uri, full=False).problems
    assert f"{SHARD}: 2 clips in, 2 packed, 1 quarantined" in problems
    assert f"{other}: 2 clips in, 1 packed, 0 quarantined" in problems


def test_a_clip_that_waits_for_its_shard_is_no_problem(dataset: Dataset) -> None:
    rows = dataset.clips()
    waiting = replace(rows[0], key="later", shard="train-000002", state="pending", frames=0)
    recommit(
        dataset,
        clips=dataset.put_rows(ClipRow, [*rows, waiting]),
        shards={**dataset.manifest().shards, "train-000002": 1},
    )
    assert verify(dataset.uri).problems == []


def test_a_shard_that_the_index_does_not_know_is_found(dataset: Dataset) -> None:
    index = dataset.index()
    recommit(dataset, index=dataset.put_index(index.model_copy(update={"shards": index.shards[:1]})))
    assert f"{index.shards[1].name}: not in the index" in verify(dataset.uri, full=False).problems


@pytest.mark.parametrize("command", ["verify", "status", "quarantine", "gc"])
def test_no_dataset_is_one_line(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "no dataset here" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def header(name: str, **changes: Any) -> bytes:
    info = tarfile.TarInfo(name)
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (header("s0c0.mel.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'s0c0.mel.npy' is no plain file"),
        (header("s0c0.mel.npy", type=tarfile.LNKTYPE, linkname="s0c1.mel.npy"), "'s0c0.mel.npy' is no plain file"),
        (header("s0c0", type=tarfile.DIRTYPE), "'s0c0' is no plain file"),
        (header("fifo", type=tarfile.FIFOTYPE), "'fifo' is no plain file"),
        (header("../../escaped.mel.npy"), "unsafe member name '../../escaped.mel.npy'"),
        (header("/tmp/escaped.mel.npy"), "unsafe member name '/tmp/escaped.mel.npy'"),
        (header("s0c0.mel.npy", size=1 << 33), "'s0c0.mel.npy' claims 8589934592 bytes"),
        (header("s0c0.mel.npy", size=1 << 30), "s0c0.mel.npy: data is cut"),
        (header("ghost.mel.npy"), "ghost.mel.npy: not in the index"),
        (header("a\nb\x1b.npy"), "a\\nb\\x1b.npy: not in the index"),
    ],
)
def test_hostile_archives_are_named_and_not_obeyed(
    dataset: Dataset, member: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where index and manifest vouch for the bytes."""
    reshard(dataset, member + shard_path(dataset).read_bytes()[:2048] + bytes(1024))
    before = set(Path(dataset.uri).parent.rglob("*"))
    capsys.readouterr()
    tracemalloc.start()
    try:
        lines = checked(dataset, capsys)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    name = f"train/{shard_path(dataset).name}"
    assert any(line.startswith(name) and words in line for line in lines)
    assert peak < 64 << 20
    assert set(Path(dataset.uri).parent.rglob("*")) == before


def test_a_doubled_member_is_found(dataset: Dataset) -> None:
    data = shard_path(dataset).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        second = archive.getmembers()[1].offset
    reshard(dataset, data[:second] + data)
    problems = verify(dataset.uri).problems
    assert any("twice in the archive" in line for line in problems)
    assert any("the index says" in line for line in problems)


def test_damage_in_one_place_does_not_hide_another(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Path(dataset.uri) / column_path(dataset)
    broken.unlink()
    broken.mkdir()  # opening it is an error of the machine, as a bad disk would give
    os.truncate(shard_path(dataset), 100)
    shard_path(dataset, 1).unlink()
    lines = "\n".join(checked(dataset, capsys))
    for name in (broken.name, shard_path(dataset).name, shard_path(dataset, 1).name):
        assert name in lines
