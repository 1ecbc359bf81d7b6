"""Mean and deviation of a training set's mels, which standardise what the flow sees."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shards.augment import generator
from shards.clip_table import ClipTable

STATISTICS_CLIPS = 500
"""Clips over which the mel mean and deviation are taken."""


def mel_statistics(tables: Sequence[ClipTable]) -> tuple[float, float]:
    """Mean and standard deviation of the log-mel over all bins and frames of up to `STATISTICS_CLIPS` clips."""
    clips = [(table, clip) for table in tables for clip in range(len(table.keys))]
    order = generator("mel statistics").permutation(len(clips))[:STATISTICS_CLIPS]
    count, total, squares = 0, 0.0, 0.0
    for table, clip in (clips[position] for position in sorted(order)):
        mel = table.read(clip, "mel").astype("float64")
        count, total, squares = count + mel.size, total + mel.sum(), squares + (mel**2).sum()
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean**2, 1e-8))
