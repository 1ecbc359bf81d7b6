"""Which words were heard rightly: the alignment behind a word error rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Step = tuple[str | None, str | None]
"""What was said and what was heard in its place; None: nothing."""


def align(said: Sequence[str], heard: Sequence[str]) -> list[Step]:
    """The shortest way from one sequence of words to the other (Levenshtein 1966).

    Among ways of equal cost, words are replaced as late as can be, and a word left out stands before one put in.
    """
    cost = np.zeros((len(said) + 1, len(heard) + 1), int)
    cost[:, 0], cost[0] = np.arange(len(said) + 1), np.arange(len(heard) + 1)
    for i, word in enumerate(said, 1):
        for j, other in enumerate(heard, 1):
            cost[i, j] = min(cost[i - 1, j - 1] + (word != other), cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    steps: list[Step] = []
    i, j = len(said), len(heard)
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + (said[i - 1] != heard[j - 1]):
            i, j = i - 1, j - 1
            steps.append((said[i], heard[j]))
        elif j and cost[i, j] == cost[i, j - 1] + 1:
            j -= 1
            steps.append((None, heard[j]))
        else:
            i -= 1
            steps.append((said[i], None))
    return steps[::-1]
