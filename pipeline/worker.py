"""What runs inside a worker process: threads pinned, stages set up on first use and kept."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from typing import Any

from pipeline.columns import Column, Task, build_column, load_column
from pipeline.config import BuildConfig
from pipeline.fingerprint import recipe_key, recipe_of
from pipeline.pack import Packed, PackTask, load_packed, pack_shard
from pipeline.recordings import Scan, SegmentTask, make_faces, scan_recipe, scan_recording
from pipeline.records import load_record
from pipeline.registry import KINDS, make_stage
from pipeline.stage import Clip, Resources, Stage
from pipeline.stages.faces import Faces
from shards.dataset import Dataset
from shards.errors import UserError
from shards.local_store import local_copy
from shards.manifest import ColumnRef, Recipe, difference

# BLAS, OpenMP and friends read these when they load; the workers' own share is one thread each.
WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "OPENCV_FOR_THREADS_NUM": "1",
}


def worker_env(resources: Resources) -> dict[str, str]:
    """Environment of a worker's process. Ray hides nothing from one that asks for no GPU, so that is done here."""
    return WORKER_ENV if resources.gpus else {**WORKER_ENV, "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Done:
    """What came of a task: a column, a packed shard or what is in a recording; and whether it was computed or found."""

    result: ColumnRef | Packed | Scan
    ran: bool


class Worker:
    """A process of a pool. Only tasks come in and records go out; fields travel through storage.

    Args:
        resources: what the worker occupies; it runs as many threads as it has processors.
        uri: of the dataset.
        config: of the build.
    """

    def __init__(self, resources: Resources, uri: str, config: BuildConfig) -> None:
        self._threads = max(1, int(resources.cpus))
        self._dataset = Dataset(uri)
        self._config = config
        self._stages: dict[tuple[str, bool], Stage[Any]] = {}
        self._detector: Faces | None = None

    def run(self, task: Task | PackTask | SegmentTask, clips: list[Clip], codebook: str | None) -> Done:
        """Do a task for the clips of its shard (or for one recording), unless its result is there already.

        Args:
            codebook: object name of the dataset's own centroids, where the configuration names none.
        """
        if isinstance(task, SegmentTask):
            scan = load_record(self._dataset, Scan, f"{task.shard}.json")
            return Done(scan or self._scan(task, clips[0]), scan is None)
        if isinstance(task, PackTask):
            packed = load_packed(self._dataset, task.shard, task.inputs)
            return Done(packed or pack_shard(self._dataset, task, self._columns(task), clips), packed is None)
        column = load_column(self._dataset, task.stage, task.shard, task.fingerprint)
        ran = column is None
        if column is None:
            kept = load_column(self._dataset, task.stage, task.shard, task.reuse) if task.reuse else None
            task = task if kept else task.model_copy(update={"reuse": None})
            stage = self._stage(task, codebook)
            column = build_column(self._dataset, stage, task, clips, [] if kept else self._columns(task), kept)
        return Done(column.ref(recipe_key(task.recipe)), ran)

    def _scan(self, task: SegmentTask, recording: Clip) -> Scan:
        if self._detector is None:
            faces = make_faces(self._config)
            _check(task.stage, task.recipe, scan_recipe(faces, self._config))
            faces.setup()
            pin_threads(self._threads)
            self._detector = faces
        return scan_recording(self._dataset, task, recording, self._config, self._detector.detect, self._detector.batch)

    def _columns(self, task: Task | PackTask) -> list[Column]:
        found = []
        for stage, mark in task.reads.items():
            column = load_column(self._dataset, stage, task.shard, mark)
            if column is None:
                raise UserError(f"{self._dataset.uri}: column {stage} of {task.shard} is missing or cut; build again")
            found.append(column)
        return found

    def _stage(self, task: Task, codebook: str | None) -> Stage[Any]:
        name, reuse = task.stage, task.reuse is not None
        if (name, reuse) not in self._stages:
            centroids = local_copy(self._dataset.store, codebook) if codebook else None
            stage = make_stage(KINDS[name], self._config, centroids)
            _check(name, task.recipe, recipe_of(stage))
            if reuse:
                stage.setup_reuse()
            else:
                stage.setup()
            pin_threads(self._threads)
            self._stages[name, reuse] = stage
        return self._stages[name, reuse]


def _check(stage: str, planned: Recipe, here: Recipe) -> None:
    if here != planned:
        words = "; ".join(difference(planned, here)) or "settings differ"
        raise UserError(
            f"stage {stage}: the worker on {socket.gethostname()} is not what the build was planned with "
            f"({words}); install the same package and network files on every node"
        )


def pin_threads(count: int) -> None:
    """Hold OpenCV and torch, where they are loaded, to `count` threads; two unpinned workers on two cores slow each
    other two- to threefold."""
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
