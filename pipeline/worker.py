"""What runs inside a worker process: threads pinned, stages set up on first use and kept."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import metrics
from pipeline.codebook import Care, FitTask, fit
from pipeline.columns import Column, Refused, Task, load_column
from pipeline.config import BuildConfig
from pipeline.cost import Cost, Look
from pipeline.fingerprint import code_digest, recipe_key, recipe_of
from pipeline.in_flight import Hand
from pipeline.pack import Packed, PackTask, load_packed, pack_shard
from pipeline.recordings import Scan, SegmentTask, make_faces, scan_recipe, scan_recording
from pipeline.records import load_record
from pipeline.registry import KINDS, make_stage
from pipeline.run_stage import build_column
from pipeline.stage import Clip, Resources, Stage
from pipeline.stages.faces import Faces
from pipeline.usage import gpu_share, usage
from shards.dataset import Dataset
from shards.errors import UserError
from shards.local_store import local_copy
from shards.manifest import Codebook, ColumnRef, Recipe, difference

Work = Task | PackTask | SegmentTask | FitTask

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
class Order:
    """A task with all that it takes.

    Attributes:
        clips: of the shard, ordered by key; or the one recording.
        codebook: object name of the dataset's own centroids, where the configuration names none.
        alone: keys of clips to be done first and one by one: one of them may have ended a worker.
        given_up: clips that are not tried again.
    """

    task: Work
    clips: Sequence[Clip]
    codebook: str | None = None
    alone: tuple[str, ...] = ()
    given_up: tuple[Refused, ...] = ()


@dataclass(frozen=True)
class Done:
    """What came of a task.

    Attributes:
        result: a column, a packed shard, what is in a recording, or centroids (None where there is no sound).
        ran: whether it was computed, not found.
        cost: what that took; None where it was found.
        note: a line for the user, or empty.
    """

    result: ColumnRef | Packed | Scan | Codebook | None
    ran: bool
    cost: Cost | None = None
    note: str = ""


class Worker:
    """A process of a pool. Only orders come in and records go out; fields travel through storage.

    Args:
        resources: what the worker occupies; it runs as many threads as it has processors.
        uri: of the dataset.
        config: of the build.
    """

    def __init__(self, resources: Resources, uri: str, config: BuildConfig) -> None:
        self._resources = resources
        self._threads = max(1, int(resources.cpus))
        self._dataset = Dataset(uri)
        self._config = config
        self._stages: dict[tuple[str, bool], Stage[Any]] = {}
        self._detector: Faces | None = None
        self._hand = Hand(config.run.clip_timeout, config.run.memory_gb * 1e9)
        self._host, self._node = socket.gethostname(), _node()
        self._setup = 0.0

    def look(self) -> Look:
        """What it is at; answered while it works, by a thread of its own."""
        hand, used = self._hand, usage()
        return Look(
            stage=hand.stage,
            shard=hand.shard,
            done=hand.done,
            total=hand.total,
            refused=hand.refused,
            since=time.monotonic() - hand.changed,
            rss=used.rss,
            cpu=used.cpu,
            gpu=gpu_share() if self._resources.gpus else None,
            host=self._host,
            node=self._node,
            notes=str(hand.path),
            code=code_digest(),
        )

    def run(self, order: Order) -> Done:
        """Do a task for the clips of its shard (or for one recording), unless its result is there already."""
        begin, self._setup = time.perf_counter(), 0.0
        task = order.task
        with self._hand.task(task.stage, task.shard, len(order.clips)):
            done, compute, read, written = self._run(order)
        if not done.ran:
            return done
        result = done.result
        # Of a fit, which looks at a sample, they are not counted.
        clips, refused = 0 if isinstance(task, FitTask) else len(order.clips), 0
        if isinstance(result, ColumnRef):
            clips, refused = result.clips, result.refused
        elif isinstance(result, Packed):
            refused = len(result.lost)
            clips -= refused
        cost = Cost(
            seconds=time.perf_counter() - begin,
            compute=compute,
            setup=self._setup,
            read=read,
            written=written,
            peak=usage().peak,
            host=self._host,
            node=self._node,
            clips=clips,
            refused=refused,
        )
        metrics.task(task.stage, cost)
        return Done(result, True, cost, done.note)

    def _run(self, order: Order) -> tuple[Done, float, int, int]:
        """What came of it, seconds inside the stage, bytes of columns read and bytes written."""
        task, begin = order.task, time.perf_counter()
        if isinstance(task, FitTask):
            places = {clip.key: place for place, clip in enumerate(order.clips)}
            skipped = {refused.key for refused in order.given_up}
            book, note = fit(self._dataset, task, self._config, Care(self._hand, places, order.alone, skipped))
            return Done(book, bool(note), note=note), time.perf_counter() - begin, 0, book.bytes if book else 0
        if isinstance(task, SegmentTask):
            scan = load_record(self._dataset, Scan, f"{task.shard}.json")
            if scan:
                return Done(scan, False), 0.0, 0, 0
            scan = self._scan(task, order.clips[0])
            return Done(scan, True), time.perf_counter() - begin - self._setup, 0, 0
        if isinstance(task, PackTask):
            packed = load_packed(self._dataset, task.shard, task.inputs)
            if packed:
                return Done(packed, False), 0.0, 0, 0
            columns = self._columns(task)
            packed = pack_shard(self._dataset, task, columns, order.clips)
            read = sum(column.held(task.fields) for column in columns)
            return Done(packed, True), 0.0, read, packed.packed.bytes if packed.packed else 0
        column = load_column(self._dataset, task.stage, task.shard, task.fingerprint)
        if column:
            return Done(column.ref(recipe_key(task.recipe)), False), 0.0, 0, 0
        kept = load_column(self._dataset, task.stage, task.shard, task.reuse) if task.reuse else None
        task = task if kept else task.model_copy(update={"reuse": None})
        stage = self._stage(task, order.codebook)
        column, effort = build_column(
            self._dataset,
            stage,
            task,
            order.clips,
            [] if kept else self._columns(task),
            kept,
            self._hand,
            order.alone,
            order.given_up,
        )
        return Done(column.ref(recipe_key(task.recipe)), True), effort.compute, effort.read, column.bytes

    def _scan(self, task: SegmentTask, recording: Clip) -> Scan:
        if self._detector is None:
            begin = time.perf_counter()
            faces = make_faces(self._config)
            _check(task.stage, task.recipe, scan_recipe(faces, self._config))
            faces.setup()
            pin_threads(self._threads)
            self._detector = faces
            self._setup += time.perf_counter() - begin
        detector = self._detector
        self._hand.take(0)

        def detect(frames: Sequence[Any]) -> list[Any]:
            self._hand.beat()
            return detector.detect(frames)

        scan = scan_recording(self._dataset, task, recording, self._config, detect, detector.batch)
        self._hand.put(0, scan.refused.reason.value if scan.refused else None)
        return scan

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
            begin = time.perf_counter()
            centroids = local_copy(self._dataset.store, codebook) if codebook else None
            # Centroids that the settings name lie on the machine that builds, and in the dataset.
            speech = self._config.speech.model_copy(update={"centroids": centroids or self._config.speech.centroids})
            stage = make_stage(KINDS[name], self._config.model_copy(update={"speech": speech}), None)
            _check(name, task.recipe, recipe_of(stage))
            if reuse:
                stage.setup_reuse()
            else:
                stage.setup()
            pin_threads(self._threads)
            self._stages[name, reuse] = stage
            self._setup += time.perf_counter() - begin
        return self._stages[name, reuse]


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


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
