"""Checkpoints: one file per saved step, published whole, loaded without unpickling code."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shards.errors import UserError
from shards.storage import open_store

PREFIX, SUFFIX = "step-", ".pt"


@dataclass(frozen=True)
class Checkpoint:
    """A saved state.

    Attributes:
        step: optimiser steps done.
        config: of the run, as plain JSON values.
        shape: of the network, every key, so that later defaults do not change it.
        dataset: profile, widths, stage weights and stage configuration of the shards it was trained on.
        model, optimiser: state dicts.
    """

    step: int
    config: dict[str, Any]
    shape: dict[str, Any]
    dataset: dict[str, Any]
    model: dict[str, torch.Tensor]
    optimiser: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `step-XXXXXXXX.pt` and drop all but the newest `keep`."""
    name = f"{PREFIX}{checkpoint.step:08d}{SUFFIX}"
    state = {
        "step": checkpoint.step,
        "config": json.dumps(checkpoint.config),
        "shape": json.dumps(checkpoint.shape),
        "dataset": json.dumps(checkpoint.dataset),
        "model": checkpoint.model,
        "optimiser": checkpoint.optimiser,
    }
    with open_store(str(folder)).draft() as draft:
        torch.save(state, draft.stream)
        draft.publish(name)
    for old in found(folder)[:-keep]:
        old.unlink()
    return folder / name


def found(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*{SUFFIX}"))


def load(path: Path) -> Checkpoint:
    """Load a checkpoint file, or the newest in a folder, onto the CPU.

    Raises:
        UserError: no checkpoint there, or a file of another kind.
    """
    if path.is_dir():
        files = found(path)
        if not files:
            raise UserError(f"{path}: no checkpoint ({PREFIX}*{SUFFIX}) in this folder; train first")
        path = files[-1]
    if path.is_file() and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a checkpoint of this program (or cut short)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        plain = {name: json.loads(state[name]) for name in ("config", "shape", "dataset")}
        return Checkpoint(step=state["step"], model=state["model"], optimiser=state["optimiser"], **plain)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a checkpoint of this program ({type(error).__name__}: {detail})") from None
