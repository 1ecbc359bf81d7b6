"""What runs inside a worker process: threads pinned, stages set up on first use and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.columns import build_column, load_column
from pipeline.config import BuildConfig
from pipeline.plan import Task, make_stage
from pipeline.registry import STAGES
from pipeline.stage import Clip, Resources, Stage
from shards.dataset import Dataset

# BLAS, OpenMP and friends read these when they load; the workers' own share is one thread each.
WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "OPENCV_FOR_THREADS_NUM": "1",
}
_KINDS = {kind.name: kind for kind in STAGES}


class Worker:
    """A process of a pool. Only tasks come in and counts go out; fields travel through storage.

    Args:
        resources: what the worker occupies; it runs as many threads as it has processors.
        uri: of the dataset.
        config: of the build.
        centroids: the dataset's own codebook, where the configuration names none.
    """

    def __init__(self, resources: Resources, uri: str, config: BuildConfig, centroids: Path | None) -> None:
        self._threads = max(1, int(resources.cpus))
        self._dataset = Dataset(uri)
        self._config, self._centroids = config, centroids
        self._stages: dict[str, Stage[Any]] = {}

    def run(self, task: Task, clips: list[Clip]) -> tuple[int, int]:
        """Build the task's column for the clips of its shard; returns (clips kept, clips refused)."""
        reads = []
        for stage, mark in task.reads.items():
            column = load_column(self._dataset, stage, task.shard, mark)
            assert column is not None, f"{task.stage} started before {stage} was done"
            reads.append(column)
        column = build_column(
            self._dataset,
            self._stage(task.stage),
            task.weights,
            task.shard,
            task.fingerprint,
            clips,
            reads,
        )
        return len(column.clips), len(column.refused)

    def _stage(self, name: str) -> Stage[Any]:
        if name not in self._stages:
            pin_threads(self._threads)
            stage = make_stage(_KINDS[name], self._config, self._centroids)
            stage.setup()
            self._stages[name] = stage
        return self._stages[name]


def pin_threads(count: int) -> None:
    """Hold OpenCV and torch to `count` threads; two unpinned workers on two cores slow each other two- to threefold."""
    import cv2
    import torch

    cv2.setNumThreads(count)
    torch.set_num_threads(count)
