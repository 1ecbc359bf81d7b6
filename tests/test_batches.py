"""Batches across clips: each clip once, bounded, in order, and hardly padded."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches import SORTED, WASTE, bucket, in_batches

lengths = st.lists(st.integers(1, 900), max_size=80)


@given(lengths, st.integers(1, 2000))
def test_batches_hold_each_clip_once_within_budget_and_waste(clips: list[int], budget: int) -> None:
    batches = bucket(clips, budget)
    assert sorted(position for batch in batches for position in batch) == list(range(len(clips)))
    for batch in batches:
        size = len(batch) * max(clips[position] for position in batch)
        assert size <= budget or len(batch) == 1
        assert size - sum(clips[position] for position in batch) <= WASTE * size + 1e-9


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 60))
def test_without_waste_clips_of_equal_length_go_together(clips: list[int], budget: int) -> None:
    batches: list[list[int]] = []

    def work(batch: list[int]) -> list[int]:
        batches.append(batch)
        return batch

    assert [length for length, _ in in_batches(clips, int, budget, work, waste=0.0)] == clips
    assert all(len(set(batch)) == 1 for batch in batches)
    if sum(clips) < SORTED * budget:  # sorted in one go: no batch has room for another's clip
        for length in set(clips):
            mine = [batch for batch in batches if batch[0] == length]
            assert len(mine) == -(-clips.count(length) // max(1, budget // length))


@given(lengths, st.integers(1, 400))
def test_results_come_in_the_order_of_the_items(clips: list[int], budget: int) -> None:
    items = list(enumerate(clips))
    taken = []

    def source():  # type: ignore[no-untyped-def]
        for item in items:
            taken.append(item)
            yield item

    ready: list[int] = []

    def work(batch: list[tuple[int, int]]) -> list[int]:
        # No more is held back than what is sorted at a time.
        assert sum(length for _, length in taken[len(ready) : -1]) < SORTED * budget
        return [10 * number for number, _ in batch]

    for item, result in in_batches(source(), lambda item: item[1], budget, work):
        assert result == 10 * item[0]
        ready.append(item[0])
    assert ready == list(range(len(clips)))


def test_padding_of_a_shard_is_small_and_batches_are_full() -> None:
    """256 clips of half a second to 16 s, most of them short, as cut from talks."""
    rng = np.random.default_rng(0)
    clips = [int(length) for length in 2 * np.clip(rng.lognormal(4.3, 0.6, 256), 25, 400)]
    for budget in (1000, 8000):
        batches = bucket(clips, budget)
        computed = sum(len(batch) * max(clips[position] for position in batch) for batch in batches)
        assert computed <= 1.05 * sum(clips)
        if budget == 8000:
            assert len(batches) <= len(clips) / 10
