"""Order of tasks, and who gets room on a cluster."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.exceptions
from hypothesis import given
from hypothesis import strategies as st

from pipeline.codebook import FitTask
from pipeline.columns import Task
from pipeline.config import BuildConfig, RunConfig
from pipeline.cost import Look, Node
from pipeline.fingerprint import code_digest
from pipeline.pools import Member, Pools
from pipeline.schedule import Schedule
from pipeline.stage import Clip, Resources
from pipeline.worker import Order
from shards.errors import UserError
from shards.manifest import Recipe

CPU, GPU = Resources(1, 0), Resources(1, 0.5)
NEEDS = {"faces": GPU, "landmarks": GPU, "audio": CPU, "mel": CPU, "speech": CPU, "codebook": CPU}
RECIPE = Recipe(version=1, settings={}, weights="")


def order(stage: str, shard: str, *reads: str, clips: int = 1) -> Order:
    marks = dict.fromkeys(reads, "")
    task = Task(stage=stage, shard=shard, fingerprint="", recipe=RECIPE, reads=marks, media="", attempt=1)
    return Order(task, [Clip(str(number), "", "") for number in range(clips)])


def work(shards: int) -> list[Order]:
    names = [f"train-{number:06d}" for number in range(shards)]
    chain = (("faces", ()), ("landmarks", ("faces",)), ("audio", ()), ("mel", ("audio",)))
    orders = [order(stage, shard, *reads) for stage, reads in chain for shard in names]
    return [*orders, Order(FitTask(marks=dict.fromkeys(names, ""), kept={}), [])]


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_every_task_comes_once_and_after_all_that_it_reads(shards: int, seed: int) -> None:
    chance = random.Random(seed)
    schedule = Schedule(NEEDS)
    schedule.add(work(shards))
    done: list[tuple[str, str]] = []
    running: list[Any] = []
    while len(schedule):
        kinds = schedule.kinds()
        if kinds and (not running or chance.random() < 0.5):
            running.append(schedule.take(chance.choice(kinds)))
        else:
            job = running.pop(chance.randrange(len(running)))
            if chance.random() < 0.2:  # its worker died
                schedule.give_back(job)
                continue
            done.append(job.place)
            schedule.finish(job)
            if job.place[0] == "codebook":  # more becomes known on the way
                schedule.add([order("speech", f"train-{number:06d}", "audio") for number in range(shards)])
    assert sorted(done) == sorted({*done})
    assert len(done) == 5 * shards + 1
    where = {place: number for number, place in enumerate(done)}
    for stage, shard in done:
        before = {"landmarks": "faces", "mel": "audio", "speech": "audio"}.get(stage)
        assert before is None or where[before, shard] < where[stage, shard]
        assert stage != "speech" or where["codebook", "all"] < where[stage, shard]
        assert stage != "codebook" or all(where["audio", f"train-{n:06d}"] < where[stage, shard] for n in range(shards))
    assert all(schedule.coming(kind) == 0 for kind in (CPU, GPU))


def test_what_the_fit_waits_for_comes_first_and_large_shards_before_small_ones() -> None:
    one = Resources(1, 0)
    schedule = Schedule(dict.fromkeys(NEEDS, one))
    small, large = order("faces", "train-000001", clips=2), order("faces", "train-000002", clips=50)
    sound = order("audio", "train-000001", clips=2)
    schedule.add([small, large, sound, Order(FitTask(marks={"train-000001": ""}, kept={}), [])])
    assert [schedule.take(one).order for _ in range(3)] == [sound, large, small]


class Actor:
    """Stands for a worker on Ray."""

    ended = False


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Pools:
    pools = Pools("nowhere", BuildConfig(run=RunConfig(gpus=0.5)), grow=True)
    monkeypatch.setattr(pools, "dismiss", lambda member: setattr(member.actor, "ended", True))

    class Hired:
        def options(self, **options: Any) -> Hired:
            return self

        def remote(self, *args: Any) -> Actor:
            return Actor()

    monkeypatch.setattr(pools, "_hired", Hired())
    monkeypatch.setattr(Member, "call", lambda member, name: object())
    return pools


def node(name: str, cpus: float, gpus: float = 0.0) -> Node:
    return Node(name, name, cpus, gpus, "gpu" if gpus else "cpu", True)


def asked(pools: Pools) -> dict[Resources, int]:
    kinds = [member.kind for member in pools.starting.values()]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def test_workers_without_a_gpu_leave_the_processors_that_those_with_one_need(pools: Pools) -> None:
    pools.nodes = [node("g", 4, 1), node("c", 3)]
    schedule = Schedule(NEEDS)
    schedule.add(work(20))
    pools.hire(schedule)
    # Two halves of the GPU take two processors; the other five are for sound.
    assert asked(pools) == {GPU: 2, CPU: 5}
    pools.hire(schedule)
    assert asked(pools) == {GPU: 2, CPU: 5}


def test_without_work_for_it_a_gpus_processors_are_free(pools: Pools) -> None:
    pools.nodes = [node("g", 4, 1), node("c", 3)]
    schedule = Schedule(NEEDS)
    schedule.add([order("audio", f"train-{number:06d}") for number in range(20)])
    pools.hire(schedule)
    assert asked(pools) == {CPU: 7}


def test_a_cluster_that_may_grow_is_asked_for_more_than_it_has(pools: Pools) -> None:
    pools._run = RunConfig(max_cpus=6)
    pools.nodes = [node("head", 0)]
    schedule = Schedule(NEEDS)
    schedule.add([order("audio", f"train-{number:06d}") for number in range(20)])
    pools.hire(schedule)
    assert asked(pools) == {CPU: 6}


def test_idle_workers_make_way_for_a_kind_that_has_nobody_where_it_fits(pools: Pools) -> None:
    pools.nodes = [node("g", 1, 1), node("c", 1)]
    there, elsewhere = (Member(Actor(), CPU, node=name) for name in ("g", "c"))
    pools.rest(elsewhere)
    pools.rest(there)
    schedule = Schedule(NEEDS)
    schedule.add([order("faces", "train-000000")])
    pools.make_way(schedule)
    assert (there.actor.ended, elsewhere.actor.ended) == (True, False)
    pools.hire(schedule)
    assert asked(pools) == {GPU: 1}
    pools.make_way(schedule)
    assert not elsewhere.actor.ended


@pytest.mark.parametrize(
    ("cpus", "gpus", "share", "shards"),
    [(1, 1, 1.0, 2), (2, 1, 0.5, 3), (4, 1, 0.25, 20), (4, 1, 0.5, 20), (16, 1, 0.0625, 40), (8, 2, 0.25, 32)],
)
def test_workers_of_two_kinds_on_one_machine_come_to_an_end_and_rarely_change(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, share: float, shards: int
) -> None:
    clock = [0.0]
    monkeypatch.setattr("pipeline.pools.time", SimpleNamespace(monotonic=lambda: clock[0]))
    pools.see([node("g", cpus, gpus)])
    gpu = Resources(1, share)
    schedule = Schedule({**NEEDS, "faces": gpu, "landmarks": gpu, "speech": gpu, "codebook": gpu})
    names = [f"train-{number:06d}" for number in range(shards)]
    speech = [order("speech", name, "audio") for name in names]
    schedule.add([*work(shards)[: 4 * shards], *speech])
    hired: list[Any] = []
    while len(schedule):
        clock[0] += 1
        assert clock[0] < 2000, f"{len(schedule)} tasks were never done"
        pools.make_way(schedule)
        for kind, idle in pools.idle.items():
            while idle and schedule.ready(kind):
                pools.busy[object()] = (idle.pop(), schedule.take(kind))
        pools.hire(schedule)
        assert sum(m.kind.cpus for m in [*pools._placed(), *pools.starting.values()]) <= cpus
        for call in list(pools.starting):
            member = pools.starting.pop(call)
            member.node = "g"
            hired.append(member.actor)
            pools.rest(member)
        # A task takes four seconds.
        if pools.busy and clock[0] % 4 == 0:
            for call in list(pools.busy):
                member, job = pools.busy.pop(call)
                pools.rest(member)
                schedule.finish(job)
    # Each change of kind costs the loading of networks, so they are few beside the tasks.
    assert len(hired) <= cpus + max(3, 5 * shards / 4)


def test_one_worker_goes_for_one_that_waits(pools: Pools) -> None:
    pools.see([node("g", 8, 1)])
    schedule = Schedule(NEEDS)
    schedule.add([order("faces", "train-000000")])
    waiting = Member(Actor(), GPU)
    waiting.since -= 11
    pools.starting[object()] = waiting
    for _ in range(8):
        pools.rest(Member(Actor(), CPU, node="g"))
    for _ in range(8):
        pools.make_way(schedule)
    assert sum(len(idle) for idle in pools.idle.values()) == 7


def test_idle_workers_are_gone_with_their_machine(pools: Pools) -> None:
    pools.see([node("a", 1), node("b", 1)])
    for name in ("a", "b"):
        pools.rest(Member(Actor(), CPU, node=name))
    pools.see([node("b", 1)])
    assert [member.node for member in pools.idle[CPU]] == ["b"]


def test_what_was_asked_for_in_vain_is_taken_back(pools: Pools) -> None:
    pools.see([node("c", 0)])
    asked_for = Member(Actor(), CPU)
    asked_for.since -= 11
    pools.starting[object()] = asked_for
    pools.hire(Schedule(NEEDS))
    assert asked_for.actor.ended
    assert not pools.starting


def test_workers_with_nothing_to_do_for_long_let_an_autoscaler_end_their_machine(pools: Pools) -> None:
    pools.nodes = [node("c", 2)]
    old, new = Member(Actor(), CPU), Member(Actor(), CPU)
    for member in (old, new):
        pools.rest(member)
    old.since = time.monotonic() - 61
    pools.make_way(Schedule(NEEDS))
    assert (old.actor.ended, new.actor.ended) == (True, False)


def answer(pools: Pools, monkeypatch: pytest.MonkeyPatch, said: Look | Exception) -> None:
    """A worker that started answers so."""

    def get(call: Any) -> Look:
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr("pipeline.pools.ray.get", get)
    call = object()
    pools.starting[call] = Member(Actor(), CPU)
    pools.answered(call)


def test_a_worker_of_other_code_is_refused_before_it_gets_work(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Look("", "", 0, 0, 0, 0.0, 0, 0.0, None, "node7", "id", "notes", code_digest())
    answer(pools, monkeypatch, look)
    assert [member.host for member in pools.idle[CPU]] == ["node7"]
    with pytest.raises(UserError, match=r"^ray: node7 runs other code than this build"):
        answer(pools, monkeypatch, replace(look, code="0" * 16))


def test_workers_that_die_at_once_end_a_build_unless_their_machine_was_lost(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = ray.exceptions.RayActorError(error_msg="The actor died because its node has died.")
    for _ in range(50):
        answer(pools, monkeypatch, lost)
    broken = ray.exceptions.RayActorError(error_msg="No module named 'pipeline'")
    for _ in range(4):
        answer(pools, monkeypatch, broken)
    with pytest.raises(UserError, match=r"^ray: workers die before they can do anything: .*No module named"):
        answer(pools, monkeypatch, broken)
