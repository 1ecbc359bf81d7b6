"""Whole clips in batches of like length, for evaluation: every clip once, in an order that never changes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from shards.clip_source import Clip, ClipSource
from shards.clip_table import Snapshot, load_clips
from shards.device import Batch, on_device
from shards.layout import layout
from shards.stream_config import StreamConfig
from shards.workers import Batches, Task


class WholeClips:
    """Every clip of a split, whole, not augmented (the centre crop of the lips), padded to the longest of its batch.

    Clips of `config.window` shards at a time are sorted by length and cut into batches, so that little is padding and
    a bucket's shards come one after the other.

    Args:
        uri: of the dataset.
        config: `split`, `where`, `min_frames`, and how to read; `batch`, `mix` and the crop have no meaning here.
        max_frames: video frames of a batch, padding included; a longer clip is a batch by itself.
        rank, world: this process's place; the batches are dealt out in turn.
        snapshot: state of the dataset to read; default the current one.

    Attributes:
        skipped: what the last pass left out as damaged, a line each.

    Raises:
        UserError: see `shards.clip_table.load_clips`.
    """

    def __init__(
        self,
        uri: str,
        config: StreamConfig,
        max_frames: int,
        rank: int = 0,
        world: int = 1,
        snapshot: Snapshot | None = None,
    ) -> None:
        self._config = config
        self.table = load_clips(uri, config.split, config.min_frames, config.where, snapshot, fields=config.fields)
        self._plans = self._plan(max_frames)[rank::world]
        self.skipped: list[str] = []

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._plans)

    def batches(self, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """All batches of this rank, as the network takes them; see `shards.device.Batch`.

        Raises:
            UserError: a damaged shard (where `damaged` is `stop`), or storage that failed.
        """
        widths = tuple(sorted(self.table.index.widths.items()))
        done = self._config.augment_on == "worker"
        fields = self._config.fields
        largest = max((layout(*self._shape(plan), widths, done, fields).bytes for plan in self._plans), default=0)
        batches = Batches(self._config, 0, self.table.index.widths, largest)
        yield from on_device(self._host_batches(batches), torch.device(device), batches)

    def _plan(self, max_frames: int) -> list[list[Clip]]:
        plans: list[list[Clip]] = []
        for first in range(0, len(self.table.shards), self._config.window):
            inside = (self.table.shard_of >= first) & (self.table.shard_of < first + self._config.window)
            clips = np.flatnonzero(inside)
            plan: list[Clip] = []
            # Ascending: the newest clip is the longest of its batch.
            for clip in clips[np.argsort(self.table.frames[clips], kind="stable")].tolist():
                if plan and (len(plan) + 1) * self.table.frames[clip] > max_frames:
                    plans.append(plan)
                    plan = []
                plan.append((0, clip, None))
            if plan:
                plans.append(plan)
        return plans

    def _shape(self, clips: list[Clip]) -> tuple[int, int]:
        return len(clips), int(max(self.table.frames[clip] for _, clip, _ in clips))

    def _host_batches(self, batches: Batches) -> Iterator[dict[str, Any]]:
        supply = ClipSource(self._config, [self.table])
        self.skipped = supply.skipped
        depth = self._config.prefetch + 1 if self._config.workers else 1
        todo = deque(self._plans)
        waiting: deque[tuple[list[Clip], Task]] = deque()

        def at_hand(clips: list[Clip]) -> bool:
            """Whether the shards of a batch are there; only the batch that is due waits for them."""
            needed = supply.refs(clip for plan, _ in waiting for clip in plan) if waiting else supply.refs(clips)
            soon = [ref for plan in [clips, *itertools.islice(todo, depth)] for ref in supply.refs(plan)]
            supply.source.want(list(dict.fromkeys([*needed, *soon])), now=len(needed))
            if waiting and not supply.ready(clips):
                return False
            supply.check(clips)
            return True

        try:
            while todo or waiting:
                while todo and len(waiting) < depth and at_hand(todo[0]):
                    if clips := [clip for clip in todo.popleft() if supply.usable(*supply.place(clip))]:
                        waiting.append((clips, batches.submit(supply.samples(clips), *self._shape(clips))))
                if not waiting:
                    continue
                clips, task = waiting.popleft()
                batches.finish(task)
                if task.damaged is not None:
                    supply.found_damaged(*task.damaged)
                    # This batch and those after it are planned again without the shard.
                    todo.extendleft(plan for plan, _ in [*reversed(waiting), (clips, task)])
                    waiting.clear()
                    continue
                batch: dict[str, Any] = {name: torch.from_numpy(value) for name, value in task.views.items()}
                batch["keys"] = [self.table.keys[clip] for _, clip, _ in clips]
                del task
                yield batch
                del batch
        finally:
            batches.close()
            supply.source.close()
