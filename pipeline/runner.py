"""Ray: hands tasks to workers, collects what comes of them, and goes on when workers and machines are lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.board import Board
from pipeline.config import BuildConfig
from pipeline.cost import Look
from pipeline.deaths import Death, Inquest, judge
from pipeline.pools import Member, Pools
from pipeline.registry import STAGES, make_stage
from pipeline.schedule import Job, Schedule
from pipeline.session import answers, check_room, failure, no_room, nodes, places, room_to_come
from pipeline.stage import Resources
from pipeline.worker import Done, Order, Work
from shards.errors import UserError

import ray  # isort: skip  # after pipeline.session, which sets its environment
import ray.exceptions  # isort: skip
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # isort: skip

_LOOK_EVERY = 2.0
"""Seconds between looks at the workers and at the cluster."""
_SILENT = 20.0
"""Seconds without work after which that is said."""
_START = 120.0
"""Seconds that a worker may take to start."""
_SOON = 90.0
"""Seconds in which the machine of a dead worker says what is known of it; a busy one needs many for a new process."""


class Runner:
    """Runs tasks on the Ray session that is open; workers stay from one `execute` to the next, until `close`.

    Args:
        board: is told all that happens.

    Raises:
        UserError: no machine has what a worker needs, and none may come.
    """

    def __init__(self, uri: str, config: BuildConfig, board: Board) -> None:
        self._run, self._board = config.run, board
        stages = {kind.name: make_stage(kind, config, None) for kind in STAGES}
        self._needs = {name: stage.needs(config.run.gpus) for name, stage in stages.items()}
        self._needs |= {"pack": Resources(), "segment": self._needs["faces"], "codebook": self._needs["speech"]}
        self._pools = Pools(uri, config, grow=config.run.ray_address is not None)
        self._inquests: dict[Any, Inquest] = {}
        self._looks: dict[Any, Member] = {}
        self._looked = 0.0
        self._said = False
        self._see_cluster()
        self._check_room()

    def execute(self, orders: Sequence[Order], on_done: Callable[[Work, Done], Sequence[Order]]) -> None:
        """Run all tasks, each once the tasks it reads from are done.

        Args:
            on_done: called with each task and what came of it; gives what else is to be done now.

        Raises:
            UserError: a task lost its worker more than `retries` times with no clip to blame, or failed; no room.
        """
        schedule = Schedule(self._needs)
        self._add(schedule, orders)
        stuck = None
        while len(schedule):
            self._pools.make_way(schedule)
            self._hand_out(schedule)
            self._pools.hire(schedule)
            if self._pools.busy or self._inquests:
                stuck, self._said = None, False
            else:
                stuck = stuck or time.monotonic()
                self._wait_for_room(schedule, time.monotonic() - stuck)
            looks = []
            calls = [*self._pools.busy, *self._pools.starting, *self._inquests, *self._looks]
            for call in answers(calls):
                if call in self._looks:
                    looks += self._see(call)
                elif call in self._inquests:
                    self._close_inquest(call, schedule, on_done)
                elif call in self._pools.starting:
                    self._pools.answered(call)
                elif call in self._pools.busy:
                    self._collect(call, schedule, on_done)
            if looks:
                self._board.looks(looks)
            self._look_around(schedule, on_done)

    def close(self) -> None:
        """Stop all workers."""
        self._pools.close()
        self._looks.clear()
        self._inquests.clear()

    def _add(self, schedule: Schedule, orders: Sequence[Order]) -> None:
        if orders:
            schedule.add(orders)
            self._board.begin(
                [order.task for order in orders],
                {order.task.shard: len(order.clips) for order in orders if order.task.stage != "codebook"},
            )

    def _hand_out(self, schedule: Schedule) -> None:
        for kind, idle in self._pools.idle.items():
            while idle and schedule.ready(kind):
                member, job = idle.pop(), schedule.take(kind)
                self._pools.busy[member.actor.run.remote(job.order)] = (member, job)
                member.since = time.monotonic()
                self._board.given(job.order.task, member.host)

    def _collect(self, call: Any, schedule: Schedule, on_done: Callable[[Work, Done], Sequence[Order]]) -> None:
        member, job = self._pools.busy.pop(call)
        try:
            done = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            where = f"stage {job.order.task.stage}, shard {job.order.task.shard}"
            raise failure(where, error, "what is done is kept, build again to go on") from None
        except ray.exceptions.RayError as error:  # of many kinds: dead, out of memory, out of reach, its node dead
            self._pools.dismiss(member)
            now = time.monotonic()
            inquest = Inquest(member, job, f"{type(error).__name__} {error}", now - member.since, now + _SOON)
            self._see_cluster()
            if self._is_there(member):
                self._inquests[self._ask(member)] = inquest
            else:
                self._judge(inquest, inquest.machine_lost(), schedule, on_done)
            return
        self._pools.rest(member)
        self._finish(job, done, schedule, on_done)

    def _finish(
        self, job: Job, done: Done, schedule: Schedule, on_done: Callable[[Work, Done], Sequence[Order]]
    ) -> None:
        schedule.finish(job)
        self._board.done(job.order.task, done)
        if done.note:
            self._board.note(done.note)
        self._add(schedule, on_done(job.order.task, done))

    def _ask(self, member: Member) -> Any:
        """Have the notes read that a worker left on its machine."""
        from pipeline.in_flight import read_notes

        there = NodeAffinitySchedulingStrategy(member.node, soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
        return ray.remote(read_notes).options(**options).remote(member.notes)

    def _close_inquest(self, call: Any, schedule: Schedule, on_done: Callable[[Work, Done], Sequence[Order]]) -> None:
        inquest = self._inquests.pop(call)
        notes = None
        with contextlib.suppress(ray.exceptions.RayError, OSError):
            notes = ray.get(call, timeout=0)
        self._see_cluster()
        lost = notes is None and not self._is_there(inquest.member)
        self._judge(inquest, inquest.machine_lost() if lost else inquest.death(notes), schedule, on_done)

    def _is_there(self, member: Member) -> bool:
        return any(node.id == member.node for node in self._pools.nodes)

    def _judge(
        self,
        inquest: Inquest,
        death: Death,
        schedule: Schedule,
        on_done: Callable[[Work, Done], Sequence[Order]],
    ) -> None:
        job = inquest.job
        self._board.lost(job.order.task, death.why, death.seconds, inquest.member.host)
        verdict = judge(job, death, self._pools.share(inquest.member), self._run)
        for clip, reason, message in verdict.given_up:
            self._board.poison(job.order.task, clip, reason, message)
        if verdict.done:
            self._finish(job, verdict.done, schedule, on_done)
        else:
            schedule.give_back(job)

    def _look_around(self, schedule: Schedule, on_done: Callable[[Work, Done], Sequence[Order]]) -> None:
        """Now and then: what the workers are at, what there is of the cluster, and who does not answer."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        self._see_cluster()
        if not self._pools.nodes:
            # Calls to workers of the only node that there was never come back.
            raise UserError("ray: its node died (killed or out of memory); what is done is kept, build again")
        for call, inquest in [*self._inquests.items()]:
            there = self._is_there(inquest.member)
            if now > inquest.until or not there:
                del self._inquests[call]
                self._judge(inquest, inquest.death(None) if there else inquest.machine_lost(), schedule, on_done)
        asked = set(map(id, self._looks.values()))
        for member, _ in self._pools.busy.values():
            if id(member) not in asked:
                self._looks[member.call("look")] = member

    def _see(self, call: Any) -> list[Look]:
        """What a worker said, if it lives."""
        del self._looks[call]
        try:
            return [ray.get(call)]
        except ray.exceptions.RayError:
            return []

    def _see_cluster(self) -> None:
        found = nodes()
        self._pools.see([node for node in found if node.alive])
        self._board.cluster(found)

    def _check_room(self) -> None:
        """What cannot be had now, and will not come, is said before anything is done."""
        check_room(self._needs.values(), room_to_come(self._run, self._pools.nodes))

    def _wait_for_room(self, schedule: Schedule, seconds: float) -> None:
        """Nobody works. Where there is a machine for them, workers only need to start; else one has to come."""
        kind = schedule.kinds()[0]
        fits = any(places(node, kind) for node in self._pools.nodes)
        most = 60 * self._run.wait_minutes
        if seconds > (max(_START, most) if fits else most) and not self._pools.at_work():
            raise no_room(kind, seconds, self._pools.nodes)
        if seconds > _SILENT and not self._said:
            self._said = True
            what = "for workers to start" if fits else "for a machine"
            self._board.note(f"ray: nobody works; waiting {what}, {self._run.wait_minutes:g} minutes at most")
