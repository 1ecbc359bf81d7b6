"""Order of tasks, and who gets room on a cluster."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.codebook import FitTask
from pipeline.columns import Task
from pipeline.config import BuildConfig, RunConfig
from pipeline.cost import Node
from pipeline.pools import Member, Pools
from pipeline.schedule import Schedule
from pipeline.stage import Clip, Resources
from pipeline.worker import Order
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


def test_workers_with_nothing_to_do_for_long_let_an_autoscaler_end_their_machine(pools: Pools) -> None:
    pools.nodes = [node("c", 2)]
    old, new = Member(Actor(), CPU), Member(Actor(), CPU)
    for member in (old, new):
        pools.rest(member)
    old.since = time.monotonic() - 61
    pools.make_way(Schedule(NEEDS))
    assert (old.actor.ended, new.actor.ended) == (True, False)
