"""Public checkpoints: finding or fetching their files, and reading tensors from them without running what is inside."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
HEAD = 16
"""Bytes that say what kind of file it is."""
ZIP = b"PK\x03\x04"
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


class MissingCheckpoint(UserError):
    """A checkpoint is not at hand. It can be fetched where its `url` is known.

    Attributes:
        checkpoint: that is missing; `folder` it was looked for in, before the user's cache.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path | None) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        what = f"{checkpoint.what}: no file {places(checkpoint, folder)}"
        super().__init__(f"{what}; {checkpoint.hint or f'it is published as {checkpoint.url}'}")


_fetching: ContextVar[bool] = ContextVar("fetching", default=True)


@contextmanager
def no_fetching() -> Iterator[None]:
    """In this block `find_checkpoint` raises `MissingCheckpoint` rather than fetch a file."""
    token = _fetching.set(False)
    try:
        yield
    finally:
        _fetching.reset(token)


def find_checkpoint(checkpoint: Checkpoint, folder: Path | None) -> Path:
    """The checkpoint's file: in `folder`, else in the user's cache, else fetched from its public home into that cache.

    Raises:
        MissingCheckpoint: it is in neither, and has no public home or is not to be fetched now.
        UserError: it cannot be fetched, its sha256 is another, or there is no such folder.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: no such folder, for {checkpoint.what}; name the checkpoints' folder with --weights")
    for path in _paths(checkpoint, folder):
        if path.is_file():
            return checked(checkpoint, path)
    missing = MissingCheckpoint(checkpoint, folder)
    if not (_fetching.get() and checkpoint.url):
        raise missing
    return fetch_all([missing])[0]


def fetch_all(missing: Sequence[MissingCheckpoint]) -> list[Path]:
    """Fetch files into the user's cache; nothing is fetched unless all can be.

    Raises:
        UserError: names all that are missing, because some have to be supplied by hand or one cannot be fetched.
    """
    unique = {gap.checkpoint.file: gap for gap in missing}
    gaps = list(unique.values())
    if not all(gap.checkpoint.url for gap in gaps):
        if len(gaps) == 1:
            raise gaps[0]
        lines = _lines(sorted(gaps, key=lambda gap: bool(gap.checkpoint.url)))
        folder = gaps[0].folder or user_cache() / FOLDER
        advice = (
            f"supply what has no address in {folder} (--weights or F2V_WEIGHTS name another); the rest is fetched then"
        )
        raise UserError("\n".join([f"{len(gaps)} checkpoints are missing", *lines, advice]))
    found = []
    for number, gap in enumerate(gaps):
        checkpoint = gap.checkpoint
        path = _paths(checkpoint, None)[0]
        try:
            _fetch(checkpoint, path)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            wrong = (
                f"{checkpoint.what}: no file {places(checkpoint, gap.folder)}, and {checkpoint.url} cannot be fetched "
            )
            others = _lines(gaps[number + 1 :])
            advice = "fetch it on another machine, put it there, or name its folder with --weights or F2V_WEIGHTS"
            said = "\n".join([f"{wrong}({reason})", *others, advice]) if others else f"{wrong}({reason}); {advice}"
            raise UserError(said) from None
        found.append(path)
    return found


def _lines(gaps: Sequence[MissingCheckpoint]) -> list[str]:
    """A line for each file."""
    files = [gap.checkpoint for gap in gaps]
    return [f"  {one.file}, {one.what}: {one.hint or f'published as {one.url}'}" for one in files]


def places(checkpoint: Checkpoint, folder: Path | None) -> str:
    """Where a checkpoint's file is looked for, in words."""
    return " or ".join(str(path) for path in _paths(checkpoint, folder))


def _paths(checkpoint: Checkpoint, folder: Path | None) -> list[Path]:
    cached = user_cache() / FOLDER / checkpoint.file
    return [folder / checkpoint.file, cached] if folder else [cached]


def checked(checkpoint: Checkpoint, path: Path) -> Path:
    """The path of a checkpoint's file, looked at as far as that is cheap: its digest where one is published, else its
    beginning, and its end where it is a zip file.

    Raises:
        UserError: it is another file, or damaged.
    """
    if checkpoint.sha256:
        found = _digest(path, path.stat().st_mtime_ns)
        if not found.startswith(checkpoint.sha256):
            raise UserError(
                f"{checkpoint.what} {path}: sha256 {found}, published is {checkpoint.sha256}; delete it and fetch "
                f"{checkpoint.url or 'it'} again"
            )
        return path
    try:
        with open(path, "rb") as stream:
            head = stream.read(HEAD)
            whole = head[:4] != ZIP or zipfile.is_zipfile(stream)
    except OSError as error:
        raise UserError(f"{checkpoint.what} {path}: cannot be read ({error.strerror or error})") from None
    if not (_is_tensors(head) and whole):
        wrong = f"no file of tensors: {_beginning(head)}" if whole else "it is cut short"
        raise UserError(f"{checkpoint.what} {path}: {wrong}; delete it and fetch {checkpoint.url or 'it'} again")
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
            digest, seen, head = hashlib.sha256(), 0, b""
            size = int(answer.headers.get("Content-Length") or 0)
            with Progress(f"fetch {checkpoint.file}", size >> 20, "MB") as progress:
                while data := answer.read(CHUNK):
                    head = (head + data)[:HEAD] if len(head) < HEAD else head
                    digest.update(data)
                    draft.stream.write(data)
                    progress.advance((seen + len(data) >> 20) - (seen >> 20))
                    seen += len(data)
            if size and seen != size:
                raise OSError(f"it broke off after {seen} of {size} bytes")
            if not digest.hexdigest().startswith(checkpoint.sha256):
                raise OSError(f"its sha256 is {digest.hexdigest()}, published is {checkpoint.sha256}")
            if not checkpoint.sha256 and not _is_tensors(head):
                raise OSError(f"what it gives is no file of tensors: {_beginning(head)}")
            draft.publish(path.name)


def _is_tensors(head: bytes) -> bool:
    """Whether a file may be a zip, a pickle or safetensors, by its first bytes."""
    return head[:4] == ZIP or head[:1] == b"\x80" or head[8:9] == b"{"


def _beginning(head: bytes) -> str:
    """What a file begins with, in words."""
    if not head:
        return "it is empty"
    return f"it begins with {head!r}"


def load_tensors(path: Path, what: str, inside: tuple[str, ...] = ("state_dict", "model")) -> dict[str, Tensor]:
    """Tensors by name of a checkpoint file, on the CPU.

    Reads safetensors, what `torch.save` writes (tensors and plain containers alone), the tensors of TorchScript
    archives, and zip files that hold one of these. A prefix `module.` that all names share is taken off.

    Args:
        what: the network, in words for messages.
        inside: entries of which the first one there holds the tensors, where the file holds more than them.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something else.
    """
    import torch

    head = b""
    try:
        with open(path, "rb") as stream:
            head = stream.read(HEAD)
            stream.seek(0)
            tree = _read(stream, path.suffix)
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be read ({error.strerror or error})") from None
    except Exception:  # a damaged file can fail in any way, and torch's words recommend to run what is in it
        kind = "damaged, or holds more than plain tensors" if _is_tensors(head) else "no file of plain tensors"
        raise UserError(f"{what} {path}: {kind} ({_beginning(head)}); delete it and fetch it again") from None
    if isinstance(tree, dict):
        name = next((name for name in inside if isinstance(tree.get(name), dict)), None)
        tree = tree[name] if name else tree
    plain = isinstance(tree, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tree.items()
    )
    if not plain or not tree:
        raise UserError(f"{what} {path}: holds no table of tensors by name")
    if all(name.startswith("module.") for name in tree):
        tree = {name.removeprefix("module."): value for name, value in tree.items()}
    return tree


def _read(stream: BinaryIO, suffix: str) -> Any:
    import torch

    if suffix == ".safetensors":
        from safetensors.torch import load

        return load(stream.read())
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            names = [info for info in archive.infolist() if not info.is_dir()]
            if sum(info.file_size for info in names) > MAX_UNPACKED:
                raise ValueError(f"more than {MAX_UNPACKED} bytes")
            if any("/code/" in info.filename for info in names):
                from pipeline.networks.torchscript import read_archive

                return read_archive(archive)
            if not any(info.filename.endswith("data.pkl") for info in names):
                if len(names) != 1:
                    raise ValueError(f"a zip file of {len(names)} files")
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
