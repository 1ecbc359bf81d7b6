"""Run records: one JSON object in the dataset for each build that ran something, `runs/<UTC stamp>-<8 hex>.json`."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from shards.config import Config
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import OWN, RUNS

PACKAGES = (
    "faces2voices",
    "ray",
    "torch",
    "numpy",
    "scipy",
    "librosa",
    "numba",
    "scikit-learn",
    "av",
    "opencv-python",
    "onnxruntime",
    "dlib-bin",
    "transformers",
    "webdataset",
    "pyarrow",
    "pydantic",
)
"""What may decide what a build gives."""

Outcome = Literal["done", "failed", "stopped"]


class StageRun(Config):
    """What one stage did and took; `pack`, `segment` and `codebook` are stages here.

    Attributes:
        tasks, found: tasks computed, and those whose result was there already.
        clips, refused: clips that came out of computed tasks, and those that they refused.
        seconds, compute, setup: worker seconds of the tasks; of them inside the stage itself, and loading networks.
        active: seconds in which at least one worker was at it.
        clips_per_second: clips, refused ones among them, per second of `active`.
        read, written: bytes.
        peak: most bytes that a worker held in memory.
        workers: tasks at the same time, at most.
        hosts: host -> tasks.
    """

    tasks: int
    found: int
    clips: int
    refused: int
    seconds: float
    compute: float
    setup: float
    active: float
    clips_per_second: float | None
    read: int
    written: int
    peak: int
    workers: int
    hosts: dict[str, int]


class HostRun(Config):
    """A machine of the build: what it has, seconds that it was there, and whether it was lost before the end."""

    host: str
    node: str
    kind: str
    cpus: float
    gpus: float
    seconds: float
    lost: bool


class LostWork(Config):
    """Work that went with its worker: how often, and worker seconds."""

    workers: int
    seconds: float


class PoisonClip(Config):
    """A clip that ended its worker and was refused for it."""

    key: str
    stage: str
    shard: str
    reason: str


class Expected(Config):
    """What `f2v plan` would have said before: wall clock, worker seconds by stage, stages without timings, money."""

    seconds: float
    work: dict[str, float]
    unknown: list[str]
    cost: float | None


class RunRecord(Config):
    """A build.

    Attributes:
        outcome, message: how it ended, and the error that ended it.
        begin, end: UTC, ISO 8601.
        seconds: between them, the wall clock.
        config: all settings.
        versions: package -> version; `python`, `system` and, in a checkout, `commit`.
        stages: by name, in the order in which they came up.
        lost: why -> workers and their work.
        poison: clips that ended workers.
        work: worker seconds of all stages.
        node_hours: kind of machine -> hours that machines of the kind were there.
        prices: what the settings say of an hour of them.
        cost: node hours at these prices; None where no kind that was there has one. `unpriced`: kinds without one.
        expected: the estimate before it began; None where the dataset had no timings.
    """

    outcome: Outcome
    message: str
    begin: str
    end: str
    seconds: float
    config: dict[str, Any]
    versions: dict[str, str]
    hosts: list[HostRun]
    stages: dict[str, StageRun]
    lost: dict[str, LostWork]
    poison: list[PoisonClip]
    work: float
    node_hours: dict[str, float]
    prices: dict[str, float]
    cost: float | None
    unpriced: list[str]
    expected: Expected | None


def versions() -> dict[str, str]:
    """Of the packages in `PACKAGES` that are installed, of Python and the system, and the commit in a checkout."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    commit = _commit(Path(__file__).resolve().parent.parent)
    return {**found, "commit": commit} if commit else found


def money(node_hours: Mapping[str, float], prices: Mapping[str, float]) -> tuple[float | None, list[str]]:
    """Cost of machines, and the kinds that have no price; None where none of them has one."""
    priced = [kind for kind in node_hours if kind in prices]
    cost = sum(node_hours[kind] * prices[kind] for kind in priced)
    return (round(cost, 4) if priced else None), sorted(set(node_hours) - set(priced))


def stamp(moment: datetime) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_run(dataset: Dataset, record: RunRecord) -> str:
    """Store a record under a name of its own, which is returned."""
    begin = "".join(letter for letter in record.begin.partition(".")[0] if letter.isalnum())
    name = f"{RUNS}{begin}Z-{os.urandom(4).hex()}.json"
    dataset.store.write(name, record.model_dump_json(indent=1).encode())
    return name


def list_runs(dataset: Dataset) -> dict[str, RunRecord]:
    """Name -> record of every build that left one, the oldest first.

    Raises:
        UserError: a record is damaged.
    """
    return {name: _load(dataset, name) for name in _names(dataset)}


def last_run(dataset: Dataset) -> RunRecord | None:
    """Of the latest build that went through and computed something; None where there is none.

    Raises:
        UserError: its record is damaged.
    """
    for name in reversed(_names(dataset)):
        record = _load(dataset, name)
        if record.outcome == "done" and record.work > 0:
            return record
    return None


def _names(dataset: Dataset) -> list[str]:
    return sorted(found.name for found in dataset.store.list(RUNS) if OWN.fullmatch(found.name))


def _load(dataset: Dataset, name: str) -> RunRecord:
    try:
        return RunRecord.model_validate_json(dataset.store.read(name))
    except ValidationError as error:
        raise UserError(
            f"{dataset.uri}/{name}: damaged ({error.error_count()} wrong entries); delete it, nothing depends on it"
        ) from None


def _commit(root: Path) -> str:
    """Of a checkout, with `+` where files differ from it; empty for an installed package."""
    if not (root / ".git").exists():
        return ""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(root: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
