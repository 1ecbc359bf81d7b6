"""Which task comes next: each once the tasks that it reads from are done, the beginnings of long chains first."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.codebook import FitTask
from pipeline.stage import Resources
from pipeline.worker import Order, Work

Place = tuple[str, str]
"""Stage and shard."""

_SECONDS = {"codebook": 1e6, "landmarks": 3.0, "faces": 1.0, "segment": 1.0, "identity": 1.5, "lips": 0.3, "sync": 0.1}
"""Rough seconds per clip; they decide the order alone. Nothing of the units goes on before the fit of centroids."""
_LITTLE = 0.05


@dataclass(eq=False)
class Job:
    """An order on its way.

    Attributes:
        waits: tasks that must be done before.
        rank: seconds, roughly, from its begin to the end of the longest chain that follows.
        strikes: key -> workers that died with this clip in hand.
        deaths: workers that died otherwise.
        machines: that were lost with it.
        strays: workers that a machine short of memory took although they held no more than their share.
    """

    order: Order
    waits: set[Place]
    rank: float = 0.0
    strikes: Counter[str] = field(default_factory=Counter)
    deaths: int = 0
    machines: int = 0
    strays: int = 0

    @property
    def place(self) -> Place:
        """Stage and shard of its task."""
        return self.order.task.stage, self.order.task.shard


class Schedule:
    """Orders that are not done yet.

    Args:
        needs: stage -> what a worker of it occupies.
    """

    def __init__(self, needs: Mapping[str, Resources]) -> None:
        self._needs = needs
        self._open: dict[Place, Job] = {}
        self._followers: dict[Place, list[Job]] = defaultdict(list)
        self._ready: dict[Resources, list[tuple[float, int, Job]]] = defaultdict(list)
        self._count = 0
        self._coming: Counter[Resources] = Counter()

    def __len__(self) -> int:
        """Tasks that are not done."""
        return len(self._open)

    def add(self, orders: Sequence[Order]) -> None:
        """Take orders in, where tasks come after those that they read from."""
        jobs = [Job(order, set()) for order in orders]
        for job in jobs:
            self._open[job.place] = job
        for job in jobs:
            job.waits = _reads(job.order.task) & self._open.keys()
            for place in job.waits:
                self._followers[place].append(job)
        for job in reversed(jobs):
            after = max((follower.rank for follower in self._followers[job.place]), default=0.0)
            job.rank = after + _SECONDS.get(job.order.task.stage, _LITTLE) * max(1, len(job.order.clips))
        for job in jobs:
            self._coming[self.needs(job)] += 1
            if not job.waits:
                self._push(job)

    def needs(self, job: Job) -> Resources:
        """What a worker for it occupies."""
        return self._needs[job.order.task.stage]

    def kinds(self) -> list[Resources]:
        """Kinds of workers for which there is a task right now."""
        return [kind for kind, heap in self._ready.items() if heap]

    def ready(self, kind: Resources) -> int:
        """Tasks that workers of this kind could begin."""
        return len(self._ready[kind])

    def coming(self, kind: Resources) -> int:
        """Tasks for workers of this kind that none has, ready or not."""
        return self._coming[kind]

    def take(self, kind: Resources) -> Job:
        """The next task for a worker of this kind."""
        self._coming[kind] -= 1
        return heapq.heappop(self._ready[kind])[2]

    def give_back(self, job: Job) -> None:
        """It lost its worker."""
        self._coming[self.needs(job)] += 1
        self._push(job)

    def finish(self, job: Job) -> None:
        """It is done, and those that waited for it may begin."""
        del self._open[job.place]
        for follower in self._followers.pop(job.place, []):
            follower.waits.discard(job.place)
            if not follower.waits:
                self._push(follower)

    def _push(self, job: Job) -> None:
        self._count += 1
        heapq.heappush(self._ready[self.needs(job)], (-job.rank, self._count, job))


def _reads(task: Work) -> set[Place]:
    if isinstance(task, FitTask):
        return {("audio", shard) for shard in task.marks}
    return {(stage, task.shard) for stage in task.reads}
