"""The files of a source, on disk or in a bucket."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from shards.errors import UserError
from shards.storage import Object, Store, is_remote, local_path, open_store, open_uri

# fmt: off
MEDIA = frozenset((
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".ismv", ".mkv", ".webm", ".avi", ".divx",
    ".mpg", ".mpeg", ".mpe", ".m2p", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".wmv", ".asf", ".flv",
    ".ogv", ".ogm", ".mxf", ".dv", ".dif", ".rm", ".rmvb", ".wtv", ".nut",
))
# fmt: on
"""Endings of files that hold picture and sound. What a table names may end as it likes."""


class Tree:
    """The files of a source.

    Attributes:
        root: URI without a slash at its end.
        names: relative to it, sorted; empty where the source is a file.
        objects: name -> size and stamp, where the listing told them.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """

    def __init__(self, uri: str) -> None:
        self._remote = is_remote(uri)
        # Workers may run in another folder, so paths are whole from here on.
        self.root = uri.rstrip("/") if self._remote else str(local_path(uri).absolute())
        if self._remote:
            self.store: Store = open_store(self.root)
            self.objects: dict[str, Object] = {found.name: found for found in self.store.list()}
            self.names = sorted(self.objects)
            self.is_file = not self.names and bool(open_uri(self.root)[0].find(open_uri(self.root)[1]))
            exists = bool(self.names) or self.is_file
        else:
            self.store, self.objects = open_store(self.root), {}
            self.is_file, exists = os.path.isfile(self.root), os.path.exists(self.root)
            self.names = sorted(_walk(Path(self.root))) if exists and not self.is_file else []
        if not exists:
            raise UserError(f"source {uri}: no such file or folder")
        self._set = frozenset(self.names)
        self._texts: dict[str, bytes] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._set

    def uri(self, name: str) -> str:
        """Of a file."""
        return f"{self.root}/{name}"

    def layout(self) -> str:
        """The layout that the files look like: `table`, `lrs2`, `lrs3` or `folder`."""
        if self.is_file:
            return "table"
        tops = {name.split("/")[0] for name in self.names if "/" in name}
        if "main" in tops and "test.txt" in self:
            return "lrs2"
        return "lrs3" if {"trainval", "test"} <= tops else "folder"

    def media(self) -> Iterator[str]:
        """Names of media files that are not hidden."""
        for name in self.names:
            parts = name.split("/")
            if PurePosixPath(name).suffix.lower() in MEDIA and not any(part.startswith(".") for part in parts):
                yield name

    def text(self, name: str) -> str:
        """Text beside a media file: the `Text:` line of an LRS file, or a plain file's words."""
        beside = str(PurePosixPath(name).with_suffix(".txt"))
        if beside not in self:
            return ""
        if self._remote and not self._texts:
            # A bucket answers one request slowly and many at once.
            names = [name for name in self.names if name.endswith(".txt")]
            with ThreadPoolExecutor(max_workers=32) as pool:
                self._texts = dict(zip(names, pool.map(self.store.read, names), strict=True))
        data = self._texts[beside] if self._remote else self.store.read(beside)
        return said(data)


def said(data: bytes) -> str:
    """Words of a text file: its `Text:` line, as LRS files have one, else all of them."""
    lines = data.decode(errors="replace").splitlines()
    for line in lines:
        if line.startswith("Text:"):
            return " ".join(line.removeprefix("Text:").split())
    return " ".join(" ".join(lines).split())


def _walk(root: Path) -> Iterator[str]:
    """Names of all files below a local folder, links followed."""

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
        for name in files:
            yield Path(folder, name).relative_to(root).as_posix()
