"""The order of samples: every clip once an epoch, few shards at a time, shares of a mixture exact."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.order import MIX_BLOCK, Mixture, Order

SIZES = st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any)


def clips_of(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


@given(SIZES, st.integers(1, 4), st.integers(0, 99))
def test_every_epoch_has_every_clip_once(sizes: list[int], window: int, seed: int) -> None:
    order = Order(clips_of(sizes), window, seed)
    for epoch in range(3):
        epochs, clips = order.clip(np.arange(epoch * order.clips, (epoch + 1) * order.clips))
        assert set(epochs) == {epoch}
        assert sorted(clips) == list(range(sum(sizes)))


@given(SIZES, st.integers(1, 4), st.integers(0, 99), st.data())
def test_any_part_can_be_drawn_alone(sizes: list[int], window: int, seed: int, data: st.DataObject) -> None:
    count = sum(sizes)
    whole = Order(clips_of(sizes), window, seed).clip(np.arange(5 * count))
    begin = data.draw(st.integers(0, 5 * count - 1))
    end = data.draw(st.integers(begin + 1, 5 * count))
    part = Order(clips_of(sizes), window, seed).clip(np.arange(begin, end))
    np.testing.assert_array_equal(part, np.array(whole)[:, begin:end])


@given(SIZES, st.integers(1, 4), st.integers(0, 99))
def test_clips_come_from_few_shards_at_a_time(sizes: list[int], window: int, seed: int) -> None:
    shards = clips_of(sizes)
    drawn = shards[Order(shards, window, seed).clip(np.arange(len(shards)))[1]]
    # Open from its first clip to its last one.
    opened = [{s for s in set(drawn) if s in drawn[: place + 1] and s in drawn[place:]} for place in range(len(drawn))]
    assert max(map(len, opened)) <= window


def test_every_moment_mixes_the_whole_window() -> None:
    shards = clips_of([200] * 10)
    drawn = shards[Order(shards, 4, 0).clip(np.arange(2000))[1]]
    # A stretch of 7 has 4 shards inside, in parts that differ: the first and last shards have one stretch alone.
    for begin in range(0, 2000, 200):
        assert len(set(drawn[begin : begin + 200])) >= 4
    for begin in (0, 1950):
        assert len(set(drawn[begin : begin + 50])) >= 3


def test_epochs_and_seeds_differ() -> None:
    shards = clips_of([50, 50])
    first, second = Order(shards, 2, 0).clip(np.arange(200))[1].reshape(2, 100)
    assert (first != second).any()
    assert (first != Order(shards, 2, 1).clip(np.arange(100))[1]).any()


@given(SIZES, st.integers(1, 4), st.integers(0, 5), st.data())
def test_shards_are_named_before_their_clips_come(
    sizes: list[int], window: int, ahead: int, data: st.DataObject
) -> None:
    shards = clips_of(sizes)
    order = Order(shards, window, 7)
    begin = data.draw(st.integers(0, 3 * len(shards)))
    end = begin + data.draw(st.integers(1, 2 * len(shards)))
    now, later = order.shards(begin, end, ahead)
    drawn = set(shards[order.clip(np.arange(begin, end))[1]].tolist())
    assert drawn <= set(now)
    assert not set(now) & set(later)
    assert len(later) <= ahead
    # The next shard that is new is the first of those named ahead.
    following = shards[order.clip(np.arange(end, end + len(shards)))[1]].tolist()
    fresh = [shard for shard in following if shard not in set(now)]
    if ahead and fresh:
        assert later[0] == fresh[0]


@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=30)
def test_a_mixture_has_exact_shares_and_loses_nothing(weights: list[float], seed: int) -> None:
    mixture = Mixture(weights, seed)
    datasets, inner = mixture.dataset(np.arange(3 * MIX_BLOCK))
    for number, weight in enumerate(weights):
        mine = inner[datasets == number]
        # Every sample of a dataset in its own order, none twice.
        np.testing.assert_array_equal(mine, np.arange(len(mine)))
        assert abs(len(mine) - 3 * MIX_BLOCK * weight / sum(weights)) <= 3 * len(weights)
    begin = int(np.random.default_rng(seed).integers(0, 2 * MIX_BLOCK))
    again = Mixture(weights, seed).dataset(np.arange(begin, begin + 100))
    np.testing.assert_array_equal(again, np.array([datasets, inner])[:, begin : begin + 100])


def test_a_mixture_is_mixed() -> None:
    datasets, _ = Mixture([1, 1], 0).dataset(np.arange(MIX_BLOCK))
    counts = [Counter(datasets[begin : begin + 64].tolist())[0] for begin in range(0, MIX_BLOCK, 64)]
    assert min(counts) > 10
    assert max(counts) < 54


def test_a_weight_that_is_never_drawn_is_refused() -> None:
    with pytest.raises(UserError, match="dataset 1 of the mixture"):
        Mixture([1, 1e-6], 0)
