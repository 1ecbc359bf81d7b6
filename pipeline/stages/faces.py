"""One face track per clip, and the face aligned to a small crop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from pipeline.stage import Clip, Fields, Item, Reason, Reject, Stage
from pipeline.tracks import Track, join_tracks
from shards.config import Config
from shards.schema import FACE_SIZE, VIDEO_RATE

if TYPE_CHECKING:
    from pipeline.networks.retinaface import Faces as Detections

BATCH = 8
"""Frames per network call."""


class FacesConfig(Config):
    """Detection and tracking.

    Attributes:
        score: lowest detection score, as in auto_avsr's preparation.
        overlap: suppression limit of the detector.
        long_side: larger frames are scaled down for detection.
        track_overlap: a detection joins the track whose last box it overlaps by this much (intersection over union).
        max_gap: frames without a face that are filled by interpolation; a longer absence rejects the clip.
        min_coverage: share of frames in which the face must be found.
        rival: another face whose mean size is at least this share of the largest one's, and that is there for at least
            `rival_share` of the frames, makes the clip ambiguous.
        min_frames, max_seconds: shorter and longer clips are rejected.
    """

    score: float = Field(0.8, gt=0, le=1)
    overlap: float = Field(0.4, gt=0, lt=1)
    long_side: int = Field(640, ge=64)
    track_overlap: float = Field(0.3, gt=0, lt=1)
    max_gap: int = Field(12, ge=0)
    min_coverage: float = Field(0.8, gt=0, le=1)
    rival: float = Field(0.8, gt=0, le=1)
    rival_share: float = Field(0.2, gt=0, le=1)
    min_frames: int = Field(12, ge=1)
    max_seconds: float = Field(60, gt=0, le=500)


class Faces(Stage[FacesConfig]):
    """Decodes the media, writes `boxes` float32 [F, 4], `points5` float32 [F, 5, 2] and `face` uint8 [F, 112, 112, 3].

    Detections of neighbouring frames are joined by overlap; of several tracks the largest is the speaker's, unless a
    rival of like size leaves that open.
    """

    name: ClassVar[str] = "faces"
    version: ClassVar[int] = 1
    writes: ClassVar[tuple[str, ...]] = ("boxes", "points5", "face")
    media: ClassVar[bool] = True

    def weights(self) -> Sequence[Path]:
        """The detector's bytes."""
        from pipeline.networks.retinaface import weights_file

        return [weights_file()]

    def setup(self) -> None:
        """Load the detector."""
        from pipeline.networks.retinaface import RetinaFace

        self._detector = RetinaFace(self.config.score, self.config.overlap, self.config.long_side)

    def detect(self, frames: Sequence[np.ndarray]) -> list[Detections]:
        """Faces of each RGB frame, uint8 [H, W, 3], all of one size; after `setup`."""
        return self._detector.detect(frames)

    def run(self, item: Item) -> Fields:
        """Track and crops of one clip.

        Raises:
            Reject: TOO_SHORT, TOO_LONG, NO_FACE, FACE_LOST, SEVERAL_FACES, or what decoding finds.
        """
        from pipeline import align

        clip = item.clip
        found = list(self._detect(clip))
        if len(found) < self.config.min_frames:
            raise Reject(
                Reason.TOO_SHORT, f"{clip.uri}: {len(found)} frames at 25 Hz, at least {self.config.min_frames}"
            )
        track = self._choose(clip, join_tracks(found, self.config.track_overlap, self.config.max_gap), len(found))
        frames = range(len(found))
        points = align.fill_gaps([track.points.get(frame) for frame in frames])
        boxes = align.fill_gaps([track.boxes.get(frame) for frame in frames])
        return {
            "boxes": boxes.astype(np.float32),
            "points5": points.astype(np.float32),
            "face": self._crops(clip, align.smooth(points)),
        }

    def _detect(self, clip: Clip) -> Iterator[Detections]:
        """Detections frame by frame; frames are held a batch at a time."""
        from pipeline.media import decode_video

        limit = int(self.config.max_seconds * VIDEO_RATE)
        frames = decode_video(clip.uri, clip.start, clip.end)
        seen = 0
        while batch := list(islice(frames, BATCH)):
            seen += len(batch)
            if seen > limit:
                raise Reject(
                    Reason.TOO_LONG,
                    f"{clip.uri}: longer than {self.config.max_seconds:g} s; cut it in a table with start and end, "
                    "or raise faces.max_seconds",
                )
            yield from self._detector.detect(batch)

    def _choose(self, clip: Clip, tracks: list[Track], total: int) -> Track:
        if not tracks:
            raise Reject(Reason.NO_FACE, f"{clip.uri}: no face in any of {total} frames")
        # A spurious detection may be large; a face that is there for longer than the gaps we fill comes first.
        lasting = [track for track in tracks if len(track.boxes) > self.config.max_gap] or tracks
        best = max(lasting, key=lambda track: track.size)
        for track in lasting:
            share = len(set(track.boxes) & set(best.boxes)) / total
            rival = track is not best and track.size >= self.config.rival * best.size
            if rival and share >= self.config.rival_share:
                raise Reject(
                    Reason.SEVERAL_FACES,
                    f"{clip.uri}: two faces of like size ({best.size:.0f} and {track.size:.0f} px); which speaks is "
                    "not decided: crop the video to one",
                )
        there = np.array(sorted(best.boxes))
        gap = int(np.diff(np.concatenate([[-1], there, [total]])).max()) - 1
        if gap > self.config.max_gap or len(there) < self.config.min_coverage * total:
            raise Reject(
                Reason.FACE_LOST,
                f"{clip.uri}: the face is there in {len(there)} of {total} frames, away for {gap} in a row "
                f"(allowed {self.config.max_gap}); cut the clip to the part with one face",
            )
        return best

    def _crops(self, clip: Clip, points: np.ndarray) -> np.ndarray:
        from pipeline import align
        from pipeline.media import decode_video

        crops = np.zeros((len(points), FACE_SIZE, FACE_SIZE, 3), np.uint8)
        # A second pass over the video: smoothing looks ahead, and full frames are too large to keep.
        for number, frame in enumerate(decode_video(clip.uri, clip.start, clip.end)):
            crops[number] = align.warp(frame, align.similarity(points[number], align.ARCFACE), FACE_SIZE)
        return crops
