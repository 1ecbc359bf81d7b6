"""Packed shards hold lips as JPEG or as plain arrays: the same pixels for every reader, and no stage runs for that."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from cli.main import main
from pipeline.build import Summary, build
from pipeline.columns import load_column
from pipeline.pack import PackTask, pack_shard
from pipeline.selection import Selection
from pipeline.stage import Clip
from shards.codec import decode, encode
from shards.dataset import Dataset
from shards.errors import UserError
from shards.export import export
from shards.reader import read_fields
from shards.schema import stored
from shards.verify import verify
from tests.conftest import small_build
from tests.toy import everything, toy_dataset

LENGTHS = [[14, 20], [13]]
Built = tuple[Dataset, Summary]


def stamps(dataset: Dataset, *folders: str) -> dict[str, str]:
    return {found.name: found.stamp for folder in folders for found in dataset.store.list(folder)}


def samples(dataset: Dataset) -> dict[str, dict[str, object]]:
    """What plain webdataset makes of the packed shards."""
    urls = [f"{dataset.uri}/{shard.name}" for shard in dataset.index().shards]
    return {sample["__key__"]: sample for sample in wds.WebDataset(urls, shardshuffle=False).decode()}


def assert_same(one: Dataset, other: Dataset) -> None:
    theirs = everything(other)
    ours = everything(one)
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        for name, value in values.items():
            np.testing.assert_array_equal(value, theirs[key][name], err_msg=f"{key} {name}")


def test_switching_repacks_and_runs_no_stage(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = built[0]
    dataset = Dataset(str(shutil.copytree(before.uri, tmp_path / "raw")))
    kept = stamps(dataset, "columns/", "codebooks/")
    total = len(dataset.index().shards)
    assert total > 1

    assert main(["plan", dataset.uri, "--set", "pack.lips=npy", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {cell["state"] for row in plan["stages"].values() for cell in row.values()} == {"fresh"}
    assert plan["pack_why"] == dict.fromkeys(plan["pack"], "lips jpg -> npy")

    config = small_build(pack={"shard_clips": 6, "lips": "npy"})
    summary = build(None, dataset.uri, config, Selection(shards="train:0"))
    assert (summary.tasks, summary.packed) == (0, 1)
    assert [shard.raw for shard in dataset.index().shards].count(["lips"]) == 1
    assert_same(dataset, before)  # both kinds side by side
    capsys.readouterr()
    assert main(["status", dataset.uri]) == 0
    assert f"lips: as npy in 1 of {total} packed shards" in capsys.readouterr().out
    assert main(["plan", dataset.uri]) == 0
    assert f"  pack: lips jpg -> npy, {total - 1} shard" in capsys.readouterr().out

    summary = build(None, dataset.uri, config)
    assert (summary.tasks, summary.packed) == (0, total - 1)
    assert stamps(dataset, "columns/", "codebooks/") == kept
    assert verify(dataset.uri).problems == []
    assert_same(dataset, before)
    size = sum(shard.bytes for shard in dataset.index().shards)
    assert 0.8 * size < plan["estimate"]["packed"] < 1.2 * size

    ours, theirs = samples(dataset), samples(before)
    assert ours.keys() == theirs.keys()
    for key, sample in ours.items():
        lips, strip = sample.pop("lips.npy"), Image.open(io.BytesIO(theirs[key].pop("lips.jpg")))  # type: ignore[arg-type]
        assert isinstance(lips, np.ndarray)
        assert lips.dtype == np.uint8
        np.testing.assert_array_equal(lips, np.asarray(strip).reshape(-1, 96, 96))
        assert sample.keys() == theirs[key].keys()

    assert main(["plan", dataset.uri, "--set", "pack.lips=jpg"]) == 0
    assert f"  pack: lips npy -> jpg, {total} shards" in capsys.readouterr().out


def test_a_dataset_from_before_the_choice_is_up_to_date(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Dataset(str(shutil.copytree(built[0].uri, tmp_path / "old")))
    index = json.loads(dataset.store.read(dataset.manifest().index.name))
    manifest = json.loads(dataset.store.read("dataset.json"))
    del manifest["config"]["pack"]["lips"]
    for entry in [*index["shards"], *manifest["packs"].values()]:
        assert entry.pop("raw") == []
    data = json.dumps(index).encode()
    digest = hashlib.sha256(data).hexdigest()
    manifest["index"] = {"name": f"train/index-{digest[:12]}.json", "sha256": digest, "bytes": len(data)}
    for name in (manifest["index"]["name"], "train/index.json"):
        dataset.store.write(name, data)
    dataset.store.write("dataset.json", json.dumps(manifest).encode())
    assert main(["plan", dataset.uri]) == 0
    assert "nothing to do: every column and shard is there already" in capsys.readouterr().out
    assert verify(dataset.uri, full=False).problems == []
    assert_same(dataset, built[0])


def test_a_damaged_column_is_named(built: Built, tmp_path: Path) -> None:
    """Plain copying of its bytes would not notice."""
    dataset = Dataset(str(shutil.copytree(built[0].uri, tmp_path / "copy")))
    shard, refs = "train-000000", dataset.manifest().columns
    loaded = [load_column(dataset, stage, shard, refs[stage][shard].fingerprint) for stage in refs]
    columns = [column for column in loaded if column]
    lips = next(column for column in columns if column.task.stage == "lips")
    key = min(lips.clips)
    data = bytearray(dataset.store.read(lips.tar))
    data[lips.clips[key].members["lips"][0]] ^= 1
    dataset.store.write(lips.tar, bytes(data))
    clips = [Clip(row.key, row.uri, row.digest) for row in dataset.clips() if row.shard == shard]
    reads = {column.task.stage: column.task.fingerprint for column in columns}
    task = PackTask(shard=shard, inputs="0" * 16, reads=reads, recipes={}, behind=(), fields=("lips",), raw=("lips",))
    with pytest.raises(UserError, match=rf"{lips.tar}: {key}: not a JPEG file; run `f2v verify`"):
        pack_shard(dataset, task, columns, clips)


@pytest.fixture
def raw(tmp_path: Path) -> Dataset:
    return toy_dataset(tmp_path / "raw", LENGTHS, raw=True)


def reshard(dataset: Dataset, data: bytes) -> None:
    """Other bytes for the first shard, with index and manifest that vouch for them."""
    (manifest, version), index = dataset.current(), dataset.index()
    assert manifest is not None
    first = index.shards[0]
    dataset.store.write(first.name, data)
    digest = {"sha256": hashlib.sha256(data).hexdigest()}
    index = index.model_copy(update={"shards": [first.model_copy(update=digest), *index.shards[1:]]})
    packs = {**manifest.packs, first.shard: manifest.packs[first.shard].model_copy(update=digest)}
    manifest = manifest.model_copy(update={"packs": packs, "index": dataset.put_index(index)})
    dataset.commit(manifest, version)
    dataset.refresh_copies(manifest)


def test_verify_finds_a_changed_pixel(raw: Dataset) -> None:
    assert verify(raw.uri).problems == []
    shard = raw.index().shards[0]
    offset, size = shard.clips[1].members["lips"]
    data = bytearray(raw.store.read(shard.name))
    data[offset + size // 2] ^= 1
    raw.store.write(shard.name, bytes(data))
    assert verify(raw.uri).problems == [f"{shard.name}: sha256 differs from the manifest; delete it and build again"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"'|u1'", b"'|i1'", "s0c1: lips: dtype int8, expected uint8"),
        (b"(20, 96, 96)", b"(40, 48, 96)", r"s0c1: lips: shape (40, 48, 96), expected ('F', 96, 96) with F = 20"),
        (b"(20, 96, 96)", b"(21, 96, 96)", "s0c1: lips: damaged npy (lips: npy header says (21, 96, 96)"),
        (b"\x93NUMPY", b"\xff\xd8\xff\xe0JF", "s0c1: lips: damaged npy"),
    ],
)
def test_verify_finds_values_that_checksums_vouch_for(raw: Dataset, old: bytes, new: bytes, words: str) -> None:
    shard = raw.index().shards[0]
    offset, size = shard.clips[1].members["lips"]
    data = raw.store.read(shard.name)
    member = data[offset : offset + size]
    assert member.count(old) == 1
    reshard(raw, data[:offset] + member.replace(old, new) + data[offset + size :])
    (problem,) = verify(raw.uri).problems
    assert words in problem


def test_verify_finds_an_index_that_says_otherwise(raw: Dataset) -> None:
    manifest, version = raw.current()
    assert manifest is not None
    index = raw.index()
    wrong = [shard.model_copy(update={"raw": []}) for shard in index.shards]
    ref = raw.put_index(index.model_copy(update={"shards": wrong}))
    raw.commit(manifest.model_copy(update={"index": ref}), version)
    problems = verify(raw.uri).problems
    for shard in wrong:
        assert f"{shard.name}: index and manifest disagree" in problems
        assert f"{shard.name}: {shard.clips[0].key}.lips.npy: not in the index" in problems


def test_readers_give_the_same_frames(raw: Dataset, tmp_path: Path) -> None:
    jpg = toy_dataset(tmp_path / "jpg", LENGTHS)
    assert_same(raw, jpg)
    for one, other in zip(raw.index().shards, jpg.index().shards, strict=True):
        whole = read_fields(raw, one, one.clips[0], ["lips"])["lips"]
        parts = []
        for dataset, shard in ((raw, one), (jpg, other)):
            (member,) = dataset.store.read_ranges(shard.name, [shard.clips[0].members["lips"]])
            parts.append(decode(stored("lips", shard.raw), member, len(whole), 3, 9))
        np.testing.assert_array_equal(parts[0], whole[3:9])
        np.testing.assert_array_equal(parts[1], whole[3:9])


def test_exports_hold_them_as_they_are(raw: Dataset, tmp_path: Path) -> None:
    listing = export(raw.uri, str(tmp_path / "plain"), ["mel", "lips"])
    assert [shard.raw for shard in listing.shards] == [["lips"], ["lips"]]
    urls = [str(tmp_path / "plain" / shard.name) for shard in listing.shards]
    values = everything(raw)
    for sample in wds.WebDataset(urls, shardshuffle=False).decode():
        assert {name for name in sample if not name.startswith("__")} == {"mel.npy", "lips.npy"}
        np.testing.assert_array_equal(sample["lips.npy"], values.pop(sample["__key__"])["lips"])
    assert not values


def test_pictures_alone_can_be_raw() -> None:
    """A list that names other fields changes nothing about them."""
    assert stored("mel", ["mel"]).suffix == "mel.npy"
    assert stored("wav", ["wav"]).encoding == "wav"
    assert stored("lips", []).suffix == "lips.jpg"
    frames = np.arange(2 * 96 * 96, dtype=np.uint8).reshape(2, 96, 96)
    assert np.array_equal(np.load(io.BytesIO(encode(stored("lips", ["lips"]), frames)), allow_pickle=False), frames)
