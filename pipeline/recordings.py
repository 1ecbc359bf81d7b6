"""A source's recordings as clips: which were looked through, what was found, and what is left to look through."""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.config import BuildConfig
from pipeline.fingerprint import fingerprint, likely_recipe, recipe_of
from pipeline.records import Record, load_record, publish_record
from pipeline.registry import make_stage
from pipeline.segment import Detect, LeftOut, Rules, Segment, find_segments
from pipeline.stage import Clip, Reason, Reject, Rejection
from pipeline.stages.faces import Faces
from pipeline.words import count
from shards.config import Config
from shards.dataset import ClipRow, Dataset
from shards.errors import UserError
from shards.manifest import SEGMENTS, Manifest, Recipe, segments_record
from shards.schema import VIDEO_RATE
from shards.storage import is_readable, is_remote

VERSION = 1
"""Raise it whenever the same recording may be cut otherwise."""
_ELSEWHERE = {"every", "min_coverage", "rival", "rival_share", "speaks", "lead", "min_frames", "max_seconds"}
"""Settings of the faces stage that say nothing about where a face or a shot is."""
MARK = "+"
"""Between a recording's key and a segment's number; no key of a source has it."""


class SegmentTask(Config):
    """One recording to be looked through.

    Attributes:
        shard: object name of the record, without ending.
        media: sha256 of the recording's file.
        mark: hash of the recipe and of the part of the file that is the recording.
    """

    shard: str
    media: str
    mark: str
    recipe: Recipe
    reads: dict[str, str] = {}
    stage: Literal["segment"] = "segment"


class Refusal(Config):
    """Why a recording gives no clip, or not all of it does; `message` is without its path, which may change."""

    reason: Reason
    message: str
    traceback: str = ""


class Scan(Record):
    """Record of what was found in a recording; see `pipeline.segment.Found`."""

    task: SegmentTask
    frames: int
    cuts: list[float]
    segments: list[Segment]
    left_out: list[LeftOut]
    refused: Refusal | None

    @property
    def name(self) -> str:
        """Object name of the record."""
        return segments_record(self.task.media, self.task.mark)

    @property
    def tar_size(self) -> None:
        """It has no tar."""
        return


@dataclass(frozen=True)
class Cut:
    """Clips of recordings.

    Attributes:
        clips: segments, and recordings without any, which are refused as a whole.
        scans: name -> task and recording, for what has to be looked through first.
        waiting: recordings whose clips follow from these.
        notes: lines for the user.
    """

    clips: list[Clip]
    scans: dict[str, tuple[SegmentTask, Clip]]
    notes: list[str]
    waiting: list[Clip] = field(default_factory=list)


def scan_recipe(faces: Faces, config: BuildConfig, recipe: Recipe | None = None) -> Recipe:
    """What decides where recordings are cut: version, settings and the detector; `recipe` is that of `faces`, where it
    is known."""
    recipe = recipe or recipe_of(faces)
    settings = {key: value for key, value in recipe.settings.items() if key not in _ELSEWHERE}
    segment = config.segment.model_dump(mode="json", exclude={"enabled"})
    return Recipe(
        version=VERSION, settings={"faces_version": faces.version, "faces": settings, **segment}, weights=recipe.weights
    )


def cut_recordings(
    dataset: Dataset,
    recordings: Sequence[Clip],
    config: BuildConfig,
    sizes: Mapping[str, int],
    failed: Mapping[str, Scan],
    rows: Sequence[ClipRow],
    manifest: Manifest | None = None,
) -> Cut:
    """The clips of recordings, as far as these have been looked through.

    A segment has the recording's key with `+000`, `+001` ... after it, its split and its speaker. It has no text: what
    is said in all of a recording is not said in a part. Where looking through failed, the segments that the dataset has
    of the same media stay as they are.

    Args:
        recordings: with the digest of their media; one without is refused by the stages, as it cannot be read.
        sizes: name -> size of every stored object.
        failed: results that were not stored, by task.
        rows: the dataset's clips.
        manifest: says which detector it was, where that is not at hand.

    Raises:
        UserError: a record is damaged.
    """
    faces = make_faces(config)
    recipe = scan_recipe(faces, config, likely_recipe(faces, manifest)[0])
    tasks = {clip.key: task_of(clip, recipe) for clip in recordings if clip.digest}
    stored = sorted({f"{task.shard}.json" for task in tasks.values()} & set(sizes))
    known = {scan.task.shard: scan for scan in _load(dataset, stored)} | dict(failed)
    held: dict[tuple[str, str], list[ClipRow]] = defaultdict(list)
    for row in rows:
        if MARK in row.key:
            held[recording_of(row.key), row.digest].append(row)
    clips: list[Clip] = []
    waiting: list[Clip] = []
    scans: dict[str, tuple[SegmentTask, Clip]] = {}
    seconds = 0.0
    whole = made = kept = 0
    broken: list[str] = []
    for clip in recordings:
        task = tasks.get(clip.key)
        scan = known.get(task.shard) if task else None
        if task and not scan:
            # Copies of one file are looked through once.
            scans.setdefault(task.shard, (task, clip))
            waiting.append(clip)
            continue
        old = held[clip.key, clip.digest]
        if scan and scan.refused and scan.refused.reason is Reason.FAULT and old:
            clips += [replace(clip, key=row.key, text=row.text, start=row.start, end=row.end) for row in old]
            kept += 1
            continue
        clips += _clips(clip, scan)
        if scan:
            made += len(scan.segments)
            whole += scan.frames
            seconds += sum(segment.end - segment.start for segment in scan.segments)
            broken += [clip.key] if scan.segments and scan.refused else []
    clips.sort(key=lambda clip: clip.key)
    looked = len(recordings) - len(waiting) - kept
    found = f"{count(made, 'segment')} in {count(looked, 'recording')}, {seconds:.1f} of {whole / VIDEO_RATE:.1f} s"
    notes = [found] if looked else []
    if broken:
        some = f"{count(len(broken), 'recording')} with a picture that breaks off, e.g. {broken[0]}"
        notes.append(f"{some}; the segments before that are used")
    if kept:
        some = f"{count(kept, 'recording')} could not be looked through"
        notes.append(f"{some}; clips made of it before stay, and the next build tries again")
    if waiting:
        some = f"{count(len(waiting), 'recording')} to be looked through first"
        notes.append(f"{some}; which clips that gives, and what these take, is not known yet")
    return Cut(clips, scans, notes, waiting)


def make_faces(config: BuildConfig) -> Faces:
    """The faces stage, whose detector and joining rules decide."""
    stage = make_stage(Faces, config, None)
    assert isinstance(stage, Faces)
    return stage


def scan_recording(
    dataset: Dataset, task: SegmentTask, recording: Clip, config: BuildConfig, detect: Detect, batch: int
) -> Scan:
    """Look through a recording and publish what was found.

    An unforeseen error refuses the recording for this build and is not stored: the next build tries again.

    Args:
        batch: frames per call of the detector.

    Raises:
        UserError: the media are no longer there.
    """
    rules = Rules(config.segment, config.faces.cut, config.faces.track_overlap, config.faces.max_gap)
    try:
        found = find_segments(recording, rules, detect, batch)
    except UserError:
        raise
    except Reject as reject:
        if not is_readable(recording.uri):
            raise UserError(f"{recording.uri}: cannot be read any more; restore it and build again") from None
        refusal = _refusal(recording, reject)
        scan = Scan(task=task, frames=0, cuts=[], segments=[], left_out=[], refused=refusal)
        return publish_record(dataset, scan)
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        refusal = Refusal(reason=Reason.FAULT, message=words, traceback=traceback.format_exc())
        return Scan(task=task, frames=0, cuts=[], segments=[], left_out=[], refused=refusal)
    scan = Scan(
        task=task,
        frames=found.frames,
        cuts=found.cuts,
        segments=found.segments,
        left_out=found.left_out,
        refused=_refusal(recording, found.refused) if found.refused else None,
    )
    return publish_record(dataset, scan)


def forget_refused(dataset: Dataset, reasons: Collection[str]) -> None:
    """Drop what is known of recordings that were refused as a whole for one of these reasons, so that they are looked
    through again."""
    stored = [found.name for found in dataset.store.list(SEGMENTS)]
    scans = [scan for scan in _load(dataset, stored) if scan.refused and scan.refused.reason.value in reasons]
    dataset.store.delete([scan.name for scan in scans if not scan.segments])


def task_of(clip: Clip, recipe: Recipe) -> SegmentTask:
    """Looking through a recording; copies of one file share it."""
    part = "" if clip.start is None and clip.end is None else f"{clip.start} {clip.end}"
    mark = fingerprint("segment", recipe, {}, f"{clip.digest} {part}", 1)
    name = segments_record(clip.digest, mark).removesuffix(".json")
    return SegmentTask(shard=name, media=clip.digest, mark=mark, recipe=recipe)


def scans_of(dataset: Dataset, rows: Sequence[ClipRow]) -> list[Scan]:
    """What was found in the recordings that a dataset's clips are cut from, by the settings that cut them.

    Recordings whose record is gone are not among them.

    Raises:
        UserError: a record is damaged.
    """
    parts: dict[tuple[str, str], list[ClipRow]] = defaultdict(list)
    for row in rows:
        parts[recording_of(row.key), row.digest].append(row)
    media = {digest[:16] for _, digest in parts if digest}
    stored = sorted(dataset.store.list(SEGMENTS), key=lambda found: found.modified, reverse=True)
    names = [found.name for found in stored if found.name.removeprefix(SEGMENTS)[:16] in media]
    by_media: dict[str, list[Scan]] = defaultdict(list)
    for scan in _load(dataset, names):
        by_media[scan.task.media].append(scan)
    made = (
        next((scan for scan in by_media[digest] if _gave(scan, segments)), None)
        for (_, digest), segments in parts.items()
    )
    return [scan for scan in made if scan]


def _gave(scan: Scan, rows: Sequence[ClipRow]) -> bool:
    """Whether these are the clips of a recording in which this was found."""
    if scan.segments:
        return {(part.start, part.end) for part in scan.segments} == {(row.start, row.end) for row in rows}
    whole = len(rows) == 1 and MARK not in rows[0].key
    return whole and (not scan.left_out or abs(scan.left_out[0].start - (rows[0].start or 0)) < 1 / VIDEO_RATE)


def _load(dataset: Dataset, names: Sequence[str]) -> list[Scan]:
    with ThreadPoolExecutor(32 if is_remote(dataset.uri) else 1) as pool:
        return [scan for scan in pool.map(lambda name: load_record(dataset, Scan, name), names) if scan]


def recording_of(key: str) -> str:
    """Key of the recording that a clip is a segment of; its own, for one that is none."""
    return key.partition(MARK)[0]


def _refusal(recording: Clip, reject: Reject) -> Refusal:
    return Refusal(reason=reject.reason, message=str(reject).replace(f"{recording.uri}: ", ""))


def _clips(recording: Clip, scan: Scan | None) -> list[Clip]:
    if scan is None:
        return [recording]
    if not scan.segments:
        assert scan.refused, f"{scan.name}: neither segments nor a reason"
        said = scan.refused
        words = f"{recording.uri}: {said.message}"
        return [replace(recording, refused=Rejection(said.reason, words, said.traceback))]
    return [
        replace(recording, key=f"{recording.key}{MARK}{number:03}", text="", start=segment.start, end=segment.end)
        for number, segment in enumerate(scan.segments)
    ]
