"""What training loops share: how they are ended, watched and reported."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.meter import NotFinite
from model.ranks import Ranks
from model.run_config import AdamWConfig, RunConfig
from model.run_folder import RunFolder
from shards.errors import UserError
from shards.stream import TrainingStream


@dataclass(frozen=True)
class Result:
    """How a run ended; `first` and `last` are mean losses of the first and last log line, NaN without one."""

    folder: str
    step: int
    first: float
    last: float
    stopped: bool


def is_over(begin: float, minutes: float | None) -> bool:
    """Whether a run that began at `begin` (`time.monotonic`) has had its time."""
    return minutes is not None and time.monotonic() - begin > 60 * minutes


def precision(config: RunConfig, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the run wants it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.amp)


def clipped(parameters: Iterable[nn.Parameter], config: AdamWConfig) -> Tensor:
    """Norm of the gradient of all parameters together, which is scaled down to the bound where there is one."""
    return nn.utils.clip_grad_norm_(list(parameters), config.clip_norm or math.inf)


def write_scalars(log: Any, group: str, values: dict[str, float], step: int) -> None:
    """Into TensorBoard; nothing where there is no `log`."""
    if log is not None:
        for name, value in values.items():
            log.add_scalar(f"{group}/{name}", value, step)


def not_finite(run: RunFolder, error: NotFinite, ranks: Ranks) -> UserError:
    """Note the step's clips in the run's folder, and say where."""
    name = f"step-{error.step:08d}-not-finite" + (f"-rank{ranks.rank}" if ranks.world > 1 else "")
    facts = {"step": error.step, "values": {k: str(v) for k, v in error.values.items()}, "keys": error.keys}
    where = run.note(f"{name}.json", json.dumps(facts, indent=1))
    terms = ", ".join(f"{name} {value:.3g}" for name, value in error.values.items())
    way = "begin another run with a checkpoint from before (begin=...) and a lower optimiser.lr"
    return UserError(
        f"step {error.step}: the loss or its gradient is not finite ({terms}); the batch's clips are in {where}; {way}"
    )


def validation_split(stream: TrainingStream, split: str, asked_for: bool, say: Callable[[str], None]) -> bool:
    """Whether the (first) dataset has the split that validation wants.

    Args:
        asked_for: the user named it.

    Raises:
        UserError: it has not, and the user named it.
    """
    table = stream.tables[0]
    splits = {shard.split for shard in table.index.shards}
    if split in splits:
        return True
    if asked_for:
        there = ", ".join(sorted(splits))
        raise UserError(f"validation.split: no split {split!r} in {table.uri}; splits are {there}")
    say(f"no validation: {table.uri} has no split {split!r}")
    return False
