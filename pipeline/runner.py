"""Ray: pools of worker actors, one per distinct resource request, fed with tasks whose inputs exist."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.columns import Task
from pipeline.config import BuildConfig, RunConfig
from pipeline.pack import PackTask
from pipeline.recordings import SegmentTask
from pipeline.registry import STAGES, make_stage
from pipeline.stage import Clip, Resources
from pipeline.worker import Done, Worker, worker_env
from shards.errors import UserError
from shards.signals import check_signals

# Quiet, and nothing leaves the machine: no usage report, no look for `uv`, no token between local processes.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# A lost node is noticed within seconds.
os.environ.setdefault("RAY_health_check_period_ms", "1000")
os.environ.setdefault("RAY_health_check_timeout_ms", "3000")
os.environ.setdefault("RAY_health_check_failure_threshold", "3")

import ray
import ray.exceptions

Work = Task | PackTask | SegmentTask


@contextmanager
def ray_session(run: RunConfig) -> Iterator[None]:
    """Connect to the cluster of `run`, or start Ray on this machine for the time of the block.

    Raises:
        UserError: no cluster answers at the address.
    """
    # Ray takes SIGTERM for itself; who called us keeps it.
    handler = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if run.ray_address is not None:
            _knock(run.ray_address)
            ray.init(address=run.ray_address, **quiet)
        else:
            memory = run.object_store_mb << 20
            # "local": never join whatever cluster this machine or RAY_ADDRESS happens to know.
            ray.init(address="local", num_cpus=run.cpus, object_store_memory=memory, include_dashboard=False, **quiet)
    except Exception as error:  # Ray raises all kinds here, a bare Exception among them
        what = f"no cluster at {run.ray_address!r}" if run.ray_address else "could not be started"
        raise UserError(f"ray: {what} ({' '.join(str(error).split())})") from None
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError where nobody listens; Ray itself would try for minutes."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def _failure(task: Work, error: ray.exceptions.RayTaskError) -> UserError:
    cause = error.cause
    if isinstance(cause, UserError):
        return cause
    where = f"stage {task.stage}, shard {task.shard}"
    if isinstance(cause, OSError):
        # A full disk, missing permission: the machine's words are the clearest.
        name = f"{cause.filename}: " if cause.filename else ""
        return UserError(f"{where}: {name}{cause.strerror or cause}; what is done is kept, build again to go on")
    return UserError(f"{where}: {cause!r}\n{error}")


def actor_options(resources: Resources) -> dict[str, Any]:
    """What Ray is told of a worker."""
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "runtime_env": {"env_vars": worker_env(resources)},
    }


def check_room(workers: Iterable[Resources], machines: Sequence[Mapping[str, float]]) -> None:
    """See that each kind of worker finds room on some machine.

    Args:
        machines: what each machine of the cluster has, as Ray names it.

    Raises:
        UserError: what is asked for is on no machine.
    """
    for wanted in workers:
        if any(wanted.cpus <= has.get("CPU", 0) and wanted.gpus <= has.get("GPU", 0) for has in machines):
            continue
        cpus, gpus = (max((has.get(name, 0) for has in machines), default=0) for name in ("CPU", "GPU"))
        if wanted.gpus > gpus:
            there = f"no machine of the cluster has more than {gpus:g}" if gpus else "the cluster has no GPU"
            raise UserError(f"run.gpus = {wanted.gpus:g}, but {there}; run.gpus=0 keeps networks on processors")
        if wanted.cpus > cpus:
            raise UserError(
                f"a worker needs {wanted.cpus:g} processor, but no machine of the cluster has more than {cpus:g}"
            )
        raise UserError(
            f"a worker needs {wanted.cpus:g} processor and {wanted.gpus:g} GPU (run.gpus), but no machine has both"
        )


@dataclass
class _Pool:
    """Workers of one resource request; `busy` maps the running call to its worker and task."""

    resources: Resources
    idle: list[Any] = field(default_factory=list)
    busy: dict[Any, tuple[Any, Work]] = field(default_factory=dict)


class Runner:
    """Runs tasks on the Ray session that is open; workers stay from one `execute` to the next, until `close`.

    Raises:
        UserError: no machine has what a worker needs.
    """

    def __init__(self, uri: str, config: BuildConfig, shards: Mapping[str, list[Clip]]) -> None:
        self._args, self._shards = (uri, config), shards
        self._retries = config.run.retries
        stages = {kind.name: make_stage(kind, config, None) for kind in STAGES}
        self._resources = {name: stage.needs(config.run.gpus) for name, stage in stages.items()}
        self._resources |= {"pack": Resources(), "segment": self._resources["faces"]}
        self._pools: dict[Resources, _Pool] = {}
        check_room(self._resources.values(), [node["Resources"] for node in ray.nodes() if node["Alive"]])
        self._capacity = ray.cluster_resources()

    def execute(self, tasks: Sequence[Work], codebook: str | None, on_done: Callable[[Work, Done], None]) -> None:
        """Run all tasks, each once the tasks it reads from are done.

        Args:
            codebook: object name of the dataset's own centroids.
            on_done: called with each task and what came of it.

        Raises:
            UserError: a task lost its worker more than `retries` times, asked for more than the cluster has, or failed.
        """
        open_marks = {(task.stage, task.shard): task for task in tasks}
        waiting = list(tasks)
        attempts: dict[tuple[str, str], int] = {}
        while waiting or any(pool.busy for pool in self._pools.values()):
            waiting = self._hand_out(waiting, open_marks, codebook)
            calls = [call for pool in self._pools.values() for call in pool.busy]
            if not calls:
                raise UserError(f"ray: no room for {waiting[0].stage} (cluster has {self._capacity})")
            check_signals()
            try:
                ready = ray.wait(calls, num_returns=1, timeout=1)[0]
            except SystemError:
                check_signals()  # a signal that came inside Ray's own code shows as this
                raise
            if not ready:
                self._look_around()
            for call in ready:
                pool = next(pool for pool in self._pools.values() if call in pool.busy)
                actor, task = pool.busy.pop(call)
                place = (task.stage, task.shard)
                try:
                    done = ray.get(call)
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
                    ray.kill(actor)  # where it is only out of reach, it must not hold its place
                    attempts[place] = attempts.get(place, 0) + 1
                    if attempts[place] > self._retries:
                        raise UserError(
                            f"stage {task.stage}, shard {task.shard}: the worker died {attempts[place]} times "
                            "(out of memory, or a crash in native code: Ray's worker-*.err logs say which); "
                            "build again to resume"
                        ) from None
                    waiting.append(task)
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise _failure(task, error) from None
                pool.idle.append(actor)
                del open_marks[place]
                on_done(task, done)

    def _look_around(self) -> None:
        """Nothing came back for a while: see what is left of the cluster.

        Workers that replace those of a lost node wait for room that idle ones elsewhere hold, so these make way.
        """
        if not any(node["Alive"] for node in ray.nodes()):
            # Calls to workers of the only node that there was never come back.
            raise UserError("ray: its node died (killed or out of memory); what is done is kept, build again")
        self._capacity = ray.cluster_resources()
        while not self._fits(Resources(cpus=0)):
            pool = next((pool for pool in self._pools.values() if pool.idle), None)
            if pool is None:
                return
            ray.kill(pool.idle.pop())

    def close(self) -> None:
        """Stop all workers."""
        for pool in self._pools.values():
            for actor in [*pool.idle, *(actor for actor, _ in pool.busy.values())]:
                ray.kill(actor)
        self._pools.clear()

    def _hand_out(
        self, waiting: list[Work], open_marks: dict[tuple[str, str], Work], codebook: str | None
    ) -> list[Work]:
        """Give ready tasks to workers; returns those that still wait."""
        left = []
        for task in waiting:
            ready = not any((stage, task.shard) in open_marks for stage in task.reads)
            actor = self._worker(self._resources[task.stage]) if ready else None
            if actor is None:
                left.append(task)
            else:
                pool = self._pools[self._resources[task.stage]]
                pool.busy[actor.run.remote(task, self._shards[task.shard], codebook)] = (actor, task)
        return left

    def _worker(self, resources: Resources) -> Any | None:
        """An idle worker with these resources, a new one where the cluster has room, or None."""
        pool = self._pools.setdefault(resources, _Pool(resources))
        if pool.idle:
            return pool.idle.pop()
        while not self._fits(resources):
            other = next((other for other in self._pools.values() if other.idle), None)
            if other is None:
                return None
            ray.kill(other.idle.pop())
        return ray.remote(Worker).options(**actor_options(resources)).remote(resources, *self._args)

    def _fits(self, wanted: Resources) -> bool:
        pools = self._pools.values()
        cpus = sum(pool.resources.cpus * (len(pool.idle) + len(pool.busy)) for pool in pools)
        gpus = sum(pool.resources.gpus * (len(pool.idle) + len(pool.busy)) for pool in pools)
        return (
            cpus + wanted.cpus <= self._capacity.get("CPU", 0) + 1e-6
            and gpus + wanted.gpus <= self._capacity.get("GPU", 0) + 1e-6
        )
