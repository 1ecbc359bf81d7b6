"""`build`: from a source to a dataset. Does what is missing, keeps what is there, commits at the end."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.columns import Column
from pipeline.config import BuildConfig
from pipeline.pack import common_widths, disagreeing, pack_inputs, pack_shard, surviving
from pipeline.plan import Plan, Task, assign_shards, columns_of, make_plan, weights_digest
from pipeline.registry import STAGES, writers
from pipeline.sources import list_clips
from pipeline.stage import Clip, Reason
from pipeline.stages.speech import Speech
from shards.dataset import (
    CLIPS,
    INDEX,
    MANIFEST,
    QUARANTINE,
    ClipRow,
    Dataset,
    Index,
    Manifest,
    PackedShard,
    QuarantineRow,
)
from shards.errors import UserError
from shards.progress import Progress
from shards.schema import FIELDS, SCHEMA_VERSION
from shards.storage import local_path


@dataclass(frozen=True)
class Summary:
    """What a build did.

    Attributes:
        tasks: stage x shard units run; `kept` those that were there before.
        packed: packed shards written; `shards` all that the dataset has.
        quarantined: reason code -> clips.
    """

    dataset: str
    clips: int
    seconds: float
    tasks: int
    kept: int
    packed: int
    shards: int
    quarantined: dict[str, int]
    notes: list[str]


def build(source: str, uri: str, config: BuildConfig) -> Summary:
    """Build or complete the dataset at `uri` from `source`.

    Raises:
        UserError: unusable source, a dataset of another profile or schema, a worker that keeps dying.
    """
    dataset = Dataset(uri)
    previous = _previous(dataset, config)
    found = list_clips(source, config.source)
    shards = assign_shards(found.clips, config.pack.shard_clips, dataset.clips() if previous else ())
    dataset.store.root.mkdir(parents=True, exist_ok=True)
    work = _Work(dataset, config, shards)
    codebook = work.codebook(previous)
    plan = work.run(codebook)
    index, written = _pack(dataset, config, shards, plan)
    rows, refused = _tables(dataset, shards, plan)
    _conserve(shards, index, refused)
    manifest = _manifest(config, plan, codebook, shards)
    if not _is_current(dataset, previous, manifest, index, rows, refused):
        dataset.write_rows(CLIPS, ClipRow, rows)
        dataset.write_rows(QUARANTINE, QuarantineRow, refused)
        dataset.write(INDEX, index)
        dataset.write(MANIFEST, manifest)
    frames = sum(clip.frames for shard in index.shards for clip in shard.clips)
    return Summary(
        dataset=uri,
        clips=sum(len(shard.clips) for shard in index.shards),
        seconds=frames / 25,
        tasks=work.ran,
        kept=plan.done,
        packed=written,
        shards=len(index.shards),
        quarantined=dict(Counter(row.reason for row in refused)),
        notes=[f"source layout: {found.layout}", *found.notes],
    )


class _Work:
    """The computing part of a build: starts Ray only when there is something to run."""

    def __init__(self, dataset: Dataset, config: BuildConfig, shards: dict[str, list[Clip]]) -> None:
        self.dataset, self.config, self.shards = dataset, config, shards
        self.ran = 0

    def codebook(self, previous: Manifest | None) -> dict[str, str] | None:
        """The dataset's own k-means centroids: those it has, or new ones fitted on its training sound.

        Returns object name and hash of the fit's settings; None where the configuration names a file of centroids.
        """
        speech = self.config.speech
        if speech.centroids is not None:
            return None
        # A codebook stays while its settings stay, so that adding clips does not change the units of the others.
        weights = weights_digest(Speech(speech).weights())
        settings = {**speech.model_dump(exclude={"centroids"}), "weights": weights}
        fit = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        known = previous.codebook if previous else None
        if known and known["fit"] == fit and self.dataset.store.exists(known["name"]):
            return known
        stages = tuple(kind for kind in STAGES if kind.name == "audio")
        plan = make_plan(self.dataset, self.config, self.shards, None, only=stages)
        self._execute(plan.tasks, None)
        name = self._fit(plan, fit)
        return {"name": name, "fit": fit}

    def run(self, codebook: dict[str, str] | None) -> Plan:
        """Run whatever column is missing."""
        centroids = self.dataset.store.path(codebook["name"]).resolve() if codebook else None
        plan = make_plan(self.dataset, self.config, self.shards, centroids)
        self._execute(plan.tasks, centroids)
        return plan

    def _fit(self, plan: Plan, fit: str) -> str:
        from pipeline.codebook import fit_from_columns

        training = [shard for shard in self.shards if shard.startswith("train-")] or list(self.shards)
        columns = [column for shard in training for column in columns_of(self.dataset, plan, shard, ["audio"])]
        inputs = hashlib.sha256("".join([fit, *(column.sha256 for column in columns)]).encode()).hexdigest()[:16]
        name = f"codebooks/units-{inputs}.npy"
        if not self.dataset.store.exists(name):
            fit_from_columns(self.dataset, columns, self.config.speech, name)
        return name

    def _execute(self, tasks: Sequence[Task], centroids: Path | None) -> None:
        if not tasks:
            return
        from pipeline.runner import Runner, ray_session

        total = sum(len(self.shards[task.shard]) for task in tasks)
        with ray_session(self.config.run), Progress("build", total, "clip stages") as progress:
            arguments = (os.path.abspath(local_path(self.dataset.uri)), self.config, centroids, self.shards)
            runner = Runner(arguments, self.config.run.retries)
            runner.execute(
                tasks,
                lambda task, kept, refused: progress.advance(
                    len(self.shards[task.shard]), f"{task.stage} {task.shard}"
                ),
            )
        self.ran += len(tasks)


def _previous(dataset: Dataset, config: BuildConfig) -> Manifest | None:
    if not dataset.exists():
        root = dataset.store.root
        known = {"columns", "codebooks", "train", CLIPS, QUARANTINE}
        foreign = sorted(path.name for path in root.iterdir() if path.name not in known) if root.is_dir() else []
        if root.exists() and not root.is_dir():
            raise UserError(f"{dataset.uri}: is a file; name a folder for the dataset")
        if foreign:
            raise UserError(f"{dataset.uri}: holds other files ({foreign[0]} ...); name a new or empty folder")
        return None
    manifest = dataset.manifest()
    if manifest.profile != config.profile:
        raise UserError(f"{dataset.uri}: built with profile {manifest.profile}, not {config.profile}; use a new folder")
    return manifest


def _pack(dataset: Dataset, config: BuildConfig, shards: dict[str, list[Clip]], plan: Plan) -> tuple[Index, int]:
    made = writers(STAGES)
    fields = [name for name in FIELDS if name in config.pack.fields and name != "meta"]
    unknown = [name for name in config.pack.fields if name not in FIELDS]
    if unknown or not fields:
        raise UserError(f"pack.fields: unknown {unknown}; choose from {', '.join(FIELDS)}")
    stages = [kind.name for kind in STAGES if any(made[name] is kind for name in fields)]
    before = {shard.shard: shard for shard in dataset.index().shards} if dataset.store.exists(INDEX) else {}
    packed: list[PackedShard] = []
    columns: list[Column] = []
    written = 0
    for shard, clips in shards.items():
        # A clip that any stage refused is in no packed shard, whichever fields are packed.
        everything = columns_of(dataset, plan, shard, list(plan.marks))
        columns += everything
        odd = {clip.key for clip, _ in disagreeing(everything, clips)}
        alive = [clip for clip in surviving(everything, clips) if clip.key not in odd]
        chosen = [column for column in everything if column.stage in stages]
        old = before.get(shard)
        if old and old.inputs == pack_inputs(chosen, fields, alive) and dataset.store.exists(old.name):
            packed.append(old)
        elif alive:
            packed.append(pack_shard(dataset, shard, chosen, fields, alive))
            written += 1
    index = Index(
        schema_version=SCHEMA_VERSION,
        profile=config.profile,
        fields=["meta", *fields],
        widths=common_widths(columns),
        weights=plan.weights,
        config=_record(config),
        shards=packed,
    )
    return index, written


def _tables(dataset: Dataset, shards: dict[str, list[Clip]], plan: Plan) -> tuple[list[ClipRow], list[QuarantineRow]]:
    rows: list[ClipRow] = []
    refused: list[QuarantineRow] = []
    for shard, clips in shards.items():
        columns = columns_of(dataset, plan, shard, list(plan.marks))
        lengths = {clip.key: frames for clip, frames in disagreeing(columns, clips)}
        # Two branches (picture, sound) may refuse the same clip; the first stage in order speaks.
        first: dict[str, tuple[str, Any]] = {}
        for column in columns:
            for refusal in column.refused:
                first.setdefault(refusal.key, (column.stage, refusal))
        for clip in clips:
            state, frames = "quarantined", 0
            if clip.key in first:
                stage, refusal = first[clip.key]
                fault = refusal.reason is Reason.FAULT
                detail = (stage, refusal.reason.value, refusal.message, refusal.traceback, fault)
                refused.append(QuarantineRow(clip.key, clip.uri, clip.split, shard, *detail))
            elif clip.key in lengths:
                message = f"stages disagree on the number of video frames: {lengths[clip.key]}"
                detail = ("pack", Reason.AUDIO_LENGTH.value, message, "", False)
                refused.append(QuarantineRow(clip.key, clip.uri, clip.split, shard, *detail))
            else:
                state, frames = "packed", columns[0].clips[clip.key].frames
            place = (clip.uri, clip.digest, clip.split, clip.speaker, clip.text, clip.start, clip.end)
            rows.append(ClipRow(clip.key, *place, frames, shard, state))
    return rows, refused


def _conserve(shards: dict[str, list[Clip]], index: Index, refused: Sequence[QuarantineRow]) -> None:
    """Clips in = clips packed + clips quarantined, shard by shard."""
    packed = {shard.shard: len(shard.clips) for shard in index.shards}
    lost = Counter(row.shard for row in refused)
    for shard, clips in shards.items():
        if len(clips) != packed.get(shard, 0) + lost[shard]:
            raise RuntimeError(
                f"{shard}: {len(clips)} clips in, {packed.get(shard, 0)} packed, {lost[shard]} quarantined"
            )


def _is_current(
    dataset: Dataset,
    previous: Manifest | None,
    manifest: Manifest,
    index: Index,
    rows: list[ClipRow],
    refused: list[QuarantineRow],
) -> bool:
    """Whether the dataset says all this already; a build that died between its last writes leaves them unequal."""
    if previous != manifest or not all(map(dataset.store.exists, (CLIPS, QUARANTINE, INDEX))):
        return False
    return dataset.index() == index and dataset.clips() == rows and dataset.quarantine() == refused


def _manifest(
    config: BuildConfig, plan: Plan, codebook: dict[str, str] | None, shards: dict[str, list[Clip]]
) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        profile=config.profile,
        splits=sorted({shard.rsplit("-", 1)[0] for shard in shards}),
        columns=plan.marks,
        weights=plan.weights,
        codebook=codebook,
        config=_record(config),
    )


def _record(config: BuildConfig) -> dict[str, Any]:
    """The configuration as stored: what decides content, not how or where it ran."""
    return config.model_dump(mode="json", exclude={"run", "source"})
