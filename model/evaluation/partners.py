"""Which generated file belongs to which reference, and what is said in it."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from hashlib import sha256
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Literal

from pipeline.audio_files import AUDIO, SUFFIXES
from pipeline.tree import MEDIA, Tree, said
from shards.errors import UserError

KINDS = SUFFIXES | MEDIA
TextFrom = Literal["file", "table", "shards", ""]
"""Where a text stands: KEY.txt beside the reference, the user's table, the dataset; empty: nowhere."""


@dataclass(frozen=True)
class Pair:
    """A generated file and its reference; `text` is None where it is not known."""

    key: str
    generated: Path
    reference: Path
    text: str | None = None
    text_from: TextFrom = ""


def find_pairs(
    generated: Path, reference: Path, texts: Path | None = None, clips: int | None = None
) -> tuple[list[Pair], list[str]]:
    """Files with the same path without suffix below two folders, in the order of their keys; or two files.

    Where a folder has a sound file and a video of one key, as `f2v synthesize` writes them, the sound file counts.

    Args:
        texts: CSV with the columns `key` and `text`, first choice before KEY.txt beside the reference.
        clips: so many, drawn by `draw` among all keys of both folders.

    Returns:
        The pairs, and a line for every key that only one side has.

    Raises:
        UserError: nothing there, a file against a folder, two files of one kind for one key, a table that cannot be
            used, or not a single pair.
    """
    for path in (generated, reference):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    if generated.is_dir() != reference.is_dir():
        raise UserError(f"{generated} and {reference}: give two folders, or two files")
    table = read_texts(texts) if texts is not None else {}
    if not generated.is_dir():
        _check_texts(texts, table, [generated.stem])
        return [_with_text(Pair(generated.stem, generated, reference), table)], []
    ours, theirs = files(generated), files(reference)
    _check_texts(texts, table, {*ours, *theirs})
    keys = draw({*ours, *theirs}, clips)
    both = {key: None for key in keys if key in ours and key in theirs}
    missing = [f"{key}: no file in {reference if key in ours else generated}" for key in keys if key not in both]
    pairs = [_with_text(Pair(key, ours[key], theirs[key]), table) for key in both]
    if not pairs:
        some = f"{generated} has {_some(ours)}, {reference} has {_some(theirs)}"
        raise UserError(f"nothing to score: no file of one path below both folders ({some})")
    return pairs, missing


def draw(keys: Collection[str], count: int | None) -> list[str]:
    """Some keys, sorted: those whose hashes come first, so every system and every run gets the same; None: all.

    Raises:
        UserError: `count` is not positive.
    """
    if count is not None and count < 1:
        raise UserError(f"{count} clips: give a positive number")
    return sorted(sorted(keys, key=lambda key: sha256(os.fsencode(key)).digest())[:count])


def read_texts(path: Path) -> dict[str, str]:
    """Key -> text of a CSV table with these columns.

    Raises:
        UserError: it cannot be read, lacks a column, or names a key twice.
    """
    try:
        reader = csv.DictReader(StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV table ({error})") from None
    lacking = [name for name in ("key", "text") if name not in (reader.fieldnames or ())]
    if lacking:
        raise UserError(f"{path}: no column {' and '.join(lacking)}; the first line must name the columns key and text")
    found: dict[str, str] = {}
    for row in rows:
        if not row["key"] or row["text"] is None:
            raise UserError(f"{path}: a line without key or text ({row['key'] or row['text']!r})")
        if row["key"] in found:
            raise UserError(f"{path}: key {row['key']!r} stands there twice")
        found[row["key"]] = row["text"]
    return found


def _check_texts(path: Path | None, table: dict[str, str], keys: Collection[str]) -> None:
    if table and not any(key in table for key in keys):
        raise UserError(
            f"{path}: its keys, such as {next(iter(table))!r}, are of no clip; a key is the path below the folder "
            f"without suffix, such as {next(iter(keys), 'speaker/clip')!r}"
        )


def files(folder: Path) -> dict[str, Path]:
    """Key -> file. Hidden files and folders, and files of other kinds, are passed over."""
    found: dict[str, Path] = {}
    for name in Tree(str(folder)).names:
        path = PurePosixPath(name)
        if path.suffix.lower() not in KINDS or path.name.startswith("."):
            continue
        key, there = str(path.with_suffix("")), found.get(str(path.with_suffix("")))
        if there is not None and (there.suffix.lower() in AUDIO) == (path.suffix.lower() in AUDIO):
            raise UserError(f"{folder}: {there.name} and {path.name} of one clip, {key}; keep one")
        if there is None or path.suffix.lower() in AUDIO:
            found[key] = folder / name
    return found


def _with_text(pair: Pair, table: dict[str, str]) -> Pair:
    """Empty texts are none."""
    if table.get(pair.key):
        return replace(pair, text=table[pair.key], text_from="table")
    try:
        text = said(pair.reference.with_suffix(".txt").read_bytes())
    except FileNotFoundError:
        return pair
    return replace(pair, text=text, text_from="file") if text else pair


def _some(files: dict[str, Path]) -> str:
    """A few keys, for a message."""
    return ", ".join([*list(files)[:3], *(["..."] if len(files) > 3 else [])]) or "no sound or video"
