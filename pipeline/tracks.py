"""Detections joined into tracks: one face followed from frame to frame."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipeline.networks.anchors import Faces as Detections


@dataclass
class Track:
    """Detections of one face: frame number -> box [4] and points [5, 2], in rising order."""

    boxes: dict[int, np.ndarray] = field(default_factory=dict)
    points: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def size(self) -> float:
        """Mean of width + height, the size by which auto_avsr chooses among faces."""
        corners = np.stack(list(self.boxes.values()))
        return float((corners[:, 2:] - corners[:, :2]).sum(axis=1).mean())

    @property
    def first(self) -> int:
        return next(iter(self.boxes))

    @property
    def last(self) -> int:
        return next(reversed(self.boxes))

    def longest_gap(self, total: int) -> int:
        """Most frames in a row, of `total`, for which it was not seen."""
        return int(np.diff([-1, *self.boxes, total]).max()) - 1


def join_tracks(
    found: Sequence[Detections],
    overlap: float,
    max_gap: int,
    frames: Sequence[int] | None = None,
    cuts: Sequence[int] = (),
) -> list[Track]:
    """Tracks from detections per frame: each detection joins the track whose last box it overlaps most.

    Args:
        overlap: least intersection over union.
        max_gap: frames after which a track that finds no detection is closed.
        frames: numbers of the frames that were looked at, rising; all from 0 on when None.
        cuts: first frames of shots; a face after a cut is another track, be it at the same place.
    """
    from pipeline.networks.anchors import overlaps

    tracks: list[Track] = []
    for frame, faces in zip(range(len(found)) if frames is None else frames, found, strict=True):
        taken: set[int] = set()
        shot = bisect(cuts, frame)
        live = [track for track in tracks if frame - track.last <= max_gap + 1 and bisect(cuts, track.last) == shot]
        pairs = []
        for position, track in enumerate(live):
            if len(faces.boxes):
                shared = overlaps(track.boxes[track.last], faces.boxes)
                pairs += [(float(value), position, number) for number, value in enumerate(shared) if value >= overlap]
        joined: set[int] = set()
        for _, position, number in sorted(pairs, key=lambda pair: -pair[0]):
            if position not in joined and number not in taken:
                live[position].boxes[frame], live[position].points[frame] = faces.boxes[number], faces.points[number]
                joined.add(position)
                taken.add(number)
        for number in set(range(len(faces.boxes))) - taken:
            tracks.append(Track({frame: faces.boxes[number]}, {frame: faces.points[number]}))
    return tracks
