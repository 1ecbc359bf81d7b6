"""Workers of a build on Ray: pools by what a worker occupies, which grow and shrink with the work and the cluster."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import BuildConfig
from pipeline.cost import Look, Node
from pipeline.schedule import Job, Schedule
from pipeline.session import actor_options
from pipeline.stage import Resources
from pipeline.worker import Worker
from shards.errors import UserError

import ray  # isort: skip  # after pipeline.session, which sets its environment
import ray.exceptions  # isort: skip

_IDLE = 60.0
"""Seconds after which a worker without work makes its machine free, so that an autoscaler can end that."""
_SLOW = 10.0
"""Seconds in which a worker answers for which there is room."""
_STILLBORN = 3
"""So many workers in a row that die before they answer say that it is not their machine."""


@dataclass(eq=False)
class Member:
    """A worker: `host`, `node` and `notes` as it said when it first answered."""

    actor: Any
    kind: Resources
    host: str = ""
    node: str = ""
    notes: str = ""
    since: float = field(default_factory=time.monotonic)

    def call(self, name: str) -> Any:
        """Call a method that is answered while the worker works."""
        return getattr(self.actor, name).options(concurrency_group="look").remote()


class Pools:
    """Workers that start, that are idle and that are busy. Work is given only to those that answered, so one for which
    there is no room yet holds up nothing: it is what an autoscaler goes by.

    Args:
        grow: whether the cluster may change while the build runs.

    Attributes:
        starting: first look -> worker.
        busy: running call -> worker and its job.
        nodes: the machines that are alive.
    """

    def __init__(self, uri: str, config: BuildConfig, grow: bool) -> None:
        self._args, self._run, self._grow = (uri, config), config.run, grow
        remote: Any = ray.remote
        self._hired = remote(concurrency_groups={"look": 1})(Worker)
        self._stillborn = 0
        self.starting: dict[Any, Member] = {}
        self.idle: dict[Resources, list[Member]] = {}
        self.busy: dict[Any, tuple[Member, Job]] = {}
        self.nodes: list[Node] = []

    def hire(self, schedule: Schedule) -> None:
        """Ask for the workers that would have something to do at once, as far as there is or may be room."""
        for kind in schedule.kinds():
            wanted = schedule.ready(kind) - len(self.idle.get(kind, [])) - sum(m.kind == kind for m in self._new())
            while wanted > 0 and self._has_room(kind, schedule):
                member = Member(self._hired.options(**actor_options(kind)).remote(kind, *self._args), kind)
                self.starting[member.call("look")] = member
                wanted -= 1

    def answered(self, call: Any) -> None:
        """A worker that started has said where it is, or died of it.

        Raises:
            UserError: worker after worker dies before it answers.
        """
        member = self.starting.pop(call)
        try:
            look: Look = ray.get(call)
        except ray.exceptions.RayError as error:
            self.dismiss(member)
            self._stillborn += 1
            if self._stillborn >= _STILLBORN:
                words = " ".join(str(error).split())[-600:]
                raise UserError(f"ray: workers die before they can do anything: {words}") from None
            return
        self._stillborn = 0
        member.host, member.node, member.notes = look.host, look.node, look.notes
        self.rest(member)

    def rest(self, member: Member) -> None:
        """It has no work now."""
        member.since = time.monotonic()
        self.idle.setdefault(member.kind, []).append(member)

    def make_way(self, schedule: Schedule) -> None:
        """Send idle workers home: where they hold the place of a kind that has work and nobody to do it, and, where
        machines come and go, those that had nothing to do for long."""
        for starved in schedule.kinds():
            if any(member.kind == starved for member in self._placed()):
                continue
            asked = [member for member in self._new() if member.kind == starved]
            late = time.monotonic() - _SLOW
            if any(m.since > late for m in asked) or (not asked and self._has_room(starved, schedule)):
                continue
            fit = {node.id for node in self.nodes if node.cpus >= starved.cpus and node.gpus >= starved.gpus}
            self._dismiss_one([m for kind, idle in self.idle.items() if kind != starved for m in idle if m.node in fit])
        if self._grow:
            old = time.monotonic() - _IDLE
            idle = [m for kind, members in self.idle.items() if not schedule.ready(kind) for m in members]
            for member in idle:
                if member.since < old:
                    self._dismiss_one([member])

    def share(self, member: Member) -> float:
        """Bytes of its machine's memory that are this worker's, by the processors that it occupies."""
        node = next((node for node in self.nodes if node.id == member.node), None)
        return node.memory * member.kind.cpus / max(1.0, node.cpus) if node else 0.0

    def at_work(self) -> bool:
        """Whether any worker has answered and is still there."""
        return bool(self._placed())

    def _dismiss_one(self, members: list[Member]) -> None:
        if members:
            self.idle[members[0].kind].remove(members[0])
            self.dismiss(members[0])

    def dismiss(self, member: Member) -> None:
        """End its process; where it is only out of reach, it must not hold its place."""
        ray.kill(member.actor)

    def close(self) -> None:
        """End all workers."""
        for member in self._members():
            self.dismiss(member)
        self.starting.clear()
        self.idle.clear()
        self.busy.clear()

    def _new(self) -> list[Member]:
        return [*self.starting.values()]

    def _placed(self) -> list[Member]:
        return [*(m for members in self.idle.values() for m in members), *(member for member, _ in self.busy.values())]

    def _members(self) -> list[Member]:
        return [*self._new(), *self._placed()]

    def _has_room(self, kind: Resources, schedule: Schedule) -> bool:
        """Whether one more may be asked for. Workers without a GPU leave the processors that those with one need."""
        cpus, gpus = sum(node.cpus for node in self.nodes), sum(node.gpus for node in self.nodes)
        if self._grow:
            cpus, gpus = max(cpus, self._run.max_cpus or 0), max(gpus, self._run.max_gpus or 0)
        members = self._members()
        cpus -= kind.cpus + sum(member.kind.cpus for member in members)
        gpus -= kind.gpus + sum(member.kind.gpus for member in members)
        if not kind.gpus:
            for other in (other for other in schedule.all_kinds() if other.gpus and schedule.coming(other)):
                more = min(int(max(0.0, gpus) / other.gpus + 1e-6), schedule.coming(other))
                cpus -= more * other.cpus
        return cpus >= -1e-6 and gpus >= -1e-6
