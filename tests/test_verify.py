"""`verify` finds every kind of damage, and plain webdataset reads what it passes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from cli.main import main
from shards.dataset import CLIPS, INDEX, ClipRow, Dataset
from shards.verify import verify
from tests.toy import toy_dataset, toy_values


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return toy_dataset(tmp_path / "ds", [[14, 20], [13]])


def shard_path(dataset: Dataset, number: int = 0) -> Path:
    return dataset.store.path(dataset.index().shards[number].name)


def test_a_good_dataset_passes(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = verify(dataset.uri)
    assert (verdict.problems, verdict.shards, verdict.clips) == ([], 2, 3)
    assert main(["verify", dataset.uri]) == 0
    assert "all right" in capsys.readouterr().out


def test_three_lines_of_webdataset_read_it(dataset: Dataset) -> None:
    urls = [str(shard_path(dataset, number)) for number in (0, 1)]
    samples = {sample["__key__"]: sample for sample in wds.WebDataset(urls, shardshuffle=False).decode("rgb8")}
    assert set(samples) == {"s0c0", "s0c1", "s1c0"}
    expected = toy_values("s0c1", 20)
    np.testing.assert_array_equal(samples["s0c1"]["mel.npy"], expected["mel"])
    assert samples["s0c1"]["json"]["frames"] == 20
    assert samples["s0c1"]["face.jpg"].shape == (20 * 112, 112, 3)
    assert samples["s0c1"]["lips.jpg"].shape[:2] == (20 * 96, 96)


def edit_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_damage_is_named_and_exits_non_zero(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    path = shard_path(dataset)
    whole = path.read_bytes()
    clip = dataset.index().shards[0].clips[0]
    offset, size = clip.members["mel"]

    def problems() -> str:
        assert main(["verify", dataset.uri]) == 1
        return capsys.readouterr().out

    edit_byte(path, offset + size - 1)
    assert "sha256" in problems()
    member = offset - 512
    path.write_bytes(whole[:member])  # cut exactly between two members
    text = problems()
    assert "end marker" in text
    assert "members missing" in text
    os.unlink(path)
    assert f"{path.name}: missing" in problems()


def test_values_that_break_the_schema_are_found(dataset: Dataset) -> None:
    """An index that agrees with the bytes does not help values that are wrong."""
    path = shard_path(dataset)
    index = dataset.index()
    clip = index.shards[0].clips[0]
    offset, size = clip.members["mel"]
    data = bytearray(path.read_bytes())
    data[offset + size - 4 : offset + size] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    import hashlib

    shards = [index.shards[0].model_copy(update={"sha256": hashlib.sha256(data).hexdigest()}), *index.shards[1:]]
    dataset.write(INDEX, index.model_copy(update={"shards": shards}))
    assert any("not finite" in problem for problem in verify(dataset.uri).problems)


def test_lost_and_foreign_clips_are_found(dataset: Dataset) -> None:
    rows = dataset.clips()
    dataset.write_rows(CLIPS, ClipRow, rows[1:])
    assert any("s0c0" in problem for problem in verify(dataset.uri).problems)
    ghost = ClipRow("ghost", "", "", "train", "", "", None, None, 0, "train-000000", "quarantined")
    dataset.write_rows(CLIPS, ClipRow, [*rows, ghost])
    assert any("ghost" in problem and "nowhere" in problem for problem in verify(dataset.uri).problems)


@pytest.mark.parametrize("command", ["verify", "status"])
def test_no_dataset_and_foreign_schema_are_one_line(
    dataset: Dataset, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "none")]) == 2
    assert "no dataset here" in capsys.readouterr().err
    file = dataset.store.path("dataset.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 99}))
    assert main([command, dataset.uri]) == 2
    error = capsys.readouterr().err
    assert "schema version 99" in error
    assert len(error.splitlines()) == 1
