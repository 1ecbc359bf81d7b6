"""Public checkpoints: finding or fetching their files, and reading tensors from them without running what is inside."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import pickle
import struct
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from shards.errors import UserError
from shards.progress import Progress
from shards.storage import file_sha256, open_store, user_cache

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = "weights"
"""Where fetched files lie in the user's cache."""
CHUNK = 1 << 20
MAX_UNPACKED = 8 << 30
"""Bytes that a checkpoint inside a zip file may unpack to."""


@dataclass(frozen=True)
class Checkpoint:
    """A published file.

    Attributes:
        what: the network, in words for messages.
        file: name that it is stored under.
        url: where it is published; empty where it has to be fetched by hand, which `hint` then explains.
        sha256: of the file, hex, where one is published; a prefix will do.
    """

    what: str
    file: str
    url: str = ""
    sha256: str = ""
    hint: str = ""


def find_checkpoint(checkpoint: Checkpoint, folder: Path | None) -> Path:
    """The checkpoint's file: in `folder`, else in the user's cache, else fetched from its public home into that cache.

    Raises:
        UserError: it is in neither and cannot be fetched, or its sha256 is another.
    """
    cached = user_cache() / FOLDER / checkpoint.file
    for path in (folder / checkpoint.file if folder else cached, cached):
        if path.is_file():
            return _checked(checkpoint, path)
    wanted = [str(folder / checkpoint.file)] if folder else []
    places = " or ".join([*wanted, str(cached)])
    source = checkpoint.url or checkpoint.hint
    if not checkpoint.url:
        raise UserError(f"{checkpoint.what}: no file {places}; {source}")
    try:
        _fetch(checkpoint, cached)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(
            f"{checkpoint.what}: no file {places}, and {source} cannot be fetched ({reason}); fetch it on another "
            "machine, put it there, or name its folder with --weights or F2V_WEIGHTS"
        ) from None
    return cached


def _checked(checkpoint: Checkpoint, path: Path) -> Path:
    if checkpoint.sha256:
        found = _digest(path, path.stat().st_mtime_ns)
        if not found.startswith(checkpoint.sha256):
            raise UserError(
                f"{checkpoint.what} {path}: sha256 {found}, published is {checkpoint.sha256}; delete it and fetch "
                f"{checkpoint.url or 'it'} again"
            )
    return path


_digests: dict[tuple[Path, int], str] = {}


def _digest(path: Path, stamp: int) -> str:
    if (path, stamp) not in _digests:
        _digests[path, stamp] = file_sha256(path)
    return _digests[path, stamp]


def _fetch(checkpoint: Checkpoint, path: Path) -> None:
    """Fetch into the cache; other processes of this machine wait, and the file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            return
        request = urllib.request.Request(checkpoint.url, headers={"User-Agent": "faces2voices"})
        store = open_store(str(path.parent))
        with urllib.request.urlopen(request, timeout=60) as answer, store.draft() as draft:
            digest, seen = hashlib.sha256(), 0
            size = int(answer.headers.get("Content-Length") or 0)
            with Progress(f"fetch {checkpoint.file}", size >> 20, "MB") as progress:
                while data := answer.read(CHUNK):
                    digest.update(data)
                    draft.stream.write(data)
                    progress.advance((seen + len(data) >> 20) - (seen >> 20))
                    seen += len(data)
            if size and seen != size:
                raise OSError(f"it broke off after {seen} of {size} bytes")
            if not digest.hexdigest().startswith(checkpoint.sha256):
                raise OSError(f"its sha256 is {digest.hexdigest()}, published is {checkpoint.sha256}")
            draft.publish(path.name)


def load_tensors(path: Path, what: str, inside: tuple[str, ...] = ("state_dict", "model")) -> dict[str, Tensor]:
    """Tensors by name of a checkpoint file, on the CPU.

    Reads safetensors, what `torch.save` writes (tensors and plain containers alone), TorchScript archives, and zip
    files that hold one of these. A prefix `module.` that all names share is taken off.

    Args:
        what: the network, in words for messages.
        inside: entries of which the first one there holds the tensors, where the file holds more than them.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something else.
    """
    import torch

    try:
        with open(path, "rb") as stream:
            tree = _read(stream, path.suffix)
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be read ({error.strerror or error})") from None
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{what} {path}: damaged, or no file of plain tensors ({words}); fetch it again") from None
    if isinstance(tree, dict):
        name = next((name for name in inside if isinstance(tree.get(name), dict)), None)
        tree = tree[name] if name else tree
    if not isinstance(tree, dict) or not tree or not all(isinstance(value, torch.Tensor) for value in tree.values()):
        raise UserError(f"{what} {path}: holds no table of tensors")
    if all(name.startswith("module.") for name in tree):
        tree = {name.removeprefix("module."): value for name, value in tree.items()}
    return tree


def _read(stream: BinaryIO, suffix: str) -> Any:
    import torch

    if suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(stream.read())
        except SafetensorError as error:
            raise ValueError(error) from None
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            names = [info for info in archive.infolist() if not info.is_dir()]
            if any("/code/" in info.filename for info in names):
                stream.seek(0)
                return dict(torch.jit.load(stream, map_location="cpu").state_dict())
            if not any(info.filename.endswith("data.pkl") for info in names):
                if len(names) != 1 or names[0].file_size > MAX_UNPACKED:
                    raise ValueError(f"a zip file of {len(names)} files, expected one of at most {MAX_UNPACKED} bytes")
                return _read(BytesIO(archive.read(names[0])), Path(names[0].filename).suffix)
    stream.seek(0)
    return torch.load(stream, map_location="cpu", weights_only=True)


def load_strict(module: nn.Module, tensors: dict[str, Tensor], path: Path, what: str) -> None:
    """Put tensors into a module in which every one has its place.

    Raises:
        UserError: names or shapes differ; `num_batches_tracked`, which old files lack, may be missing.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    missing = [name for name in wanted if name not in tensors and not name.endswith("num_batches_tracked")]
    unknown = [name for name in tensors if name not in wanted]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    wrong = [
        f"{len(names)} {kind}, e.g. {names[0]}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if wrong:
        raise UserError(f"{what} {path}: not this network's tensors ({'; '.join(wrong)})")
    module.load_state_dict(tensors, strict=False)
