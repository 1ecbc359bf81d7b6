"""The processes of one training run: their places, and the few numbers that they exchange beside gradients."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from shards.errors import UserError

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others: as long as the slowest fetch of a first shard may take."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world`; `local` counts on its machine. With one process nothing is exchanged."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def joined(cls) -> Ranks:
        """Join the run that `torchrun` started, or be alone. Numbers on the host go by gloo, those on GPUs by NCCL.

        Raises:
            UserError: the environment variables of `torchrun` are incomplete.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        try:
            place = cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        except KeyError as error:
            raise UserError(
                f"WORLD_SIZE is set but {error} is not: start with `torchrun --no-python f2v train`"
            ) from None
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        return place

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all get the same answer."""
        if self.world == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)

    def alike(self, text: str) -> bool:
        """Whether all processes say the same."""
        value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:5], "big")
        return not self.any(self.world > 1 and int(self.total(torch.tensor(value))) != value * self.world)

    def total(self, value: Tensor) -> Tensor:
        """Sum over processes, on the value's device."""
        if self.world == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Mean over processes; all give the same names."""
        summed = self.total(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
        return {name: value / self.world for name, value in zip(values, summed, strict=True)}

    def close(self) -> None:
        """Leave the run, without waiting for processes that may have failed."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
