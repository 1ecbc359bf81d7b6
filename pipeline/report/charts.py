"""Distributions as SVG with readable axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.pages.draw import label, round_values
from pipeline.pages.html import escape
from pipeline.report.figures import Figure
from pipeline.report.look import Spread, Units

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 8, 42


def histogram(figure: Figure, spread: Spread) -> str:
    """Bars of a distribution over its unit."""
    most = max(spread.counts)
    low, high = spread.edges[0], spread.edges[-1]
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = _ticks_below([(f"{value:g}", (value - low) / (high - low)) for value in round_values(low, high, 6)])
    for value in round_values(0, most, 3):
        parts.append(_tick_beside(_short(value), value / most))
    for count, left, right in zip(spread.counts, spread.edges, spread.edges[1:], strict=False):
        if count:
            x = LEFT + wide * (left - low) / (high - low)
            across = wide * (right - left) / (high - low)
            height = tall * count / most
            words = f"{left:.4g} to {right:.4g} {escape(figure.unit)}: {count:,}"
            parts.append(
                f'<rect class="bar" x="{x:.1f}" y="{TOP + tall - height:.1f}" width="{max(0.8, across - 1):.1f}" '
                f'height="{height:.1f}"><title>{words}</title></rect>'
            )
    about = f"{figure.label}: median {spread.median:.4g} {figure.unit}, from {spread.low:.4g} to {spread.high:.4g}"
    return _svg(parts, about, figure.unit)


def ranks(units: Units) -> str:
    """How often each unit came, from the most frequent on, both on logarithmic axes."""
    top, bottom = math.log10(units.counts[0]), math.log10(units.counts[-1])
    across, down = math.log10(max(units.clusters, 2)), max(top - bottom, 1e-9)
    steps = (1, 2, 5) if down < 2 else (1,)
    marks = [step * 10**power for power in range(math.floor(bottom), math.floor(top) + 1) for step in steps]
    inside = [mark for mark in marks if units.counts[-1] <= mark <= units.counts[0]]
    parts = [_tick_beside(_short(mark), (math.log10(mark) - bottom) / down) for mark in inside]
    parts += _ticks_below([(_short(10.0**power), power / across) for power in range(math.floor(across) + 1)])
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    points = " ".join(
        f"{LEFT + wide * math.log10(rank) / across:.1f},{TOP + tall * (1 - (math.log10(count) - bottom) / down):.1f}"
        for rank, count in enumerate(units.counts, 1)
    )
    parts.append(f'<polyline class="own" points="{points}"/>')
    about = f"Units by rank: the most frequent came {units.counts[0]} times, the least {units.counts[-1]} times"
    return _svg(parts, about, "rank of the unit, frames above")


def _svg(parts: Sequence[str], about: str, unit: str) -> str:
    axis = f'<line class="tick" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
    name = label(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 9, unit, "middle")
    return (
        f'<svg class="picture chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(about)}</title>'
        f"{''.join(parts)}{axis}{name}</svg>"
    )


def _ticks_below(marks: Sequence[tuple[str, float]]) -> list[str]:
    """Labels at shares of the width."""
    return [label(LEFT + (WIDTH - LEFT - RIGHT) * share, HEIGHT - BOTTOM + 14, text, "middle") for text, share in marks]


def _tick_beside(text: str, share: float) -> str:
    """A line across at a share of the height, named at its left."""
    y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return label(LEFT - 6, y, text, "end") + line


def _short(value: float) -> str:
    """`12k`, `1.5M`."""
    for power, unit in ((6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:g}{unit}"
    return f"{value:g}"
