"""Sources: every layout gives the clips a user would expect, and mistakes are named."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.assign import assign_shards
from pipeline.sources import SourceConfig, list_clips, safe_key
from pipeline.stage import Clip
from shards.dataset import ClipRow
from shards.errors import UserError


def touch(path: Path, data: bytes = b"media") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def rows(root: Path, **settings: object) -> dict[str, tuple[str, str, str]]:
    found = list_clips(str(root), SourceConfig.model_validate(settings))
    return {clip.key: (clip.split, clip.speaker, clip.text) for clip in found.clips}


def test_folder_tree(tmp_path: Path) -> None:
    touch(tmp_path / "train/anna/one.mp4")
    touch(tmp_path / "train/anna/one.txt", b"hello  there\n")
    touch(tmp_path / "val/ben/two.v1.MOV")
    touch(tmp_path / "loose.webm")
    touch(tmp_path / "notes.pdf")
    touch(tmp_path / ".hidden/x.mp4")
    assert rows(tmp_path) == {
        "loose": ("train", "", ""),
        "train/anna/one": ("train", "anna", "hello there"),
        "val/ben/two%2Ev1": ("valid", "ben", ""),
    }


def test_lrs3_tree_with_a_validation_list(tmp_path: Path) -> None:
    for name in ("pretrain/vid1/00001", "trainval/vid2/50001", "trainval/vid2/50002", "test/vid3/00001"):
        touch(tmp_path / f"{name}.mp4")
        touch(tmp_path / f"{name}.txt", b"Text:  SO THAT IS IT \nConf:  3\n\nWORD START END ASDSCORE\nSO 0.1 0.2 3\n")
    ids = touch(tmp_path / "valid.id", b"trainval/vid2/50002\n")
    assert list_clips(str(tmp_path), SourceConfig()).layout == "lrs3"
    assert rows(tmp_path, valid_ids=ids) == {
        "pretrain/vid1/00001": ("train", "vid1", "SO THAT IS IT"),
        "test/vid3/00001": ("test", "vid3", "SO THAT IS IT"),
        "trainval/vid2/50001": ("train", "vid2", "SO THAT IS IT"),
        "trainval/vid2/50002": ("valid", "vid2", "SO THAT IS IT"),
    }
    touch(ids, b"trainval/vid9/1\n")
    with pytest.raises(UserError, match="vid9"):
        rows(tmp_path, valid_ids=ids)


def test_lrs2_tree(tmp_path: Path) -> None:
    touch(tmp_path / "main/5535/00001.mp4")
    touch(tmp_path / "main/5535/00002.mp4")
    touch(tmp_path / "main/6330/00003.mp4")
    touch(tmp_path / "train.txt", b"5535/00001\n")
    touch(tmp_path / "val.txt", b"5535/00002\n")
    touch(tmp_path / "test.txt", b"6330/00003 NF\n")
    assert {key: row[:2] for key, row in rows(tmp_path).items()} == {
        "main/5535/00001": ("train", "5535"),
        "main/5535/00002": ("valid", "5535"),
        "main/6330/00003": ("test", "6330"),
    }


def test_tables(tmp_path: Path) -> None:
    media = touch(tmp_path / "clips/a.mp4", b"abc")
    csv = touch(
        tmp_path / "list.csv",
        b"uri,key,split,speaker,text,start,end,mood\nclips/a.mp4,k1,val,ann,hi,0.5,2,glad\nclips/a.mp4,,,,,,,\n",
    )
    found = list_clips(str(csv), SourceConfig())
    assert found.notes == ["columns not used: mood"]
    digest, stamp = hashlib.sha256(b"abc").hexdigest(), str(media.stat().st_mtime_ns)
    assert found.clips == [
        Clip("clips/a", str(media), digest, bytes=3, stamp=stamp),
        Clip("k1", str(media), digest, "valid", "ann", "hi", 0.5, 2.0, 3, stamp),
    ]
    parquet = tmp_path / "list.parquet"
    pq.write_table(pa.table({"uri": ["clips/a.mp4"], "start": [1.0], "end": [None]}), parquet)
    assert list_clips(str(parquet), SourceConfig()).clips == [
        Clip("clips/a", str(media), digest, start=1.0, bytes=3, stamp=stamp)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key\na\n", "no column `uri`"),
        ("uri,key\nx.mp4,a\ny.mp4,a\n", "x.mp4 and .*y.mp4"),
        ("uri,start,end\nx.mp4,3,2\n", "row 1.*not after"),
        ("uri,start\nx.mp4,soon\n", "row 1: start is 'soon'"),
        ("uri,start\nx.mp4,nan\n", "row 1: start"),
        ("uri\nx.mp4,1,2\n", "row 1: more values"),
        ("uri,split\n,a\n", "row 1: uri is empty"),
        ("uri\n.\n", "names no file"),
        ("uri\n", "no clips found"),
        ("uri,split\nx.mp4,../a\n", "split"),
        ("uri\ns3://bucket/x.mp4\n", "s3://"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    table = touch(tmp_path / "list.csv", text.encode())
    with pytest.raises(UserError, match=message):
        list_clips(str(table), SourceConfig())


def test_links_pipes_and_names(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    touch(elsewhere / "ann/a.mp4")
    source = tmp_path / "source"
    touch(source / "b.mp4")
    (source / "train").symlink_to(elsewhere)
    (source / "loop").symlink_to(source)
    os.mkfifo(source / "pipe.mp4")
    found = {clip.key: clip.digest for clip in list_clips(str(source), SourceConfig()).clips}
    assert set(found) == {"b", "pipe", "train/ann/a"}
    assert found["pipe"] == ""
    (source / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"x")
    with pytest.raises(UserError, match="not UTF-8"):
        list_clips(str(source), SourceConfig())


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        list_clips(str(tmp_path / "none"), SourceConfig())
    with pytest.raises(UserError, match="no clips"):
        list_clips(str(tmp_path), SourceConfig())


@given(st.text(min_size=1, max_size=8))
def test_keys_are_safe_and_can_be_read_back(name: str) -> None:
    try:
        key = safe_key(name)
    except UserError:
        return
    assert "." not in key
    assert key.isascii()
    assert " " not in key
    assert unquote(key) == name.strip("/")


def clips(names: list[str], split: str = "train") -> list[Clip]:
    return [Clip(name, f"{name}.mp4", "", split) for name in names]


def as_rows(shards: dict[str, list[Clip]]) -> list[ClipRow]:
    return [
        ClipRow(clip.key, clip.uri, 0, "", "", clip.split, "", "", None, None, 1, shard, "packed")
        for shard, members in shards.items()
        for clip in members
    ]


@given(st.sets(st.integers(0, 99), min_size=1), st.sets(st.integers(100, 150)), st.integers(1, 7))
def test_shards_hold_every_clip_once_and_keep_their_members(old: set[int], new: set[int], size: int) -> None:
    before = assign_shards(clips([f"k{n}" for n in old]), size, [])
    assert sorted(clip.key for members in before.values() for clip in members) == sorted(f"k{n}" for n in old)
    assert max(map(len, before.values())) <= size
    after = assign_shards(clips([f"k{n}" for n in old | new]), size, as_rows(before))
    assert {name: members for name, members in after.items() if name in before} == before
    assert sorted(clip.key for members in after.values() for clip in members) == sorted(f"k{n}" for n in old | new)
