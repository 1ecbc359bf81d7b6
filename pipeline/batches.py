"""Batches across clips: of like length, so that little is padded, and of bounded size, so that memory is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WASTE = 0.05
"""Largest share of a batch's frames that is padding."""
SORTED = 16
"""Budgets of clips that are sorted by length at a time."""


def bucket(lengths: Sequence[int], budget: int, waste: float = WASTE) -> list[list[int]]:
    """Batches as lists of positions in `lengths`, longest clips first.

    Each position is in one batch; within a batch, count times longest is at most `budget`, and at most the share
    `waste` of that is padding. A clip longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = held = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[position]
        size = longest * (len(batches[-1]) + 1) if batches else budget + 1
        if size > budget or size - held - length > waste * size:
            batches.append([])
            longest, held = length, 0
        batches[-1].append(position)
        held += length
    return batches


def in_batches(
    items: Iterable[T],
    length: Callable[[T], int],
    budget: int,
    work: Callable[[list[T]], Sequence[R]],
    waste: float = WASTE,
) -> Iterator[tuple[T, R]]:
    """Each item with its result, in order, computed in batches as `bucket` forms them.

    Items are held back until their lengths sum to `SORTED` budgets, so that enough of like length are at hand.

    Args:
        work: gives one result per item of a batch.
    """
    held: list[T] = []
    total = 0
    for item in items:
        held.append(item)
        total += length(item)
        if total >= SORTED * budget:
            yield from _work_off(held, length, budget, work, waste)
            held, total = [], 0
    yield from _work_off(held, length, budget, work, waste)


def _work_off(
    items: Sequence[T],
    length: Callable[[T], int],
    budget: int,
    work: Callable[[list[T]], Sequence[R]],
    waste: float,
) -> Iterator[tuple[T, R]]:
    results: dict[int, R] = {}
    for batch in bucket([length(item) for item in items], budget, waste):
        results.update(zip(batch, work([items[position] for position in batch]), strict=True))
    for position, item in enumerate(items):
        yield item, results[position]
