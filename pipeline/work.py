"""The computing part of a build: one Ray session, started only when there is something to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.columns import Task
from pipeline.config import BuildConfig
from pipeline.pack import Packed, PackTask
from pipeline.recordings import Scan, SegmentTask
from pipeline.stage import Clip
from shards.dataset import Dataset
from shards.manifest import ColumnRef
from shards.progress import Progress

if TYPE_CHECKING:
    from pipeline.runner import Runner
    from pipeline.worker import Done


class Crew:
    """Runs tasks and collects what came of them; use as a context manager.

    Attributes:
        columns: (stage, shard) -> column.
        packed: shard -> record.
        scans: task -> what was found in a recording.
        ran, packs: columns and packed shards that were computed, not found.
    """

    def __init__(self, dataset: Dataset, config: BuildConfig, shards: Mapping[str, list[Clip]]) -> None:
        self._dataset, self._config, self._shards = dataset, config, shards
        self._stack = ExitStack()
        self._runner: Runner | None = None
        self.columns: dict[tuple[str, str], ColumnRef] = {}
        self.packed: dict[str, Packed] = {}
        self.scans: dict[str, Scan] = {}
        self.ran = self.packs = 0

    def run(self, tasks: Sequence[Task | PackTask | SegmentTask], codebook: str | None) -> None:
        """Run tasks with the dataset's own centroids, by object name.

        Raises:
            UserError: a task failed for good; what was done is kept.
        """
        if not tasks:
            return
        runner = self.start()
        total = sum(len(self._shards[task.shard]) for task in tasks)
        scans = all(isinstance(task, SegmentTask) for task in tasks)
        with Progress(*(("segment", total, "recordings") if scans else ("build", total, "clip stages"))) as progress:

            def note(task: Task | PackTask | SegmentTask, done: Done) -> None:
                if isinstance(done.result, Scan):
                    self.scans[task.shard] = done.result
                elif isinstance(done.result, Packed):
                    self.packed[task.shard] = done.result
                    self.packs += done.ran and done.result.packed is not None
                else:
                    self.columns[task.stage, task.shard] = done.result
                    self.ran += done.ran
                clips = self._shards[task.shard]
                what = clips[0].key if scans else f"{task.stage} {task.shard}"
                progress.advance(len(clips), what)

            runner.execute(tasks, codebook, note)

    def start(self) -> Runner:
        """Connect to Ray, or start it.

        Raises:
            UserError: no cluster answers, or it lacks what the settings ask for.
        """
        if self._runner is None:
            from pipeline.runner import Runner, ray_session

            self._stack.enter_context(ray_session(self._config.run))
            self._runner = Runner(self._dataset.store.uri, self._config, self._shards)
            self._stack.callback(self._runner.close)
        return self._runner

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
