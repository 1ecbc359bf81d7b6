"""`export` gives others plain tars with the chosen fields, and never half of them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.main import main
from shards.dataset import Dataset
from shards.errors import UserError
from shards.export import export
from shards.manifest import Index
from shards.schema import FIELDS
from shards.storage import StorageError
from tests.toy import toy_dataset, toy_values

LENGTHS = [[14, 20], [13]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("ds"), LENGTHS)


def with_split(dataset: Dataset) -> None:
    """Make the second shard one of split `test`."""
    manifest, version = dataset.current()
    assert manifest is not None
    index = dataset.index()
    other = index.shards[1].model_copy(update={"split": "test", "shard": "test-000000"})
    index = index.model_copy(update={"shards": [index.shards[0], other]})
    dataset.commit(manifest.model_copy(update={"index": dataset.put_index(index)}), version)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_three_lines_of_webdataset_read_the_chosen_fields(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "plain"
    assert main(["export", dataset.uri, str(target), "--fields", "wav,meta,mel,lips"]) == 0
    line = capsys.readouterr().out
    assert "2 tars, 3 clips" in line
    assert "fields wav, meta, mel, lips" in line
    urls = sorted(str(path) for path in target.glob("*.tar"))
    assert [Path(url).name for url in urls] == ["train-000000.tar", "train-000001.tar"]
    samples = {sample["__key__"]: sample for sample in wds.WebDataset(urls, shardshuffle=False).decode("rgb8")}
    assert set(samples) == {"s0c0", "s0c1", "s1c0"}
    sample, values = samples["s0c1"], toy_values("s0c1", 20)
    assert {name for name in sample if not name.startswith("__")} == {"json", "mel.npy", "lips.jpg", "wav"}
    np.testing.assert_array_equal(sample["mel.npy"], values["mel"])
    assert sample["json"] == values["meta"]
    assert sample["lips.jpg"].shape[:2] == (20 * 96, 96)


@settings(max_examples=20, deadline=None)
@given(fields=st.lists(st.sampled_from(list(FIELDS)), min_size=1, max_size=5))
def test_any_choice_gives_the_stored_bytes_of_exactly_these_fields(
    dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, fields: list[str]
) -> None:
    """In any order, and however often a field is named."""
    target = tmp_path_factory.mktemp("choice")
    listing = export(dataset.uri, str(target), fields)
    assert listing.fields == list(dict.fromkeys(fields))
    for shard, done in zip(dataset.index().shards, listing.shards, strict=True):
        stored = dataset.store.read(shard.name)
        expected = {
            f"{clip.key}.{FIELDS[name].suffix}": stored[clip.members[name][0] :][: clip.members[name][1]]
            for clip in shard.clips
            for name in fields
        }
        data = (target / done.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (done.bytes, done.sha256)
        with tarfile.open(target / done.name) as archive:
            found = {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]
            assert len(archive.getmembers()) == len(expected)
        assert found == expected


def test_the_listing_names_every_tar(dataset: Dataset, tmp_path: Path) -> None:
    export(dataset.uri, str(tmp_path / "plain"), ["mel"])
    found = contents(tmp_path / "plain")
    listing = json.loads(found.pop("shards.json"))
    assert listing["fields"] == ["mel"]
    assert {shard["name"]: (shard["split"], shard["clips"], shard["sha256"]) for shard in listing["shards"]} == {
        name: ("train", clips, hashlib.sha256(data).hexdigest())
        for (name, data), clips in zip(sorted(found.items()), (2, 1), strict=True)
    }


def test_the_same_choice_gives_the_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    """Anywhere, at any time, in any order; and from a dataset that was built elsewhere."""
    export(dataset.uri, str(tmp_path / "one"), ["mel", "wav"])
    export(toy_dataset(tmp_path / "again", LENGTHS).uri, f"file://{tmp_path}/two", ["mel", "wav"])
    export(dataset.uri, str(tmp_path / "three"), ["wav", "mel"])
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one.pop("shards.json") != three.pop("shards.json")  # it keeps the order that was asked for
    assert one == three


def test_splits_are_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = toy_dataset(tmp_path / "ds", LENGTHS)
    with_split(dataset)
    assert main(["export", dataset.uri, str(tmp_path / "test"), "--fields", "mel", "--split", "test"]) == 0
    assert set(contents(tmp_path / "test")) == {"test-000000.tar", "shards.json"}
    both = ["--split", "test", "--split", "train", "--json"]
    capsys.readouterr()
    assert main(["export", dataset.uri, str(tmp_path / "both"), "--fields", "mel", *both]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [shard["split"] for shard in printed["shards"]] == ["train", "test"]
    assert set(contents(tmp_path / "both")) == {"train-000000.tar", "test-000000.tar", "shards.json"}


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ("mel,nose", [], "no field 'nose' in these shards; choose from meta, boxes"),
        ("mel,voice", [], "no field 'voice'"),
        (",", [], "no fields; choose from"),
        ("mel", ["--split", "validation"], "no clips in split 'validation'; there are train"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(
    dataset: Dataset, tmp_path: Path, fields: str, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "plain"
    assert main(["export", dataset.uri, str(target), "--fields", fields, *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not target.exists()


def test_a_field_that_was_not_packed_is_refused(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path / "ds", LENGTHS)
    manifest, version = dataset.current()
    assert manifest is not None
    index: Index = dataset.index().model_copy(update={"fields": ["meta", "mel"]})
    dataset.commit(manifest.model_copy(update={"index": dataset.put_index(index)}), version)
    with pytest.raises(UserError, match="no field 'lips' in these shards; choose from meta, mel"):
        export(dataset.uri, str(tmp_path / "plain"), ["lips"])


@pytest.mark.parametrize("name", ["shards.json", "train-000009.tar", "deep/er/notes.txt", ".hidden"])
def test_a_target_that_holds_something_is_refused(
    dataset: Dataset, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    assert main(["export", dataset.uri, str(tmp_path), "--fields", "mel"]) == 2
    assert f"holds {name}; name a new or empty place" in capsys.readouterr().err
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("below", ["", "/plain", "/train/plain/", "/train/../plain"])
def test_a_target_inside_the_dataset_is_refused(dataset: Dataset, below: str) -> None:
    before = contents(Path(dataset.uri))
    with pytest.raises(UserError, match=r"inside the dataset|holds"):
        export(dataset.uri, f"{dataset.uri}{below}", ["mel"])
    assert contents(Path(dataset.uri)) == before


def test_a_target_beside_the_dataset_with_a_longer_name_is_fine(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path / "ds", [[2]])
    assert export(dataset.uri, f"{dataset.uri}-plain", ["mel"]).shards


def test_relative_paths_are_taken_as_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = toy_dataset(tmp_path / "ds", [[2]])
    monkeypatch.chdir(dataset.uri)
    assert export(".", "../plain", ["mel"]).shards
    assert set(contents(tmp_path / "plain")) == {"train-000000.tar", "shards.json"}
    (tmp_path / "link").symlink_to(dataset.uri)
    with pytest.raises(UserError, match="inside the dataset"):
        export(".", str(tmp_path / "link" / "plain"), ["mel"])


def test_a_file_in_place_of_the_target_is_one_line(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["export", dataset.uri, str(tmp_path / "file"), "--fields", "mel"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


class Stop(BaseException):
    """What a kill or Ctrl-C is to the code."""


@pytest.mark.parametrize("reads", [0, 1, 2])
@pytest.mark.parametrize("fault", [Stop, StorageError])
def test_an_interrupted_export_says_so_by_its_missing_list(
    dataset: Dataset, tmp_path: Path, reads: int, fault: type[BaseException]
) -> None:
    kind = type(dataset.store)
    honest, left = kind.read_ranges, [reads]

    def breaks(store: Any, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        left[0] -= 1
        if left[0] < 0:
            raise fault
        return honest(store, name, ranges)

    with patch.object(kind, "read_ranges", breaks), pytest.raises(fault):
        export(dataset.uri, str(tmp_path / "plain"), ["mel"])
    found = contents(tmp_path / "plain")
    # Only whole tars have their names, and nothing is left of the one that was being written.
    assert set(found) == ({"train-000000.tar"} if reads == 2 else set())
    export(dataset.uri, str(tmp_path / "again"), ["mel"])
    assert found.items() <= contents(tmp_path / "again").items()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_dataset_is_one_line_and_no_list(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = toy_dataset(tmp_path / "ds", LENGTHS)
    path = dataset.store.path(dataset.index().shards[1].name)
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:600])
    assert main(["export", dataset.uri, str(tmp_path / "plain"), "--fields", "mel"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert path.name in error[-1]
    assert not (tmp_path / "plain" / "shards.json").exists()


def test_a_dataset_without_clips_gives_an_empty_list(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path / "ds", [])
    assert export(dataset.uri, str(tmp_path / "plain"), ["mel"]).shards == []
    assert set(contents(tmp_path / "plain")) == {"shards.json"}
