"""The training stream: batches of cropped, padded, augmented samples straight from packed shards.

What is in the batch of a global step is a pure function of (seed, step) and of the clips: see `shards.order`. Ranks
take slices of it, workers fill rows of it, and shards of a bucket are fetched ahead of it, so a run can be killed, and
go on with another number of processes, without any sample lost, doubled or changed.
"""

from __future__ import annotations

import hashlib
import itertools
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from shards.clip_source import Clip, ClipSource
from shards.clip_table import ClipTable, Snapshot, check_alike, load_clips
from shards.device import Batch, on_device
from shards.download import FetchStats
from shards.errors import UserError
from shards.fetch import Interrupted, ShardRef
from shards.layout import layout
from shards.order import Mixture, Numbers, Order
from shards.stream_config import StreamConfig
from shards.workers import Batches, Task

__all__ = ["StreamConfig", "TrainingStream"]


class TrainingStream:
    """Batches of global steps `start`, `start + 1`, ... without end.

    An epoch is as many samples as the datasets have clips; a step that begins in one may end in the next, so every rank
    has the same number of steps and none is left over. In a mixture each dataset has its own epochs, as its share asks.

    Args:
        uri: of the dataset.
        seed: of the run.
        rank, world: this process's place; every rank gets its slice of the same global batch.
        snapshots: state of each dataset to read, as `snapshots` of an earlier stream says; default the current one.

    Attributes:
        tables: clips of each dataset.
        waited_s: seconds that `host_batches` waited for a batch.

    Raises:
        UserError: see `shards.clip_table.load_clips`; datasets that were made in different ways; a batch that cannot be
            split over the ranks.
    """

    def __init__(
        self,
        uri: str,
        config: StreamConfig,
        seed: int,
        rank: int = 0,
        world: int = 1,
        snapshots: Sequence[Snapshot] | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise UserError(f"rank {rank} of {world} processes: ranks are 0 to {world - 1}")
        if config.batch % world:
            raise UserError(f"data.batch {config.batch} cannot be split over {world} processes")
        self.config, self.rank, self.world, self._seed = config, rank, world, seed
        mixed = ((other.uri, other.where, f"data.mix.{number}.where") for number, other in enumerate(config.mix))
        wanted = [(uri, config.where, "data.where"), *mixed]
        if snapshots is not None and len(snapshots) != len(wanted):
            raise UserError(f"this run began with {len(snapshots)} datasets, not {len(wanted)}")
        self.tables: list[ClipTable] = [
            load_clips(
                name,
                config.split,
                config.min_frames,
                where,
                snapshots[number] if snapshots else None,
                key,
                config.fields,
            )
            for number, (name, where, key) in enumerate(wanted)
        ]
        check_alike(self.tables, config.split)
        self.index = self.tables[0].index
        weights = [config.weight, *(other.weight for other in config.mix)]
        self._mixture = Mixture(weights, seed)
        # The first dataset alone has the order that it has without others.
        self._orders = [
            Order(table.shard_of, config.window, f"{seed}+{number}" if number else seed)
            for number, table in enumerate(self.tables)
        ]
        self.clips = sum(order.clips for order in self._orders)
        self.waited_s = 0.0
        self._rolling: tuple[int, str] = (-1, "")
        self._shards = ClipSource(config, self.tables)
        self._batches: Batches | None = None
        weakref.finalize(self, self._shards.source.close)

    def __enter__(self) -> TrainingStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def interrupt(self) -> None:
        """Have `batches` end instead of waiting for storage or workers. A signal handler may call this."""
        self._shards.source.interrupted = True

    def close(self) -> None:
        """End workers and fetches."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        self._shards.source.close()

    @property
    def snapshots(self) -> list[Snapshot]:
        """State of each dataset, for a stream that goes on with this one's clips."""
        return [table.snapshot for table in self.tables]

    @property
    def skipped(self) -> list[str]:
        """What was left out as damaged, a line each."""
        return self._shards.skipped

    @property
    def fetched(self) -> FetchStats:
        """What was fetched from remote datasets so far, and what the cache held."""
        return self._shards.source.stats

    @property
    def memory_bytes(self) -> int:
        """Memory of the batches: those on their way, and those that somebody still holds."""
        return self._batches.slots * self._batches.slot_bytes if self._batches else 0

    def epoch(self, step: int) -> int:
        """Epoch in which a global step begins."""
        return step * self.config.batch // self.clips

    def global_clips(self, step: int) -> list[Clip]:
        """What the batch of a global step is made of, over all ranks."""
        begin = step * self.config.batch
        return self._drawn(*self._mixture.dataset(np.arange(begin, begin + self.config.batch)))

    def _drawn(self, datasets: Numbers, inner: Numbers) -> list[Clip]:
        """Clips of samples `inner` of their datasets."""
        epochs, clips = np.empty_like(inner), np.empty_like(inner)
        for number in np.unique(datasets).tolist():
            here = datasets == number
            epochs[here], clips[here] = self._orders[number].clip(inner[here])
        return list(zip(datasets.tolist(), clips.tolist(), epochs.tolist(), strict=True))

    def digest(self, step: int) -> str:
        """Rolling digest of the keys of all clips from the epoch's first step to this one, 16 hex characters: two runs
        that saw the same clips have the same."""
        first = -(-self.epoch(step) * self.clips // self.config.batch)
        done, value = self._rolling
        if not first <= done <= step:
            done, value = first - 1, ""
        for number in range(done + 1, step + 1):
            keys = "\n".join(f"{clip[0]}/{self.tables[clip[0]].keys[clip[1]]}" for clip in self.global_clips(number))
            value = hashlib.sha256(f"{value}\n{keys}".encode()).hexdigest()[:16]
        self._rolling = step, value
        return value

    def batches(self, start: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """This rank's batches from global step `start` on, as the network takes them; see `shards.device.Batch`."""
        return on_device(self.host_batches(start), torch.device(device), self._opened())

    def host_batches(self, start: int) -> Iterator[dict[str, Any]]:
        """This rank's batches as they are filled: the arrays of `shards.layout.Layout` as tensors, and `keys`.

        The memory of a batch is used again once nothing refers to its tensors any more. Ends only by `interrupt`.

        Raises:
            UserError: a damaged shard (where `damaged` is `stop`), storage that failed, or no usable shard left.
        """
        depth = self.config.prefetch + 1 if self.config.workers else 1
        waiting: deque[tuple[list[Clip], Task]] = deque()
        for step in itertools.count(start):
            begin = time.perf_counter()
            try:
                clips, task = self._due(step, depth, waiting)
            except Interrupted:
                return
            self.waited_s += time.perf_counter() - begin
            batch: dict[str, Any] = {name: torch.from_numpy(value) for name, value in task.views.items()}
            batch["keys"] = [self.tables[dataset].keys[clip] for dataset, clip, _ in clips]
            del task
            yield batch
            del batch

    def _due(self, step: int, depth: int, waiting: deque[tuple[list[Clip], Task]]) -> tuple[list[Clip], Task]:
        """The filled batch of a step; up to `depth` batches from it on are on their way in `waiting`."""
        batches = self._opened()
        shape = self.config.batch // self.world, self.config.crop_frames

        def interrupted() -> bool:
            return self._shards.source.interrupted

        while True:
            while len(waiting) < depth:
                clips = self._planned(step + len(waiting), step, waiting)
                if clips is None:
                    break
                waiting.append((clips, batches.submit(self._shards.samples(clips), *shape)))
            batches.finish(waiting[0][1], interrupted)
            if waiting[0][1].damaged is None:
                return waiting.popleft()
            self._shards.found_damaged(*waiting[0][1].damaged)
            # This step and those after it are planned again without the shard.
            for _, other in waiting:
                batches.finish(other, interrupted)
            waiting.clear()

    def _opened(self) -> Batches:
        if self._batches is None:
            widths = self.index.widths
            shape = self.config.batch // self.world, self.config.crop_frames
            done = self.config.augment_on == "worker"
            size = layout(*shape, tuple(sorted(widths.items())), done, self.config.fields).bytes
            self._batches = Batches(self.config, self._seed, widths, size)
            weakref.finalize(self, self._batches.close)
        return self._batches

    def _planned(self, step: int, due: int, waiting: Sequence[tuple[list[Clip], Task]]) -> list[Clip] | None:
        """This rank's clips of a step, their shards at hand; None where the step is not due yet and they are not."""
        while True:
            clips = self._share(step)
            # What is not due yet gives way where the cache has no room for all.
            needed = itertools.chain.from_iterable(planned for planned, _ in waiting) if step > due else clips
            self._want(due, step, self._shards.refs(needed), self._shards.refs(clips))
            if step > due and not self._shards.ready(clips):
                return None
            if self._shards.check(clips):
                return clips

    def _share(self, step: int) -> list[Clip]:
        """This rank's part of a step; clips of damaged shards are replaced by the next ones in the order."""
        share = self.config.batch // self.world
        begin = step * self.config.batch + self.rank * share
        datasets, inner = self._mixture.dataset(np.arange(begin, begin + share))
        clips = self._drawn(datasets, inner)
        for row, clip in enumerate(clips):
            if not self._shards.usable(*self._shards.place(clip)):
                clips[row] = self._sound(clip[0], int(inner[row]))
        return clips

    def _sound(self, dataset: int, number: int) -> Clip:
        """The next clip of a sound shard after sample `number` of a dataset."""
        table, order = self.tables[dataset], self._orders[dataset]
        for begin in range(number + 1, number + 2 * order.clips, 64):
            for epoch, clip in zip(*order.clip(np.arange(begin, begin + 64)), strict=True):
                if self._shards.usable(dataset, int(table.shard_of[clip])):
                    return dataset, int(clip), int(epoch)
        raise UserError(f"{table.uri}: every shard of split {self.config.split!r} is damaged; run `f2v verify`")

    def _want(self, due: int, last: int, needed: Sequence[ShardRef], soon: Sequence[ShardRef]) -> None:
        """Have shards at hand: those `needed` now, then `soon`, then the window of steps `due` to `last`, then the next
        ones."""
        window: list[ShardRef] = []
        ahead: list[ShardRef] = []
        numbers = np.arange(due * self.config.batch, (last + 1) * self.config.batch)
        datasets, inner = self._mixture.dataset(numbers)
        for number, (table, order) in enumerate(zip(self.tables, self._orders, strict=True)):
            here = inner[datasets == number]
            if not len(here):
                continue
            found = order.shards(int(here[0]), int(here[-1]) + 1, self.config.ahead)
            for shards, refs in zip(found, (window, ahead), strict=True):
                refs += [table.shards[shard] for shard in shards if self._shards.usable(number, shard)]
        refs = list(dict.fromkeys([*needed, *soon, *window, *ahead]))
        self._shards.source.want(refs, now=len(needed))
