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

from pydantic import ConfigDict, ValidationError

from pipeline.words import count
from shards.config import Config
from shards.dataset import Dataset
from shards.errors import UserError, warn
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


class _Entry(Config):
    """A part of a record. Other versions of the program may have left out fields, or may know more of them."""

    model_config = ConfigDict(extra="ignore")


class StageRun(_Entry):
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

    tasks: int = 0
    found: int = 0
    clips: int = 0
    refused: int = 0
    seconds: float = 0.0
    compute: float = 0.0
    setup: float = 0.0
    active: float = 0.0
    clips_per_second: float | None = None
    read: int = 0
    written: int = 0
    peak: int = 0
    workers: int = 0
    hosts: dict[str, int] = {}


class HostRun(_Entry):
    """A machine of the build: what it has, seconds that it was there, and whether it was lost before the end."""

    host: str
    node: str = ""
    kind: str = ""
    cpus: float = 0.0
    gpus: float = 0.0
    seconds: float = 0.0
    lost: bool = False


class LostWork(_Entry):
    """Work that went with its worker: how often, and worker seconds."""

    workers: int = 0
    seconds: float = 0.0


class PoisonClip(_Entry):
    """A clip that ended its worker and was refused for it."""

    key: str
    stage: str = ""
    shard: str = ""
    reason: str = ""


class Expected(_Entry):
    """What `f2v plan` would have said before: wall clock, worker seconds by stage, stages without timings, money."""

    seconds: float = 0.0
    work: dict[str, float] = {}
    unknown: list[str] = []
    cost: float | None = None


class RunRecord(_Entry):
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
    message: str = ""
    begin: str
    end: str = ""
    seconds: float = 0.0
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    hosts: list[HostRun] = []
    stages: dict[str, StageRun] = {}
    lost: dict[str, LostWork] = {}
    poison: list[PoisonClip] = []
    work: float = 0.0
    node_hours: dict[str, float] = {}
    prices: dict[str, float] = {}
    cost: float | None = None
    unpriced: list[str] = []
    expected: Expected | None = None


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


def list_runs(dataset: Dataset) -> tuple[dict[str, RunRecord], dict[str, str]]:
    """Records of the builds that left one, by name, the oldest first; and names of those that cannot be read, with
    why."""
    records: dict[str, RunRecord] = {}
    faults: dict[str, str] = {}
    for name in _names(dataset):
        try:
            records[name] = _load(dataset, name)
        except FileNotFoundError:
            continue  # deleted since it was listed
        except (OSError, UserError) as error:
            faults[name] = str(error)
    return records, faults


def last_run(dataset: Dataset) -> RunRecord | None:
    """Of the latest build that went through and computed something; None where there is none. Nothing but estimates
    depends on it: records that cannot be read are left out, with a warning."""
    faults: list[str] = []
    found = None
    for name in reversed(_names(dataset)):
        try:
            record = _load(dataset, name)
        except FileNotFoundError:
            continue
        except (OSError, UserError) as error:
            faults.append(str(error))
            continue
        if record.outcome == "done" and record.work > 0:
            found = record
            break
    if faults:
        more = f", and {len(faults) - 1} more (`f2v status --runs`)" if len(faults) > 1 else ""
        warn(f"estimates leave out {count(len(faults), 'run record')}: {faults[0]}{more}")
    return found


def _names(dataset: Dataset) -> list[str]:
    return sorted(found.name for found in dataset.store.list(RUNS) if OWN.fullmatch(found.name))


def _load(dataset: Dataset, name: str) -> RunRecord:
    """Raises UserError: damaged, or of a version that writes something else; OSError: it cannot be read."""
    try:
        return RunRecord.model_validate_json(dataset.store.read(name))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        what = f"{key} is wrong or missing" if key else "no JSON object"
        raise UserError(
            f"{dataset.uri}/{name}: damaged, or of another version ({what}); delete it, nothing depends on it"
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
