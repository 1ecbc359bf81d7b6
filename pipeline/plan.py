"""What a build has to do: shards, the graph of stages, and the work whose result does not exist yet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.columns import Column, fingerprint, load_column
from pipeline.config import BuildConfig
from pipeline.registry import STAGES, StageClass, upstream, writers
from pipeline.stage import Clip, Reason, Stage
from shards.config import Config
from shards.dataset import ClipRow, Dataset
from shards.errors import UserError
from shards.storage import file_sha256


class Task(Config):
    """One stage over one shard.

    Attributes:
        reads: stage name -> fingerprint of the columns it reads.
    """

    stage: str
    shard: str
    fingerprint: str
    weights: str
    reads: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """Fingerprint of every stage x shard, and the tasks to run in dependency order."""

    marks: dict[str, dict[str, str]]
    weights: dict[str, str]
    tasks: list[Task]
    done: int


def make_stage(kind: StageClass, config: BuildConfig, centroids: Path | None) -> Stage[Any]:
    """A stage with its section of the configuration; `centroids` are the dataset's own when the section names none."""
    section = getattr(config, kind.name)
    if kind.name == "speech" and section.centroids is None:
        section = section.model_copy(update={"centroids": centroids})
    return kind(section)


def assign_shards(clips: Sequence[Clip], shard_clips: int, previous: Iterable[ClipRow]) -> dict[str, list[Clip]]:
    """Shard name -> its clips ordered by key.

    A clip known from `previous` stays in its shard, so that adding clips leaves the shards before them alone. New
    clips fill new shards, per split, in the order of a hash of their keys: neighbours in the source (one speaker, one
    video) spread over shards.
    """
    homes = {row.key: row.shard for row in previous}
    shards: dict[str, list[Clip]] = {}
    fresh: dict[str, list[Clip]] = {}
    for clip in clips:
        home = homes.get(clip.key)
        if home is not None and home.rsplit("-", 1)[0] == clip.split:
            shards.setdefault(home, []).append(clip)
        else:
            fresh.setdefault(clip.split, []).append(clip)
    for split, members in fresh.items():
        members.sort(key=lambda clip: hashlib.sha256(clip.key.encode()).digest())
        used = [int(name.rsplit("-", 1)[1]) for name in homes.values() if name.rsplit("-", 1)[0] == split]
        number = max(used, default=-1) + 1
        for begin in range(0, len(members), shard_clips):
            shards[f"{split}-{number:06d}"] = members[begin : begin + shard_clips]
            number += 1
    return {name: sorted(shards[name], key=lambda clip: clip.key) for name in sorted(shards)}


def make_plan(
    dataset: Dataset,
    config: BuildConfig,
    shards: dict[str, list[Clip]],
    centroids: Path | None,
    only: Sequence[StageClass] = STAGES,
) -> Plan:
    """Fingerprints of `only` these stages (closed under what they read) for all shards, and what is missing."""
    made = writers(STAGES)
    marks: dict[str, dict[str, str]] = {}
    weights: dict[str, str] = {}
    tasks: list[Task] = []
    again: set[tuple[str, str]] = set()
    done = 0
    for kind in only:
        stage = make_stage(kind, config, centroids)
        weights[kind.name] = weights_digest(stage.weights())
        marks[kind.name] = {}
        for shard, clips in shards.items():
            reads = {name: marks[name][shard] for name in upstream(kind, made)}
            mark = fingerprint(stage, weights[kind.name], reads, clips)
            marks[kind.name][shard] = mark
            column = load_column(dataset, kind.name, shard, mark)
            # A fault is tried again, and with it whatever was computed without the clip.
            faulty = column is not None and any(refusal.reason is Reason.FAULT for refusal in column.refused)
            if column is None or faulty or any((name, shard) in again for name in reads):
                again.add((kind.name, shard))
                tasks.append(
                    Task(
                        stage=kind.name,
                        shard=shard,
                        fingerprint=mark,
                        weights=weights[kind.name],
                        reads=reads,
                    )
                )
            else:
                done += 1
    return Plan(marks, weights, tasks, done)


def weights_digest(paths: Sequence[Path]) -> str:
    """sha256 over the digests of the files in the order given; empty for no files.

    Raises:
        UserError: a file cannot be read.
    """
    if not paths:
        return ""
    try:
        return hashlib.sha256("".join(file_sha256(path) for path in paths).encode()).hexdigest()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def columns_of(dataset: Dataset, plan: Plan, shard: str, stages: Sequence[str]) -> list[Column]:
    """Records of a shard's columns, which must exist by now."""
    found = [load_column(dataset, stage, shard, plan.marks[stage][shard]) for stage in stages]
    assert all(found), f"{shard}: columns missing after the build"
    return [column for column in found if column is not None]
