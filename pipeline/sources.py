"""From a folder tree, an LRS3 or LRS2 tree, or a CSV/Parquet table to a list of clips."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pipeline.stage import Clip
from shards.config import Config
from shards.errors import UserError
from shards.progress import Progress
from shards.storage import file_sha256, local_path

Layout = Literal["auto", "folder", "lrs3", "lrs2", "table"]

MEDIA = frozenset(
    [
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".ts",
        ".mts",
        ".m2ts",
        ".flv",
        ".ogv",
        ".3gp",
        ".wmv",
        ".asf",
    ],
)
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


def list_clips(uri: str, config: SourceConfig) -> Source:
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

    Raises:
        UserError: the source is missing or empty, a list or table is malformed, or two clips share a key.
    """
    # Workers may run in another folder, so paths are whole from here on.
    root = local_path(uri).absolute()
    if not root.exists():
        raise UserError(f"source {uri}: no such file or folder")
    layout = _detect(root) if config.layout == "auto" else config.layout
    if (layout == "table") != root.is_file():
        raise UserError(f"source {uri}: layout {layout} needs a {'file' if layout == 'table' else 'folder'}")
    notes: list[str] = []
    if layout == "table":
        clips = list(_table(root, notes))
    elif layout == "lrs2":
        clips = list(_lrs2(root))
    else:
        clips = list(_tree(root))
    if not clips:
        raise UserError(f"source {uri}: no clips found (layout {layout}; media endings {' '.join(sorted(MEDIA))})")
    clips = _hold_out(clips, config.valid_ids)
    _refuse_duplicates(clips)
    clips.sort(key=lambda clip: clip.key)
    return Source(_digest(clips), layout, notes)


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


def _detect(root: Path) -> str:
    if root.is_file():
        return "table"
    if (root / "main").is_dir() and (root / "test.txt").is_file():
        return "lrs2"
    if (root / "trainval").is_dir() and (root / "test").is_dir():
        return "lrs3"
    return "folder"


def _tree(root: Path) -> Iterator[Clip]:
    """Folder and LRS3 trees: both say the split first and the speaker last."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"source {error.filename}: cannot be read ({error.strerror})")

    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=unreadable):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:  # a link back up the tree
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() not in MEDIA or name.startswith("."):
                continue
            relative = path.relative_to(root)
            split = SPLITS.get(relative.parts[0], "train") if len(relative.parts) > 1 else "train"
            speaker = relative.parts[-2] if len(relative.parts) > 1 and relative.parts[-2] not in SPLITS else ""
            yield Clip(safe_key(relative.with_suffix("").as_posix()), str(path), "", split, speaker, _text(path))


def _lrs2(root: Path) -> Iterator[Clip]:
    for listing, folder, split in (
        ("pretrain.txt", "pretrain", "train"),
        ("train.txt", "main", "train"),
        ("val.txt", "main", "valid"),
        ("test.txt", "main", "test"),
    ):
        if not (root / listing).is_file():
            continue
        for number, line in enumerate(_lines(root / listing), 1):
            # The test list carries a second word per line (the kind of programme).
            name = line.split()[0] if line.split() else ""
            if not name:
                continue
            if name.count("/") != 1 or ".." in name:
                raise UserError(f"{root / listing}, line {number}: expected <video>/<clip>, found {name!r}")
            path = root / folder / f"{name}.mp4"
            yield Clip(safe_key(f"{folder}/{name}"), str(path), "", split, name.split("/")[0], _text(path))


def _table(path: Path, notes: list[str]) -> Iterator[Clip]:
    rows = _read_table(path)
    unused = sorted({str(column) for row in rows for column in row if column not in COLUMNS})
    if unused:
        notes.append(f"columns not used: {', '.join(unused)}")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        uri = str(row.get("uri") or "").strip()
        if not uri:
            raise UserError(f"{where}: uri is empty; every row needs one")
        media = local_path(uri)
        if not media.is_absolute():
            media = path.parent / media
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
        yield Clip(safe_key(key), str(media), "", SPLITS.get(split, split), speaker, text, start, end)


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            import pyarrow.parquet as pq

            rows = pq.read_table(path).to_pylist()
            header = list(rows[0]) if rows else ["uri"]
        else:
            with open(path, newline="", encoding="utf-8-sig") as stream:
                reader = csv.DictReader(stream)
                rows, header = list(reader), list(reader.fieldnames or [])
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"source {path}: no readable CSV or Parquet table ({error})") from None
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


def _text(media: Path) -> str:
    """Text beside a media file: the `Text:` line of an LRS file, or a plain file's words."""
    path = media.with_suffix(".txt")
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        if line.startswith("Text:"):
            return " ".join(line.removeprefix("Text:").split())
    return " ".join(" ".join(lines).split())


def _lines(listing: Path) -> list[str]:
    try:
        return listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list {listing}: cannot be read as text ({error})") from None


def _hold_out(clips: list[Clip], listing: Path | None) -> list[Clip]:
    if listing is None:
        return clips
    ids = {safe_key(line.strip()) for line in _lines(listing) if line.strip()}
    missing = ids - {clip.key for clip in clips}
    if missing:
        raise UserError(f"source.valid_ids {listing}: {len(missing)} ids are not in the source, e.g. {min(missing)!r}")
    return [replace(clip, split="valid") if clip.key in ids else clip for clip in clips]


def _refuse_duplicates(clips: list[Clip]) -> None:
    seen: dict[str, str] = {}
    for clip in clips:
        if clip.key in seen:
            raise UserError(f"key {clip.key!r} names two clips: {seen[clip.key]} and {clip.uri}")
        seen[clip.key] = clip.uri


def _digest(clips: list[Clip]) -> list[Clip]:
    """Fill in content digests; a file that cannot be read gets none and is refused by the first stage that opens it."""

    def digest(uri: str) -> str:
        try:
            # Reading a pipe or a device would wait for ever.
            return file_sha256(Path(uri)) if Path(uri).is_file() else ""
        except OSError:
            return ""

    uris = sorted({clip.uri for clip in clips})
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=4) as pool, Progress("read source", len(uris), "files") as progress:
        for uri, found in zip(uris, pool.map(digest, uris), strict=True):
            digests[uri] = found
            progress.advance()
    return [replace(clip, digest=digests[clip.uri]) for clip in clips]
