"""The examples of docs/reading.md, run as they stand on a dataset in which a shard was replaced."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from shards.dataset import Dataset
from shards.strips import encode_strip
from tests.conftest import cluster
from tests.toy import toy_dataset, toy_values

DOCS = Path(__file__).resolve().parent.parent / "docs" / "reading.md"
LENGTHS = {"s0c0": 30, "s0c1": 700, "s1c0": 96, "s1c1": 120, "s1c2": 25}
WEBDATASET, STRIP, BUCKET, RAY, CLIP, STREAM = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with one clip of several columns, and a tar of the same clips that they replaced."""
    folder = tmp_path_factory.mktemp("reading")
    toy_dataset(folder, [[12, 14]])
    toy_dataset(folder, [[30, 700], [96, 120, 25]])
    assert len(list(folder.glob("train/*.tar"))) == 3
    return folder


def run(example: str, dataset: Path | str, watch: str = "pass") -> dict[str, Any]:
    """Names that an example leaves behind. `watch` is run at the end of each turn of its loop over clips."""
    code = example.replace('"DATASET"', repr(str(dataset)))
    assert code != example
    if watch != "pass":
        loop = re.search(r"^(?:    )?for (?:sample|row|step, batch) in .*\n(?: .*\n)+", code, re.M)
        assert loop
        indent = re.search(r"\n( +)", loop[0])
        assert indent
        code = code[: loop.end()] + f"{indent[1]}{watch}\n" + code[loop.end() :]
    names: dict[str, Any] = {"__name__": "__main__", "seen": {}}
    exec(compile(code, str(DOCS), "exec"), names)
    return names


def check_lips(lips: np.ndarray, key: str, start: int = 0, stop: int | None = None) -> None:
    """The toy's frames are flat grey, each another one; JPEG may be off by a little."""
    expected = toy_values(key, LENGTHS[key])["lips"][start:stop].astype(int)
    assert lips.dtype == np.uint8
    assert lips.shape == expected.shape
    assert np.abs(lips - expected).max() <= 2


def test_webdataset(folder: Path) -> None:
    watch = "seen[sample['__key__']] = (sample, units, count, lips, wav)"
    seen = run(WEBDATASET, folder, watch)["seen"]
    assert {key: count for key, (_, _, count, _, _) in seen.items()} == LENGTHS
    for key, (sample, units, count, lips, wav) in seen.items():
        values = toy_values(key, count)
        check_lips(lips, key)
        np.testing.assert_array_equal(units, values["units"])
        np.testing.assert_array_equal(wav, values["wav"])
        np.testing.assert_array_equal(sample["mel.npy"], values["mel"])
        assert sample["json"] == values["meta"]
        members = "json track.json sync.json face.jpg lips.jpg wav boxes.npy points5.npy landmarks.npy identity.npy"
        members += " expression.npy mel.npy pitch.npy energy.npy units.npy timbre.npy features.npy"
        assert {name for name in sample if not name.startswith("__")} == set(members.split())


def test_what_decoders_make_of_members(folder: Path) -> None:
    url = str(folder / Dataset(str(folder)).index().shards[0].name)
    table = re.findall(r"^\| `([\w*]*\.?jpg|wav)` \|", DOCS.read_text(), re.M)
    assert table == ["lips.jpg", "face.jpg", "wav"]
    first = {how: next(iter(wds.WebDataset(url, shardshuffle=False).decode(*how))) for how in [(), ("rgb8",), ("pil",)]}
    assert all(isinstance(first[()][name], bytes) for name in table)
    assert all(isinstance(sample["wav"], bytes) for sample in first.values())
    assert first[("rgb8",)]["lips.jpg"].shape == (30 * 96, 96, 3)
    assert first[("rgb8",)]["face.jpg"].shape == (30 * 112, 112, 3)
    assert (first[("pil",)]["face.jpg"].mode, first[("pil",)]["face.jpg"].size) == ("RGB", (112, 30 * 112))
    torch = next(iter(wds.WebDataset(url, shardshuffle=False).decode("torch")))
    assert tuple(torch["lips.jpg"].shape) == (3, 30 * 96, 96)
    assert float(torch["face.jpg"].max()) <= 1
    assert isinstance(torch["mel.npy"], np.ndarray)


@pytest.mark.parametrize(("member", "side"), [("lips", 96), ("face", 112)])
def test_how_long_a_strip_of_one_column_is(member: str, side: int) -> None:
    said = {"lips": r"Up to (\d+) frames of lips", "face": r"or (\d+) of faces"}[member]
    found = re.search(said, DOCS.read_text().replace("\n", " "))
    assert found
    for count, columns in ((int(found[1]), 1), (int(found[1]) + 1, 2)):
        strip = encode_strip(np.zeros((count, side, side), np.uint8))
        assert Image.open(io.BytesIO(strip)).width == columns * side


def test_lips_stored_as_arrays(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path / "raw", [[30]], raw=True)
    shard = dataset.index().shards[0]
    assert shard.raw == ["lips"]
    sample = next(iter(wds.WebDataset(str(tmp_path / "raw" / shard.name), shardshuffle=False).decode()))
    check_lips(sample["lips.npy"], "s0c0")


def test_strips_by_range(folder: Path) -> None:
    seen = run(STRIP, folder, "seen[sample['__key__']] = (count, lips, face)")["seen"]
    assert seen.keys() == LENGTHS.keys()
    for key, (count, lips, face) in seen.items():
        check_lips(lips, key, count // 2)
        assert face.shape == (1, 112, 112, 3)


def cut_copy(folder: Path, copy: Path, member: str) -> Path:
    """Copy a dataset, cut its second shard off before a member, and return the shard's path."""
    shutil.copytree(folder, copy)
    path = copy / Dataset(str(copy)).index().shards[1].name
    with tarfile.open(path) as tar:
        offset = tar.getmember(member).offset
    path.write_bytes(path.read_bytes()[:offset])
    return path


def test_a_tar_cut_between_clips_is_noticed(folder: Path, tmp_path: Path) -> None:
    path = cut_copy(folder, tmp_path / "cut", "s1c2.boxes.npy")
    assert len(list(wds.WebDataset(str(path), shardshuffle=False))) == 2
    with pytest.raises(AssertionError, match="not read: s1c2"):
        run(WEBDATASET, tmp_path / "cut")


def test_a_tar_cut_inside_a_clip_is_noticed(folder: Path, tmp_path: Path) -> None:
    path = cut_copy(folder, tmp_path / "cut", "s1c2.units.npy")
    assert len(list(wds.WebDataset(str(path), shardshuffle=False))) == 3
    with pytest.raises(KeyError, match="units"):
        run(WEBDATASET, tmp_path / "cut")


def test_a_bucket(s3_uri: str) -> None:
    toy_dataset(s3_uri, [[12]])
    toy_dataset(s3_uri, [[30, 20], [25]])
    try:
        assert run(BUCKET, s3_uri)["keys"] == ["s0c0", "s0c1", "s1c0"]
    finally:
        wds.gopen_schemes.pop("s3", None)


def test_ray_data(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas", reason="Ray Data needs pandas: pip install 'ray[data]'")
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", cluster())
    try:
        seen = run(RAY, folder, "seen[row['__key__']] = row")["seen"]
        cut = cut_copy(folder, tmp_path / "cut", "s1c2.wav")
        last = ray.data.read_webdataset(str(cut), suffixes=["json", "wav"]).take_all()[-1]
    finally:
        ray.shutdown()
    assert last["__key__"] == "s1c2"
    assert last["wav"] is None
    assert seen.keys() == LENGTHS.keys()
    for key, row in seen.items():
        assert row["json"] == toy_values(key, LENGTHS[key])["meta"]
        check_lips(row["lips"], key)
        np.testing.assert_array_equal(row["units.npy"], toy_values(key, LENGTHS[key])["units"])


def test_one_clip(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(CLIP, folder)
    key, values = names["clip"].key, names["values"]
    assert {clip.key: clip.frames for _, clip in names["places"]} == LENGTHS
    check_lips(values["lips"], key)
    expected = toy_values(key, LENGTHS[key])
    for name in ("wav", "mel", "units"):
        np.testing.assert_array_equal(values[name], expected[name])
    frames = LENGTHS[key]
    assert capsys.readouterr().out == f"{key} ({frames}, 96, 96) ({2 * frames}, 80)\n"


def test_training_stream(folder: Path) -> None:
    names = run(STREAM.replace("range(100)", "range(3)"), folder, "seen[step] = (lips.clone(), units.clone())")
    assert list(names["seen"]) == [0, 1, 2]
    for lips, units in names["seen"].values():
        assert (str(lips.dtype), tuple(lips.shape)) == ("torch.float32", (8, 1, 96, 88, 88))
        assert (str(units.dtype), tuple(units.shape)) == ("torch.int64", (8, 192))
        assert bool((units < 11).all())
