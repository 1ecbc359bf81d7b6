"""From a folder tree, an LRS3 or LRS2 tree, or a CSV/Parquet table to a list of clips."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

from pipeline.digests import Known, Read, with_digests
from pipeline.stage import Clip
from pipeline.tree import MEDIA, Tree
from shards.config import Config
from shards.errors import UserError
from shards.storage import is_remote, local_path, open_uri

Layout = Literal["auto", "folder", "lrs3", "lrs2", "table"]

SPLITS = {
    "train": "train",
    "pretrain": "train",
    "trainval": "train",
    "valid": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
COLUMNS = ("uri", "key", "split", "speaker", "text", "start", "end")
MAX_KEY = 76
"""Keys this long still leave room for every field's ending in a plain tar header."""


class SourceConfig(Config):
    """Where clips come from.

    Attributes:
        layout: `auto` looks at the tree; see `list_clips`.
        valid_ids: file with one clip id a line (`trainval/<video>/<clip>`); these clips become split `valid`. LRS3
            ships no validation split: the AV-HuBERT preparation publishes the customary list.
    """

    layout: Layout = "auto"
    valid_ids: Path | None = None


@dataclass(frozen=True)
class Source:
    """The clips of a source and how its layout was read; `notes` are lines for the user."""

    clips: list[Clip]
    layout: str
    notes: list[str]


def list_clips(uri: str, config: SourceConfig, known: Known | None = None, read: Read | None = None) -> Source:
    """List the clips of a source, with the sha256 of each media file, ordered by key.

    Layouts:
        folder: every media file below the folder. The first folder names the split where it is one of `train`,
            `valid`, `test` ... (else `train`), the folder that holds the file names the speaker, and a `.txt` beside
            the file is its text.
        lrs3: `pretrain/`, `trainval/` and `test/` with `<video>/<clip>.mp4` and LRS text files.
        lrs2: `main/<video>/<clip>.mp4` with the lists `train.txt`, `val.txt`, `test.txt` (and `pretrain/` with
            `pretrain.txt`) beside it.
        table: CSV or Parquet with `uri` and any of `key`, `split`, `speaker`, `text`, `start`, `end`; relative uris
            are relative to the table.

    Args:
        uri: a folder or table, on disk or in a bucket.
        known: digests of media that need not be read again.
        read: reads the other media; None for this process.

    Raises:
        UserError: the source is missing or empty, a list or table is malformed, or two clips share a key.
    """
    tree = Tree(uri)
    layout = tree.layout() if config.layout == "auto" else config.layout
    if tree.is_file and PurePosixPath(uri).suffix.lower() in MEDIA:
        raise UserError(f"source {uri}: is one video; name the folder that holds it, or a table with the column uri")
    if (layout == "table") != tree.is_file:
        raise UserError(f"source {uri}: layout {layout} needs a {'file' if layout == 'table' else 'folder'}")
    notes: list[str] = []
    if layout == "table":
        clips = list(_table(uri, notes))
    elif layout == "lrs2":
        clips = list(_lrs2(tree))
    else:
        clips = list(_tree(tree))
    if not clips:
        raise UserError(f"source {uri}: no clips found (layout {layout}; media endings {' '.join(sorted(MEDIA))})")
    clips = _hold_out(clips, config.valid_ids)
    refuse_duplicates(clips)
    clips.sort(key=lambda clip: clip.key)
    objects = {tree.uri(name): found for name, found in tree.objects.items()}
    return Source(with_digests(clips, objects, known or {}, read), layout, notes)


def safe_key(name: str) -> str:
    """A name as a WebDataset key: `/` stays, whatever else is not `A-Za-z0-9_-` is percent-encoded, so dots, spaces
    and unicode survive and can be read back with `urllib.parse.unquote`.

    Raises:
        UserError: empty, or too long for a tar member name.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name!a}: file name is not UTF-8; rename it") from None
    key = quote(name, safe="/").replace(".", "%2E").replace("~", "%7E").strip("/")
    if not key or "//" in key:
        raise UserError(f"key {name!r}: empty key or empty part")
    if len(key) > MAX_KEY:
        raise UserError(
            f"key {name!r}: {len(key)} characters when encoded, at most {MAX_KEY}; give shorter keys in a table"
        )
    return key


def _tree(tree: Tree) -> Iterator[Clip]:
    """Folder and LRS3 trees: both say the split first and the speaker last."""
    for name in tree.media():
        parts = name.split("/")
        split = SPLITS.get(parts[0], "train") if len(parts) > 1 else "train"
        speaker = parts[-2] if len(parts) > 1 and parts[-2] not in SPLITS else ""
        key = safe_key(str(PurePosixPath(name).with_suffix("")))
        yield Clip(key, tree.uri(name), "", split, speaker, tree.text(name))


def _lrs2(tree: Tree) -> Iterator[Clip]:
    for listing, folder, split in (
        ("pretrain.txt", "pretrain", "train"),
        ("train.txt", "main", "train"),
        ("val.txt", "main", "valid"),
        ("test.txt", "main", "test"),
    ):
        if listing not in tree:
            continue
        for number, line in enumerate(_lines(tree.uri(listing)), 1):
            # The test list carries a second word per line (the kind of programme).
            words = line.split()
            if not words:
                continue
            if words[0].count("/") != 1 or ".." in words[0]:
                raise UserError(f"{tree.uri(listing)}, line {number}: expected <video>/<clip>, found {words[0]!r}")
            name = f"{folder}/{words[0]}.mp4"
            speaker = words[0].split("/")[0]
            yield Clip(safe_key(f"{folder}/{words[0]}"), tree.uri(name), "", split, speaker, tree.text(name))


def _table(table: str, notes: list[str]) -> Iterator[Clip]:
    path = table if is_remote(table) else str(local_path(table).absolute())
    rows = _read_table(path)
    unused = sorted({str(column) for row in rows for column in row if column not in COLUMNS})
    if unused:
        notes.append(f"columns not used: {', '.join(unused)}")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        uri = str(row.get("uri") or "").strip()
        if not uri:
            raise UserError(f"{where}: uri is empty; every row needs one")
        if is_remote(uri):
            open_uri(uri)  # refuses credentials in it
        media = uri if is_remote(uri) else str(local_path(uri))
        if not is_remote(uri) and not media.startswith("/"):
            media = f"{path.rpartition('/')[0]}/{PurePosixPath(media)}"
        start, end = _seconds(row, "start", where), _seconds(row, "end", where)
        if start is not None and end is not None and end <= start:
            raise UserError(f"{where}: end {end} is not after start {start}")
        if not Path(uri).name or "\0" in uri:
            raise UserError(f"{where}: uri {uri!r} names no file")
        key = str(row.get("key") or Path(uri).with_suffix("").as_posix().lstrip("./"))
        split = str(row.get("split") or "train")
        if not re.fullmatch(r"[A-Za-z0-9_]{1,32}", split):
            raise UserError(f"{where}: split {split!r} must be up to 32 letters, digits and _")
        text, speaker = str(row.get("text") or ""), str(row.get("speaker") or "")
        yield Clip(safe_key(key), media, "", SPLITS.get(split, split), speaker, text, start, end)


def _read_table(path: str) -> list[dict[str, Any]]:
    store, name = open_uri(path)
    try:
        data = store.read(name)
        if name.lower().endswith((".parquet", ".pq")):
            import pyarrow.parquet as pq

            rows = pq.ParquetFile(BytesIO(data), pre_buffer=False).read(use_threads=False).to_pylist()
            header = list(rows[0]) if rows else ["uri"]
        else:
            reader = csv.DictReader(StringIO(data.decode("utf-8-sig"), newline=""))
            rows, header = list(reader), list(reader.fieldnames or [])
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"source {path}: no readable CSV or Parquet table, and no folder ({error})") from None
    if "uri" not in header:
        raise UserError(f"source {path}: no column `uri`; columns are {', '.join(map(str, header))}")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise UserError(f"{path}, row {number}: more values than columns")
    return rows


def _seconds(row: dict[str, Any], column: str, where: str) -> float | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise UserError(f"{where}: {column} is {value!r}, expected seconds")
    return seconds


def _lines(listing: str) -> list[str]:
    store, name = open_uri(listing)
    try:
        return store.read(name).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list {listing}: cannot be read as text ({error})") from None


def _hold_out(clips: list[Clip], listing: Path | None) -> list[Clip]:
    if listing is None:
        return clips
    ids = {safe_key(line.strip()) for line in _lines(str(listing)) if line.strip()}
    missing = ids - {clip.key for clip in clips}
    if missing:
        raise UserError(f"source.valid_ids {listing}: {len(missing)} ids are not in the source, e.g. {min(missing)!r}")
    return [replace(clip, split="valid") if clip.key in ids else clip for clip in clips]


def refuse_duplicates(clips: list[Clip]) -> None:
    """Raises UserError: two clips share a key."""
    seen: dict[str, str] = {}
    for clip in clips:
        if clip.key in seen:
            raise UserError(f"key {clip.key!r} names two clips: {seen[clip.key]} and {clip.uri}")
        seen[clip.key] = clip.uri
