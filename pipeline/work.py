"""The computing part of a build: one Ray session, started only when there is something to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.board import Board
from pipeline.codebook import FitTask
from pipeline.config import BuildConfig
from pipeline.digests import Facts, Files, Read, read_here
from pipeline.pack import Packed
from pipeline.recordings import Scan
from pipeline.records import publish_record
from pipeline.run_record import Outcome
from pipeline.stage import Clip
from pipeline.worker import Done, Order, Work
from shards.dataset import Dataset
from shards.manifest import Codebook, ColumnRef
from shards.signals import Stopped

if TYPE_CHECKING:
    from pipeline.runner import Runner

Follow = Callable[[Codebook | None], tuple[Sequence[Work], str | None]]
"""From centroids that were just fitted to the tasks that can be done now, and the name of the centroids."""


LITTLE = 64 << 20
"""Bytes of media that are not worth a cluster to be read."""


class Site:
    """Where a build is carried out: the Ray session, its workers, and the board that shows what they do. Use as a
    context manager; what ended the block is in the run record.

    Args:
        uri: of the dataset.
        events: show what happens as JSON lines.
    """

    def __init__(self, uri: str, events: bool = False) -> None:
        self.uri, self._events = uri, events
        self._stack = ExitStack()
        self._connected = False
        self._runner: Runner | None = None
        self._board: Board | None = None

    def board(self, config: BuildConfig) -> Board:
        """What shows and counts this build."""
        if self._board is None:
            self._board = self._stack.enter_context(Board(self.uri, config, json=self._events))
        return self._board

    def reader(self, config: BuildConfig) -> Read | None:
        """Reads media for their digests on the cluster's machines, if they are large; None without a cluster."""
        if config.run.ray_address is None:
            return None

        def read(files: Files) -> Iterator[tuple[str, Facts]]:
            if sum(found.size for _, found in files) <= LITTLE:
                return read_here(files)
            self._connect(config)
            from pipeline.remote_digests import read_on_ray

            return read_on_ray(files, config.run)

        return read

    def runner(self, config: BuildConfig) -> Runner:
        """Connect to Ray, or start it.

        Raises:
            UserError: no cluster answers, or it lacks what the settings ask for.
        """
        if self._runner is None:
            self._connect(config)
            from pipeline.runner import Runner

            self._runner = Runner(self.uri, config, self.board(config))
            self._stack.callback(self._runner.close)
        return self._runner

    def dismiss(self) -> None:
        """Let all workers go; others may have use for their places."""
        if self._runner is not None:
            self._runner.close()

    def _connect(self, config: BuildConfig) -> None:
        if not self._connected:
            from pipeline.session import ray_session

            self._stack.enter_context(ray_session(config.run))
            self._connected = True

    def __enter__(self) -> Site:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._board is not None:
                outcome: Outcome = "done" if kind is None else "stopped" if isinstance(value, Stopped) else "failed"
                self._board.record(outcome, str(value) if outcome == "failed" else "")
        finally:
            self._stack.close()


class Crew:
    """Runs tasks and collects what came of them.

    Attributes:
        columns: (stage, shard) -> column.
        packed: shard -> record.
        scans: task -> what was found in a recording.
        ran, packs: columns and packed shards that were computed, not found.
    """

    def __init__(self, site: Site, config: BuildConfig, shards: Mapping[str, list[Clip]]) -> None:
        self._site, self._config, self._shards = site, config, shards
        self._given: set[tuple[str, str]] = set()
        self.columns: dict[tuple[str, str], ColumnRef] = {}
        self.packed: dict[str, Packed] = {}
        self.scans: dict[str, Scan] = {}
        self.ran = self.packs = 0

    def run(self, tasks: Sequence[Work], codebook: str | None, follow: Follow | None = None) -> None:
        """Run tasks with the dataset's own centroids, by object name.

        Args:
            follow: is called when the fit of centroids among the tasks is done; a task that was given before is left
                out of what it gives.

        Raises:
            UserError: a task failed for good; what was done is kept.
        """
        if not tasks:
            return

        def on_done(task: Work, done: Done) -> list[Order]:
            self._note(task, done)
            if not isinstance(task, FitTask) or follow is None:
                return []
            assert done.result is None or isinstance(done.result, Codebook)
            more, name = follow(done.result)
            return self._orders(more, name)

        self._execute(self._orders(tasks, codebook), on_done)

    def _execute(self, orders: list[Order], on_done: Callable[[Work, Done], list[Order]]) -> None:
        self._site.runner(self._config).execute(orders, on_done)

    def _orders(self, tasks: Sequence[Work], codebook: str | None) -> list[Order]:
        new = {(task.stage, task.shard): task for task in tasks}
        new = {place: task for place, task in new.items() if place not in self._given}
        self._given |= new.keys()
        return [Order(task, self._clips(task), codebook) for task in new.values()]

    def _clips(self, task: Work) -> list[Clip]:
        if isinstance(task, FitTask):
            return [clip for shard in task.marks for clip in self._shards[shard]]
        return self._shards[task.shard]

    def _note(self, task: Work, done: Done) -> None:
        if isinstance(done.result, Scan):
            if done.cost is None and done.ran:  # given up: no worker is there to store it
                publish_record(Dataset(self._site.uri), done.result)
            self.scans[task.shard] = done.result
        elif isinstance(done.result, Packed):
            self.packed[task.shard] = done.result
            self.packs += done.ran and done.result.packed is not None
        elif isinstance(done.result, ColumnRef):
            self.columns[task.stage, task.shard] = done.result
            self.ran += done.ran
