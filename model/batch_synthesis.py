"""Speech for many clips on Ray: every worker holds the networks, and a clip that kills one costs itself alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from model.speech_record import Failure, Task
from model.synthesize import Job, Speaker, Speech
from pipeline.config import RunConfig
from pipeline.session import actor_options, answers, check_room, failure, nodes, places, ray_session
from pipeline.stage import Resources
from pipeline.worker import pin_threads
from shards.config import load_config
from shards.errors import UserError

import ray  # isort: skip  # after pipeline.session, which sets its environment
import ray.exceptions  # isort: skip

ATTEMPTS = 2
"""How often a clip is tried that takes its worker with it."""
STILLBORN = 4
"""As many deaths without a clip done say that it is not the clips."""


class Worker:
    """A process that speaks; files are written where it runs, only records come back."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._speaker: Speaker | None = None

    def run(self, task: Task) -> Speech | Failure:
        # Not in the constructor, whose errors Ray would report as a worker's death.
        if self._speaker is None:
            self._speaker = Speaker(self._job)
            pin_threads(self._job.threads)
        return self._speaker.attempt(task)


def on_ray(
    job: Job, tasks: Sequence[Task], workers: int, gpus: float, ray_address: str | None
) -> Iterator[Speech | Failure]:
    """What came of each task, in their order.

    Args:
        workers: most processes at once; 0 takes as many as the cluster has room for.
        gpus: share of a GPU for each.
        ray_address: of a running cluster, whose machines must see the files under the same paths; None starts Ray here.

    Raises:
        UserError: no cluster there, no room for a worker, or an error that concerns more than one clip.
    """
    if not tasks:
        return
    wanted = Resources(cpus=job.threads, gpus=gpus)
    run = {"ray_address": ray_address, "gpus": gpus}
    if ray_address is None:
        run["cpus"] = max(workers, 1) * job.threads
    with ray_session(load_config(RunConfig, base=run)):
        there = [node for node in nodes() if node.alive]
        check_room([wanted], [{"CPU": node.cpus, "GPU": node.gpus} for node in there])
        room = sum(places(node, wanted) for node in there)
        crew = _Crew(job, wanted, min(workers or room, room, len(tasks)))
        try:
            yield from crew.run(tasks)
        finally:
            crew.close()


class _Crew:
    """`size` workers, each with one task at a time."""

    def __init__(self, job: Job, resources: Resources, size: int) -> None:
        self._job, self._resources, self._size = job, resources, size
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, int]] = {}

    def run(self, tasks: Sequence[Task]) -> Iterator[Speech | Failure]:
        waiting = deque(range(len(tasks)))
        attempts = [0] * len(tasks)
        done: dict[int, Speech | Failure] = {}
        deaths = given = spoken = 0
        while given < len(tasks):
            while waiting and len(self._busy) < self._size:
                number = waiting.popleft()
                actor = self._idle.pop() if self._idle else self._hire()
                self._busy[actor.run.remote(tasks[number])] = (actor, number)
            for call in answers(list(self._busy)):
                actor, number = self._busy.pop(call)
                try:
                    done[number] = ray.get(call)
                    self._idle.append(actor)
                    spoken += 1
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
                    ray.kill(actor)
                    deaths, attempts[number] = deaths + 1, attempts[number] + 1
                    if not spoken and deaths >= STILLBORN:
                        raise UserError(
                            f"{deaths} workers died before any clip was done (out of memory, or a crash in native "
                            "code: Ray's worker-*.err logs say which); try fewer --workers"
                        ) from None
                    if attempts[number] < ATTEMPTS:
                        waiting.appendleft(number)
                    else:
                        done[number] = _death(tasks[number])
                except ray.exceptions.RayTaskError as error:
                    raise failure(tasks[number].clip.uri, error, "run again to go on") from None
            while given in done:
                yield done.pop(given)
                given += 1

    def _hire(self) -> Any:
        return ray.remote(Worker).options(**actor_options(self._resources)).remote(self._job)

    def close(self) -> None:
        """Stop all workers."""
        for actor in [*self._idle, *(actor for actor, _ in self._busy.values())]:
            ray.kill(actor)


def _death(task: Task) -> Failure:
    words = f"its worker died {ATTEMPTS} times (out of memory, or a crash in native code)"
    return Failure(task.key, task.clip.uri, "worker_died", words)
