"""Which clip is sample number `n` of an endless stream: a pure function of the seed.

It knows nothing of processes or of speed, so a run resumes from its step number alone and gives the same global batches
with any number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shards.augment import generator
from shards.errors import UserError

MIX_BLOCK = 1024
"""Samples in which every dataset of a mixture has exactly its share."""

Numbers = NDArray[np.int64]


class Order:
    """Epoch after epoch, each a permutation of all clips that stays within a few shards at a time.

    The shards of an epoch are permuted, and a window of `window` shards slides over them: at every moment clips are
    drawn from exactly that many shards, each clip at a random moment of those at which its shard is inside. So one
    shard comes and one goes at a time, and an epoch's ends are mixed as well as its middle.

    Args:
        shard_of: int [clips], the shard of every clip, 0 to shards - 1; a shard may have none.
        window: shards that are read at the same time.
        seed: whatever tells this order from others; its `str` counts.
    """

    def __init__(self, shard_of: Sequence[int] | Numbers, window: int, seed: object) -> None:
        self._shard_of = np.asarray(shard_of, np.int64)
        self._window, self._seed = window, seed
        self.clips = len(self._shard_of)
        self._used, self._dense = np.unique(self._shard_of, return_inverse=True)
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)

    def clip(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """(epoch, clip) of samples `numbers`."""
        epochs, places = np.divmod(numbers, self.clips)
        clips = np.empty_like(numbers)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            clips[here] = self._epoch(epoch)[0][places[here]]
        return epochs, clips

    def shards(self, begin: int, end: int, ahead: int) -> tuple[list[int], list[int]]:
        """Shards that samples `begin` to `end` need or that stay in the window meanwhile, then the next `ahead` shards
        in the order in which they come."""
        now: list[int] = []
        later: list[int] = []
        epoch, place = divmod(begin, self.clips)
        last = (end - 1) // self.clips
        while epoch <= last or len(later) < ahead:
            _, first, final = self._epoch(epoch)
            start = place if epoch == begin // self.clips else 0
            stop = min(end - epoch * self.clips, self.clips)
            inside = np.flatnonzero((final >= start) & (first < stop))
            now += self._used[inside[np.argsort(first[inside], kind="stable")]].tolist()
            after = np.flatnonzero(first >= max(stop, 0))
            later += self._used[after[np.argsort(first[after], kind="stable")]].tolist()
            epoch += 1
        now = list(dict.fromkeys(now))
        return now, list(dict.fromkeys(shard for shard in later if shard not in set(now)))[:ahead]

    def _make_epoch(self, epoch: int) -> tuple[Numbers, Numbers, Numbers]:
        """Clips in order, and the first and last place of each shard that has clips."""
        random = generator(self._seed, "order", epoch)
        count = len(self._used)
        window = min(self._window, count)
        position = np.empty(count, np.int64)
        position[_permutation(random, count)] = np.arange(count)
        # With `window` shards in each of count - window + 1 stretches, shard p is inside from p - window + 1 to p.
        enters = np.maximum(position - window + 1, 0)
        leaves = np.minimum(position, count - window) + 1
        moment = enters[self._dense] + random.random(self.clips) * (leaves - enters)[self._dense]
        order = np.argsort(moment, kind="stable")
        first, last = np.full(count, self.clips, np.int64), np.zeros(count, np.int64)
        shards = self._dense[order]
        np.minimum.at(first, shards, np.arange(self.clips))
        np.maximum.at(last, shards, np.arange(self.clips))
        return order, first, last


class Mixture:
    """Which dataset sample number `n` comes from, and its number there.

    In every `MIX_BLOCK` samples each dataset has exactly its share, in an order drawn for that block.

    Args:
        weights: shares of the datasets, in any unit.

    Raises:
        UserError: a weight so small that its dataset would never be seen.
    """

    def __init__(self, weights: Sequence[float], seed: object) -> None:
        self._seed = seed
        self._block = lru_cache(maxsize=3)(self._make_block)
        parts = np.asarray(weights, np.float64) / np.sum(weights) * MIX_BLOCK
        self.shares = np.floor(parts).astype(np.int64)
        rest = MIX_BLOCK - int(self.shares.sum())
        self.shares[np.argsort(self.shares - parts, kind="stable")[:rest]] += 1
        if not self.shares.all():
            dataset = int(np.flatnonzero(self.shares == 0)[0])
            raise UserError(
                f"dataset {dataset} of the mixture has a weight of {weights[dataset]:g} in {sum(weights):g}: less than "
                f"one sample in {MIX_BLOCK}; raise it or leave the dataset out"
            )

    def dataset(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """(dataset, number in that dataset) of samples `numbers`."""
        blocks, places = np.divmod(numbers, MIX_BLOCK)
        datasets, inner = np.empty_like(numbers), np.empty_like(numbers)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            which, before = self._block(block)
            datasets[here] = which[places[here]]
            inner[here] = block * self.shares[datasets[here]] + before[places[here]]
        return datasets, inner

    def _make_block(self, block: int) -> tuple[Numbers, Numbers]:
        which = np.repeat(np.arange(len(self.shares)), self.shares)
        if len(self.shares) > 1:
            which = which[_permutation(generator(self._seed, "mix", block), MIX_BLOCK)]
        before = np.empty(MIX_BLOCK, np.int64)
        for dataset in range(len(self.shares)):
            here = which == dataset
            before[here] = np.arange(int(here.sum()))
        return which, before


def _permutation(random: np.random.Generator, count: int) -> Numbers:
    """0 to count - 1 in random order. Not numpy's own, which may change from one release to the next."""
    return np.argsort(random.random(count), kind="stable")
