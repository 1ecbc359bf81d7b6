"""Long clips in overlapping windows: where they lie, and how what was made of each is blended into one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shards.schema import MEL_PER_FRAME

WINDOW = 400
"""Video frames that a network sees at once (16 s). Longer clips are synthesised in windows of this length."""
OVERLAP = 50
"""Video frames that neighbouring windows share at least (2 s)."""

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def starts(frames: int, size: int = WINDOW, overlap: int = OVERLAP) -> list[int]:
    """First video frames of the windows over `frames` of them: as few as share `overlap`, evenly spread.

    A clip of at most `size` frames has one window, its own length; all others have windows of `size`.
    """
    if frames <= size:
        return [0]
    steps = -(-(frames - size) // (size - overlap))
    return [round(step * (frames - size) / steps) for step in range(steps + 1)]


def ramp(frames: int, begin: int, size: int, overlap: int = OVERLAP) -> Tensor:
    """Weight of a window in the blend, float32 [2 size] at the acoustic rate; neighbours' sums are divided out.

    Where the clip goes on beyond the window's edge, a quarter of the overlap next to the edge counts nothing, since
    the network saw one side of it alone; over the half that follows the weight rises to 1.
    """
    rising = torch.ones(MEL_PER_FRAME * size)
    silent, slope = MEL_PER_FRAME * (overlap // 4), MEL_PER_FRAME * (overlap - 2 * (overlap // 4))
    edge = torch.cat([torch.zeros(silent), (torch.arange(slope) + 0.5) / max(slope, 1)])
    falling = rising.clone()
    if begin > 0:
        rising[: len(edge)] = edge
    if begin + size < frames:
        falling[len(falling) - len(edge) :] = edge.flip(0)
    return torch.minimum(rising, falling)


class Blend:
    """Weighted mean of windows along the acoustic axis of one sequence.

    Args:
        shape: of the whole; `axis` is the one with T frames.
    """

    def __init__(self, shape: Sequence[int], axis: int, device: torch.device) -> None:
        self._axis = axis
        self._sum = torch.zeros(*shape, device=device)
        self._weight = torch.zeros(shape[axis], device=device)

    def add(self, part: Tensor, begin: int, weight: Tensor) -> None:
        """Add a window that begins at acoustic frame `begin`; `weight` is [its length]."""
        length = part.shape[self._axis]
        weight = weight.to(part.device)
        along = [1] * part.ndim
        along[self._axis] = length
        self._sum.narrow(self._axis, begin, length).add_(part.float() * weight.view(along))
        self._weight[begin : begin + length] += weight

    def mean(self) -> Tensor:
        """The blended sequence, float32."""
        along = [1] * self._sum.ndim
        along[self._axis] = -1
        return self._sum / self._weight.view(along)


def windowed(velocity: Velocity, size: int = WINDOW, overlap: int = OVERLAP) -> Velocity:
    """A velocity for clips of any length from one for windows: at each time, the mean of the windows' velocities.

    So there is one trajectory for the whole clip and no seam between windows (MultiDiffusion, Bar-Tal et al. 2023).
    Each clip of a batch is cut by its own length.
    """

    def whole(x: Tensor, t: Tensor, mu: Tensor, mask: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            frames = length // MEL_PER_FRAME
            own = slice(row, row + 1)
            blend = Blend((1, x.shape[1], length), 2, x.device)
            for begin in starts(frames, size, overlap):
                width = min(size, frames)
                cut = slice(MEL_PER_FRAME * begin, MEL_PER_FRAME * (begin + width))
                part = velocity(x[own, :, cut], t[own], mu[own, :, cut], mask[own, cut])
                blend.add(part, cut.start, ramp(frames, begin, width, overlap))
            out[own, :, :length] = blend.mean()
        return out

    return whole
