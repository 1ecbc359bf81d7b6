"""Workers of a build on Ray: pools by what a worker occupies, which grow and shrink with the work and the cluster."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import BuildConfig
from pipeline.cost import Look, Node
from pipeline.fingerprint import code_digest
from pipeline.schedule import Job, Schedule
from pipeline.session import actor_options, places
from pipeline.stage import Resources
from pipeline.worker import Worker
from shards.errors import UserError

import ray  # isort: skip  # after pipeline.session, which sets its environment
import ray.exceptions  # isort: skip

_IDLE = 60.0
"""Seconds after which a worker without work makes its machine free, so that an autoscaler can end that."""
_SLOW = 10.0
"""Seconds in which a worker answers for which there is room."""
_HUNGER = 30.0
"""Seconds after which a kind that has work and nobody to do it takes the place of a worker that has more to do."""
_PAUSE = 5.0
"""Seconds without work after which a worker makes way for another kind that is at work already."""
_STILLBORN = 5
"""So many workers in a row that die before they answer say that it is not their machine."""
_NODE_DIED = ("node has died", "node is dead", "node was dead")
"""How Ray says that a worker went with its machine."""


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
        self._hungry: dict[Resources, float] = {}
        self.starting: dict[Any, Member] = {}
        self.idle: dict[Resources, list[Member]] = {}
        self.busy: dict[Any, tuple[Member, Job]] = {}
        self.nodes: list[Node] = []

    def see(self, nodes: list[Node]) -> None:
        """The machines that are alive now; workers that idled on others are gone with them."""
        self.nodes = nodes
        there = {node.id for node in nodes}
        self.idle = {kind: [m for m in idle if m.node in there] for kind, idle in self.idle.items()}

    def hire(self, schedule: Schedule) -> None:
        """Ask for the workers that would have something to do at once, as far as there is or may be room, and take back
        what was asked for and is not needed any more."""
        for kind in schedule.kinds():
            wanted = schedule.ready(kind) - len(self.idle.get(kind, [])) - len(self._asked(kind))
            while wanted > 0 and self._has_room(kind, schedule):
                self._hire(kind)
                wanted -= 1
        late = time.monotonic() - _SLOW
        for call, member in [*self.starting.items()]:
            if member.since < late and not schedule.coming(member.kind):
                del self.starting[call]
                self.dismiss(member)

    def _hire(self, kind: Resources) -> None:
        member = Member(self._hired.options(**actor_options(kind)).remote(kind, *self._args), kind)
        self.starting[member.call("look")] = member

    def answered(self, call: Any) -> None:
        """A worker that started has said where it is, or died of it.

        Raises:
            UserError: worker after worker dies before it answers, or one runs other code.
        """
        member = self.starting.pop(call)
        try:
            look: Look = ray.get(call)
        except ray.exceptions.RayError as error:
            self.dismiss(member)
            words = " ".join(str(error).split())
            if not any(said in words for said in _NODE_DIED):
                self._stillborn += 1
            if self._stillborn >= _STILLBORN:
                raise UserError(f"ray: workers die before they can do anything: {words[-600:]}") from None
            return
        self._stillborn = 0
        if look.code != code_digest():
            raise UserError(
                f"ray: {look.host} runs other code than this build; install the same package on every node, and start "
                "Ray anew there"
            )
        member.host, member.node, member.notes = look.host, look.node, look.notes
        self.rest(member)

    def rest(self, member: Member) -> None:
        """It has no work now."""
        member.since = time.monotonic()
        self.idle.setdefault(member.kind, []).append(member)

    def make_way(self, schedule: Schedule) -> None:
        """Send idle workers home that hold the place of a kind that has work: at once where they have nothing to do and
        nobody does that work, else after a while. And, where machines come and go, those that idled for long."""
        now = time.monotonic()
        served = {member.kind for member in self._placed()}
        self._hungry = {kind: self._hungry.get(kind, now) for kind in schedule.kinds() if kind not in served}
        for kind in schedule.kinds():
            asked = self._asked(kind)
            if any(member.since > now - _SLOW for member in asked) or (not asked and self._has_room(kind, schedule)):
                continue
            fit = {node.id for node in self.nodes if places(node, kind)}
            others = [m for other, idle in self.idle.items() if other != kind for m in idle if m.node in fit]
            # A worker that could go on goes only for a kind that has waited long: the next one loads its networks anew.
            waited = now - self._hungry.get(kind, now)
            useless = [m for m in others if not schedule.ready(m.kind)]
            useless = [m for m in useless if kind in self._hungry or m.since < now - _PAUSE]
            for member in (useless or (others if waited > _HUNGER else []))[:1]:
                if asked or self._has_room(kind, schedule, without=member):
                    self._send_home(member)
                    self._hungry.pop(kind, None)
                    for waiting in asked:
                        waiting.since = now
                    if not asked:
                        self._hire(kind)
        if self._grow:
            for member in [m for kind, idle in self.idle.items() if not schedule.ready(kind) for m in idle]:
                if member.since < now - _IDLE:
                    self._send_home(member)

    def share(self, member: Member) -> float:
        """Bytes of its machine's memory that are this worker's, by the processors that it occupies."""
        node = next((node for node in self.nodes if node.id == member.node), None)
        return node.memory * member.kind.cpus / max(1.0, node.cpus) if node else 0.0

    def at_work(self) -> bool:
        """Whether any worker has answered and is still there."""
        return bool(self._placed())

    def _send_home(self, member: Member) -> None:
        self.idle[member.kind].remove(member)
        self.dismiss(member)

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

    def _asked(self, kind: Resources) -> list[Member]:
        """Workers of a kind that have not answered yet."""
        return [member for member in self.starting.values() if member.kind == kind]

    def _placed(self) -> list[Member]:
        return [*(m for members in self.idle.values() for m in members), *(member for member, _ in self.busy.values())]

    def _members(self) -> list[Member]:
        return [*self.starting.values(), *self._placed()]

    def _has_room(self, kind: Resources, schedule: Schedule, without: Member | None = None) -> bool:
        """Whether one more may be asked for, if `without` went. Workers without a GPU leave the processors that those
        with one could use now, but for the first of them."""
        members = [member for member in self._members() if member is not without]
        cpus = sum(node.cpus for node in self.nodes)
        if self._grow:
            cpus = max(cpus, self._run.max_cpus or 0)
        cpus -= sum(member.kind.cpus for member in members)
        if kind.gpus:
            return cpus >= kind.cpus - 1e-6 and self._places(kind) > sum(member.kind == kind for member in members)
        if any(member.kind == kind for member in members):
            for other in (other for other in schedule.kinds() if other.gpus):
                free = self._places(other) - sum(member.kind == other for member in members)
                cpus -= max(0, min(free, schedule.ready(other))) * other.cpus
        return cpus >= kind.cpus - 1e-6

    def _places(self, kind: Resources) -> int:
        """How many workers with a share of a GPU the machines hold, or may hold when the cluster has grown."""
        held = [places(node, kind) for node in self.nodes]
        if not self._grow or not self._run.max_gpus:
            return sum(held)
        # Machines to come have as many processors for each GPU as those that are there.
        each = [count / node.gpus for count, node in zip(held, self.nodes, strict=True) if node.gpus]
        return max(sum(held), int(self._run.max_gpus * max(each, default=1 / kind.gpus) + 1e-6))
