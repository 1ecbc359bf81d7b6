"""The visual stages on new videos, in this process: what synthesis feeds its network. Videos may be long or silent."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import lcm
from typing import Any, TypeVar

import numpy as np

from pipeline.config import BuildConfig
from pipeline.fingerprint import weights_digest
from pipeline.frames import KEPT_BYTES, Frames
from pipeline.registry import VISUAL_STAGES, make_stage
from pipeline.stage import Clip, Fields, Item, Reason, Reject, Rejection, Stage
from pipeline.stages.faces import Faces, face_crops
from pipeline.tracks import Found, Track, filled, track_record
from shards.config import load_config
from shards.errors import UserError, warn
from shards.schema import VIDEO_RATE

SPAN = 1500
"""Frames of which face crops are held at once (60 s); longer videos go through the stages in spans of this length."""
CONTEXT = 25
"""Frames beyond a span's ends that its stages see at least: more than any of them smooths over."""
MAX_SECONDS = 4 * 3600
KEPT = ("lips", "identity", "expression")
"""What the network reads; nothing else is held of a whole video."""

X = TypeVar("X")


class Unusable(UserError):
    """A video that cannot be used; `reason` is the code that quarantine would have."""

    def __init__(self, uri: str, reason: Reason, message: str) -> None:
        self.reason, self.message = reason, message.removeprefix(f"{uri}: ")
        super().__init__(f"{uri}: {reason.value}: {self.message}")


@dataclass(frozen=True)
class Span:
    """Frames `first` to `last` of a video, for which the stages see `begin` to `end`."""

    first: int
    last: int
    begin: int
    end: int

    @property
    def seen(self) -> slice:
        return slice(self.begin, self.end)

    @property
    def own(self) -> slice:
        """Within what is seen."""
        return slice(self.first - self.begin, self.last - self.begin)


class Preparer:
    """The stages faces, landmarks, lips, identity and expression, set up once, as the training shards were made.

    Args:
        profile: of the dataset.
        recipes: stage -> version, settings and weights' digest, as the dataset recorded them.
        span: frames of a part of a long video, see `SPAN`.

    Raises:
        UserError: a stage here runs other weights than the dataset's, or they are not to be had.
    """

    def __init__(self, profile: str, recipes: Mapping[str, Mapping[str, Any]], span: int = SPAN) -> None:
        sections = {kind.name: recipes[kind.name]["settings"] for kind in VISUAL_STAGES}
        settings = load_config(BuildConfig, base={"profile": profile, **sections})
        # Training drops short and long clips; speech is wanted for all.
        limits = {"min_frames": 1, "max_seconds": MAX_SECONDS}
        settings = settings.model_copy(update={"faces": settings.faces.model_copy(update=limits)})
        self._stages: list[Stage[Any]] = []
        for kind in VISUAL_STAGES:
            stage = make_stage(kind, settings, None)
            if weights_digest(stage.weights()) != recipes[kind.name]["weights"]:
                raise UserError(
                    f"stage {kind.name}: its network files differ from the ones the training shards were made with"
                )
            if kind.version != recipes[kind.name]["version"]:
                warn(
                    f"stage {kind.name}: the training shards were made by version {recipes[kind.name]['version']}, "
                    f"this is version {kind.version}; what it gives may differ"
                )
            stage.setup()
            self._stages.append(stage)
        # Stages that look at every n-th frame look at the same ones in a part as in the whole.
        every = lcm(settings.identity.every, settings.landmarks.every)
        self._span, self._context = (-(-count // every) * every for count in (span, CONTEXT))

    def fields(self, clip: Clip, track: int | None = None) -> Fields:
        """Lips uint8 [F, 96, 96], identity and expression float16 [F, D] of the face that speaks, and `track`, how it
        was chosen: by the sound where several could speak and there is any, as in a build.

        Args:
            track: number of a face that lasts, from 1 for the leftmost; it is taken whoever speaks.

        Raises:
            Unusable: with the reason that quarantine would name. Where faces cannot be told apart, it lists them.
        """
        from pipeline.media import count_frames, decode_video

        faces = self._stages[0]
        assert isinstance(faces, Faces)
        total = guarded(clip, lambda: count_frames(clip.uri, clip.start, clip.end))
        if total > MAX_SECONDS * VIDEO_RATE:
            words = f"{total / VIDEO_RATE:.0f} s, at most {MAX_SECONDS} at once; cut it in a table with start and end"
            raise Unusable(clip.uri, Reason.TOO_LONG, words)
        limit = KEPT_BYTES if total <= self._span else 0
        frames = Frames(lambda: decode_video(clip.uri, clip.start, clip.end), limit)
        found = guarded(clip, lambda: faces.find(clip, frames))
        parts = [(span, clip, frames) for span in self._spans(found.seen.total)]
        if len(parts) > 1:
            parts = [(span, cut(clip, span), _frames(cut(clip, span))) for span, _, _ in parts]
        chosen, scores = self._choose(clip, faces, found, parts, track)
        face = (found.candidates if track is None else found.lasting)[chosen]
        guarded(clip, lambda: faces.check(clip, face, found.seen))
        path = filled(face, found.seen.total)
        made = [self._part(span, part, source, path) for span, part, source in parts]
        joined = {name: np.concatenate([fields[name] for fields in made]) for name in KEPT}
        record = track_record(face, found.tracks, chosen, scores)
        return {**joined, "track": record if track is None else record | {"by": "number"}}

    def _spans(self, total: int) -> list[Span]:
        """The whole, or parts of a longer video."""
        if total <= self._span:
            return [Span(0, total, 0, total)]
        return [
            Span(first, last, max(0, first - self._context), min(total, last + self._context))
            for first, last in pairwise([*range(0, total, self._span), total])
        ]

    def _choose(
        self, clip: Clip, faces: Faces, found: Found, parts: Sequence[tuple[Span, Clip, Frames]], track: int | None
    ) -> tuple[int, tuple[float, ...]]:
        """Place of face `track` among those that last, or of the speaker among the candidates, with their scores."""
        if track is not None:
            if not 1 <= track <= len(found.lasting):
                raise Unusable(clip.uri, Reason.NO_FACE, f"no face has number {track}: {described(found.lasting)}")
            return track - 1, ()
        try:
            flux = guarded(clip, lambda: faces.flux(clip, found))
            motions = [] if flux is None else guarded(clip, lambda: _motions(found, parts))
            return guarded(clip, lambda: faces.choose(clip, found, flux, motions))
        except Unusable as error:
            if error.reason is not Reason.SEVERAL_FACES:
                raise
            words = f"{error.message}, or name one with --track: {described(found.lasting)}"
            raise Unusable(clip.uri, error.reason, words) from None

    def _part(self, span: Span, clip: Clip, frames: Frames, path: tuple[np.ndarray, np.ndarray]) -> Fields:
        """`KEPT` of a span; `clip` and `frames` are what the stages see of it, `path` the face's in the whole video."""
        boxes, points = (each[span.seen] for each in path)
        crops = guarded(clip, lambda: face_crops(frames, [points])[0])
        fields: Fields = {"boxes": boxes.astype(np.float32), "points5": points.astype(np.float32), "face": crops}
        for stage in self._stages[1:]:
            made = stage.attempt(Item(clip, {name: fields[name] for name in stage.reads}))
            if isinstance(made, Rejection):
                raise Unusable(clip.uri, made.reason, made.message)
            fields.update(made)
        return {name: fields[name][span.own] for name in KEPT}


def cut(clip: Clip, span: Span) -> Clip:
    """What the stages see of a span, as a clip."""
    begin = (clip.start or 0.0) + span.begin / VIDEO_RATE
    return replace(clip, start=begin, end=(clip.start or 0.0) + span.end / VIDEO_RATE)


def described(tracks: Sequence[Track]) -> str:
    """Faces by number, left to right: when they are there, and where on average."""
    words = []
    for number, track in enumerate(tracks, 1):
        left, top, right, bottom = np.mean(list(track.boxes.values()), axis=0)
        when = f"{track.first / VIDEO_RATE:.2f}-{(track.last + 1) / VIDEO_RATE:.2f} s"
        words.append(f"{number}: {when}, box {left:.0f},{top:.0f} to {right:.0f},{bottom:.0f}")
    return "; ".join(words)


def guarded(clip: Clip, work: Callable[[], X]) -> X:
    """The result of `work`; what it finds wrong with the clip, and what it stumbles over, becomes `Unusable`."""
    try:
        return work()
    except UserError:
        raise
    except Reject as reject:
        raise Unusable(clip.uri, reject.reason, str(reject)) from None
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error} ({place.name}, line {place.lineno} of {place.filename})"
        raise Unusable(clip.uri, Reason.FAULT, words) from error


def _frames(clip: Clip) -> Frames:
    from pipeline.media import decode_video

    return Frames(lambda: decode_video(clip.uri, clip.start, clip.end), limit=0)


def _motions(found: Found, parts: Sequence[tuple[Span, Clip, Frames]]) -> list[np.ndarray]:
    """Motion of each candidate's mouth, [F]."""
    from pipeline.speaker import mouth_motion

    points = [filled(track, found.seen.total)[1] for track in found.candidates]
    motions = [np.zeros(found.seen.total) for _ in points]
    for span, _, frames in parts:
        crops = face_crops(frames, [each[span.seen] for each in points])
        for motion, faces in zip(motions, crops, strict=True):
            motion[span.first : span.last] = mouth_motion(faces)[span.own]
    return motions
