"""Checkpoints: one file per saved step, on disk or in a bucket, published whole, loaded without unpickling code."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from model.checkpoint_file import Unreadable, one_line, read_state
from shards.errors import UserError, warn
from shards.storage import (
    TEMPORARY,
    StorageError,
    Store,
    file_sha256,
    is_remote,
    local_path,
    open_store,
    open_uri,
)

PREFIX, SUFFIX = "step-", ".pt"
KEYS = ("step", "config", "shape", "dataset", "model", "optimiser")
ABANDONED = timedelta(days=1)
"""After this time nobody writes to a hidden file any more."""


class LeftOut(TypedDict):
    """Parameters that a checkpoint does not hold, because they are frozen and came from a file.

    `prefix` begins their names; `path` and `sha256` are the file's place and digest when training began.
    """

    prefix: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A saved state.

    Attributes:
        step: optimiser steps done.
        config: of the run, as plain JSON values.
        shape: of the network, every key, so that later defaults do not change it.
        dataset: profile, widths, stage weights and stage configuration of the shards it was trained on.
        model, optimiser: state dicts.
        ema: moving average of the trained parameters by name; None where the run keeps none.
        without: what `save` leaves out of `model`; None: nothing.
    """

    step: int
    config: dict[str, Any]
    shape: dict[str, Any]
    dataset: dict[str, Any]
    model: dict[str, Tensor]
    optimiser: dict[str, Any]
    ema: dict[str, Tensor] | None = None
    without: LeftOut | None = None

    def release(self) -> None:
        """Let go of all tensors, once networks and optimisers have copies: whoever still holds the rest of the
        checkpoint would keep them in memory."""
        for tensors in (self.model, self.optimiser, self.ema or {}):
            tensors.clear()


def save(uri: str | Path, checkpoint: Checkpoint, keep: int, keep_every: int | None = None) -> str:
    """Write `step-XXXXXXXX.pt`, whole or not at all, then drop all but the newest `keep` and never this one.

    What cannot be dropped is a warning. Those of multiples of `keep_every` steps stay.

    Returns:
        Where the checkpoint lies.

    Raises:
        StorageError: it could not be written; those before it are as they were.
    """
    uri, name = as_uri(uri), _name(checkpoint.step)
    address = f"{uri}/{name}"
    model = checkpoint.model
    if checkpoint.without is not None:
        prefix = checkpoint.without["prefix"]
        model = {key: value for key, value in model.items() if not key.startswith(prefix)}
    state = {
        "step": checkpoint.step,
        "config": json.dumps(checkpoint.config),
        "shape": json.dumps(checkpoint.shape),
        "dataset": json.dumps(checkpoint.dataset),
        "model": model,
        "optimiser": checkpoint.optimiser,
        "ema": checkpoint.ema,
        "without": json.dumps(checkpoint.without),
    }
    store = open_store(uri)
    try:
        with store.draft() as draft:
            torch.save(state, draft.stream)
            draft.publish(name)
    except (OSError, RuntimeError) as error:
        # torch hides what the disk said behind an error of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        where = f", in {tempfile.gettempdir()} on its way" if is_remote(uri) else ""
        raise StorageError(f"{address}: cannot be written ({cause.strerror or cause}{where})") from None
    try:
        _prune(store, name, keep, keep_every)
    except (OSError, StorageError) as error:
        warn(f"{uri}: old checkpoints could not be removed ({error})")
    return address


def found(uri: str | Path) -> list[str]:
    """Names of the checkpoints in a folder, oldest first; files of other names are not looked at."""
    return _found(open_store(as_uri(uri)))


def load(uri: str | Path) -> Checkpoint:
    """Load a checkpoint file, or the newest in a folder, onto the CPU.

    Raises:
        UserError: no checkpoint there, or a file that is cut short, damaged or of another kind. Where it is the newest
            of several, the message names the one before.
        StorageError: the storage refuses or does not answer.
    """
    uri = as_uri(uri)
    name = _file_name(uri)
    if name is not None:
        store, _ = open_uri(uri)
        return _load(store, name, uri)
    store = open_store(uri)
    names = _found(store)
    if not names:
        raise UserError(f"{uri}: no checkpoint ({PREFIX}*{SUFFIX}) in this folder; train first")
    try:
        state = _load(store, names[-1], f"{uri}/{names[-1]}")
        if _name(state.step) != names[-1]:
            raise Unreadable(f"{uri}/{names[-1]}: is of step {state.step}, so it has another one's name")
        return state
    except Unreadable as error:
        if len(names) == 1:
            raise
        way = f"delete it to go on from {names[-2]}, the one before, or name that file"
        raise UserError(f"{error}; {way}") from None


def restore(network: nn.Module, state: Checkpoint) -> None:
    """Put a checkpoint's tensors into a network; those that it leaves out stay as they are there.

    Raises:
        UserError: they are not those of this network.
    """
    prefix = state.without["prefix"] if state.without else None
    try:
        missing, odd = network.load_state_dict(state.model, strict=False)
    except RuntimeError as error:
        raise UserError(f"checkpoint of step {state.step}: {one_line(error)}") from None
    faults = [f"missing {key}" for key in missing if prefix is None or not key.startswith(prefix)]
    faults += [f"unexpected {key}" for key in odd]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise UserError(f"checkpoint of step {state.step}: not of this network: {'; '.join(faults[:4])}{more}")


def left_out(prefix: str, path: Path) -> LeftOut:
    """Frozen parameters that a checkpoint need not hold, since they lie in a file.

    Raises:
        UserError: there is no such file.
    """
    return {"prefix": prefix, "path": str(path.absolute()), "sha256": _digest(path, prefix)}


def weights_file(without: LeftOut, path: Path | None = None) -> Path:
    """The file with the parameters that a checkpoint leaves out: `path`, or where it lay when training began.

    Raises:
        UserError: there is no such file, or it is another one.
    """
    place = Path(without["path"]) if path is None else path
    digest = _digest(place, without["prefix"])
    if digest != without["sha256"]:
        raise UserError(
            f"{place}: other weights than those of the checkpoint, which leaves {without['prefix']}* to them "
            f"(sha256 {digest[:16]}..., was {without['sha256'][:16]}...); name the file that the run began with"
        )
    return place


def as_uri(uri: str | Path) -> str:
    """A place as text, without a slash at its end; a `Path` of a bucket's URI has lost a slash, which is put back."""
    text = re.sub(r"^(s3|gs|https?):/(?!/)", r"\1://", str(uri)) if isinstance(uri, Path) else uri
    return text.rstrip("/") or text


def _name(step: int) -> str:
    return f"{PREFIX}{step:08d}{SUFFIX}"


def _found(store: Store) -> list[str]:
    return [_name(step) for step in _steps(store)]


def _steps(store: Store) -> list[int]:
    matches = (re.fullmatch(rf"{PREFIX}([0-9]+){SUFFIX}", entry.name) for entry in store.list(PREFIX))
    return sorted(int(match[1]) for match in matches if match and match[0] == _name(int(match[1])))


def _prune(store: Store, written: str, keep: int, keep_every: int | None) -> None:
    stays = {_name(step) for step in _steps(store) if keep_every and step % keep_every == 0} | {written}
    old = [name for name in _found(store)[:-keep] if name not in stays]
    # Where a file system has no nameless files, a killed process leaves a hidden one.
    before = datetime.now(timezone.utc) - ABANDONED
    old += [entry.name for entry in store.list(TEMPORARY) if entry.modified < before]
    store.delete(old)


def _file_name(uri: str) -> str | None:
    """Name of the file at `uri` in its store; None for a folder. Raises UserError: there is neither."""
    if is_remote(uri):
        store, name = open_uri(uri)
        if name and store.exists(name):
            return name
        if not name.endswith(SUFFIX):
            return None
    else:
        path = local_path(uri)
        if path.is_dir():
            return None
        if path.is_file():
            return path.name
    raise UserError(f"{uri}: no such checkpoint")


def _load(store: Store, name: str, address: str) -> Checkpoint:
    try:
        return _checkpoint(read_state(store, name, address), address)
    except FileNotFoundError:
        raise UserError(f"{address}: no such checkpoint") from None


def _checkpoint(state: Any, address: str) -> Checkpoint:
    kind = f"{address}: not a checkpoint of this program"
    if not isinstance(state, dict):
        raise Unreadable(f"{kind} (a {type(state).__name__})")
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise Unreadable(f"{kind} (without {', '.join(missing)})")
    try:
        facts = {key: json.loads(state[key]) for key in ("config", "shape", "dataset")}
        without = json.loads(state.get("without", "null"))
    except (TypeError, ValueError) as error:
        raise Unreadable(f"{kind} ({one_line(error)})") from None
    ema = state.get("ema")
    sound = {
        "step": type(state["step"]) is int and state["step"] >= 0,
        **{key: isinstance(value, dict) for key, value in facts.items()},
        "model": _is_tensors(state["model"]),
        "optimiser": isinstance(state["optimiser"], dict),
        "ema": ema is None or _is_tensors(ema),
        "without": without is None or _is_left_out(without),
    }
    odd = [key for key, fits in sound.items() if not fits]
    if odd:
        raise Unreadable(f"{kind} (what it has as {', '.join(odd)} cannot be that)")
    return Checkpoint(
        state["step"], **facts, model=state["model"], optimiser=state["optimiser"], ema=ema, without=without
    )


def _is_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _is_left_out(value: Any) -> bool:
    keys = set(LeftOut.__annotations__)
    return isinstance(value, dict) and set(value) == keys and all(isinstance(text, str) for text in value.values())


def _digest(path: Path, prefix: str) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: the weights of {prefix}*, {error.strerror}; name the file that holds them") from None
