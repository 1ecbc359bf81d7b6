"""Detections joined into tracks: one face followed from frame to frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipeline.networks.retinaface import Faces as Detections


@dataclass
class Track:
    """Detections of one face: frame number -> box [4] and points [5, 2]."""

    boxes: dict[int, np.ndarray] = field(default_factory=dict)
    points: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def size(self) -> float:
        """Mean of width + height, the size by which auto_avsr chooses among faces."""
        corners = np.stack(list(self.boxes.values()))
        return float((corners[:, 2:] - corners[:, :2]).sum(axis=1).mean())

    @property
    def last(self) -> int:
        return next(reversed(self.boxes))  # entered in order


def join_tracks(found: list[Detections], overlap: float, max_gap: int) -> list[Track]:
    """Tracks from detections per frame: each detection joins the track whose last box it overlaps most.

    Args:
        overlap: least intersection over union.
        max_gap: frames after which a track that finds no detection is closed.
    """
    from pipeline.networks.retinaface import overlaps

    tracks: list[Track] = []
    for frame, faces in enumerate(found):
        taken: set[int] = set()
        live = [track for track in tracks if frame - track.last <= max_gap + 1]
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
