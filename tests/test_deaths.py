"""Who is blamed when a worker dies."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.deaths import STRAYS, Death, judge
from pipeline.pack import PackTask
from pipeline.recordings import Scan, SegmentTask
from pipeline.schedule import Job
from pipeline.stage import Clip, Reason
from pipeline.worker import Order
from shards.errors import UserError
from shards.manifest import Recipe

CLIPS = [Clip(key, f"/videos/{key}.mp4", "0" * 64) for key in "abcd"]
RUN = RunConfig(retries=2, clip_timeout=5, memory_gb=3)


def job(task: Any = None, clips: list[Clip] = CLIPS) -> Job:
    task = task or PackTask(shard="train-000000", inputs="", reads={}, recipes={}, behind=(), fields=())
    return Job(Order(task, clips), set())


def death(why: str, keys: str = "", **more: Any) -> Death:
    return Death(why, tuple(clip for clip in CLIPS if clip.key in keys), 1.0, more.pop("rss", 0), "Fatal: x", **more)


def test_a_batch_is_not_blamed_but_tried_one_by_one_until_one_clip_stands_alone() -> None:
    work = job()
    assert judge(work, death("crash", "abc"), 0, RUN).given_up == ()
    assert work.order.alone == ("a", "b", "c")
    assert judge(work, death("crash", "b"), 0, RUN).given_up == ()
    (given_up,) = judge(work, death("hang", "b"), 0, RUN).given_up
    assert given_up[:2] == ("b", Reason.HANG)
    assert "3 times" in given_up[2]
    assert "5 s (run.clip_timeout)" in given_up[2]
    assert work.order.alone == ("a", "c")
    assert [(refused.key, refused.reason) for refused in work.order.given_up] == [("b", Reason.HANG)]
    # The next one that dies is no longer helped by what b did.
    judge(work, death("crash", "c"), 0, RUN)
    assert [key for key, *_ in judge(work, death("crash", "c"), 0, RUN).given_up] == ["c"]


def test_a_batch_is_never_given_up_as_a_whole() -> None:
    work = job()
    for _ in range(5):
        assert judge(work, death("killed", "abcd"), 0, RUN).given_up == ()
    none_again = RunConfig(retries=0)
    assert judge(job(), death("crash", "ab"), 0, none_again).given_up == ()
    assert len(judge(job(), death("crash", "a"), 0, none_again).given_up) == 1


def test_lost_machines_blame_nobody() -> None:
    work = job()
    for _ in range(STRAYS):
        assert judge(work, death("node", "a"), 0, RUN).given_up == ()
    assert work.order == job().order
    with pytest.raises(UserError, match="lost its machine 11 times"):
        judge(work, death("node"), 0, RUN)


def test_who_held_no_more_than_its_share_is_not_blamed_for_a_machine_short_of_memory() -> None:
    work = job()
    for _ in range(STRAYS):
        assert judge(work, death("memory", "a", low=True, rss=10), 20, RUN).given_up == ()
    with pytest.raises(UserError, match="are machines short of memory"):
        judge(work, death("memory", "a", low=True, rss=10), 20, RUN)
    greedy = job()
    for _ in range(RUN.retries):
        judge(greedy, death("memory", "a", low=True, rss=30), 20, RUN)
    (given_up,) = judge(greedy, death("memory", "a", low=True, rss=30), 20, RUN).given_up
    assert given_up[1] is Reason.MEMORY


def test_deaths_with_no_clip_in_hand_end_the_build() -> None:
    work = job()
    judge(work, death("crash"), 0, RUN)
    judge(work, death("crash"), 0, RUN)
    with pytest.raises(
        UserError, match=r"^stage pack, shard train-000000: the worker died 3 times with no clip in hand"
    ):
        judge(work, death("crash"), 0, RUN)


def test_a_recording_that_ends_its_workers_is_refused_as_a_whole() -> None:
    task = SegmentTask(shard="segments/x", media="m", mark="k", recipe=Recipe(version=1, settings={}, weights=""))
    work = job(task, CLIPS[:1])
    for _ in range(RUN.retries):
        assert judge(work, death("memory", "a"), 0, RUN).done is None
    done = judge(work, death("memory", "a", rss=int(4e9)), 0, RUN).done
    assert done is not None
    assert isinstance(done.result, Scan)
    assert done.result.refused is not None
    assert done.result.refused.reason is Reason.MEMORY
    assert "more than 3 GB (run.memory_gb)" in done.result.refused.message
    assert done.result.segments == []
