"""Detections joined into tracks: one face followed from frame to frame."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class Seen:
    """What the detector saw: the number of frames, the ones looked at, their faces, the first frames of new shots."""

    total: int
    looked: list[int]
    found: list[Detections]
    cuts: list[int]


@dataclass(frozen=True)
class Found:
    """Faces of a clip: what was seen, the number of tracks; those that last, and those among them that may be the
    speaker's, left to right."""

    seen: Seen
    tracks: int
    lasting: list[Track]
    candidates: list[Track]


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


def left_to_right(tracks: Sequence[Track]) -> list[Track]:
    """Ordered by the mean left edge of their boxes."""
    return sorted(tracks, key=lambda track: float(np.mean([box[0] for box in track.boxes.values()])))


def filled(track: Track, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [F, 4] and points [F, 5, 2] of a track in every frame, float64."""
    from pipeline.align import fill_gaps

    frames = range(total)
    return fill_gaps([track.boxes.get(n) for n in frames]), fill_gaps([track.points.get(n) for n in frames])


def track_record(track: Track, tracks: int, chosen: int, scores: Sequence[float]) -> dict[str, Any]:
    """The field `track`.

    `by` is how the face was chosen: `only`, `largest` of several (the others were small or there for a moment), or
    `speaks`, with `scores` of the candidates from left to right, the place of the chosen one among them and its margin.
    """
    others = [score for number, score in enumerate(scores) if number != chosen]
    return {
        "tracks": tracks,
        "candidates": max(len(scores), 1),
        "chosen": chosen,
        "box": [round(float(side), 1) for side in np.mean(list(track.boxes.values()), axis=0)],
        "by": "speaks" if scores else "only" if tracks == 1 else "largest",
        "scores": [round(score, 4) for score in scores],
        "margin": round(scores[chosen] - max(others), 4) if others else None,
    }
