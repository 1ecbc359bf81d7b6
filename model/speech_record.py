"""What lies beside the speech of a clip and says how it was made: by it speech is kept, made anew or removed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.storage import open_store

if TYPE_CHECKING:
    from pipeline.stage import Clip

FAILED = "failed.csv"


@dataclass(frozen=True)
class Task:
    """A clip of many: where its speech goes (`.wav`, or `.mp4` with a `.wav` beside it), and what it is made with."""

    key: str
    clip: Clip
    output: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A clip without speech: the code that quarantine would have, or `worker_died`."""

    key: str
    uri: str
    reason: str
    message: str


def made_with(output: Path) -> dict[str, Any] | None:
    """What the record beside a speech says of how it was made; None where there is no such record."""
    try:
        found = json.loads(output.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    facts = found.get("made_with") if isinstance(found, dict) else None
    return facts if isinstance(facts, dict) else None


def is_made(task: Task) -> bool:
    """Whether a clip's files are there and made as they would be now."""
    ending = {".wav", task.output.suffix, *([".npz"] if task.facts["save"] else [])}
    if not all(task.output.with_suffix(suffix).is_file() for suffix in ending):
        return False
    return made_with(task.output) == task.facts


def withdraw(output: Path, without_predictions: bool) -> None:
    """Take away the record of a speech that is about to be replaced, since it vouches for the other files; before it
    its `.npz`, which nothing will replace where the new speech comes `without_predictions`."""
    old = made_with(output)
    if old is None:
        return
    if without_predictions and old.get("save"):
        output.with_suffix(".npz").unlink(missing_ok=True)
    output.with_suffix(".json").unlink(missing_ok=True)


def remove_stale(task: Task, sources: Collection[Path]) -> None:
    """Remove the speech of a clip that failed, and its record, where that says that it was made otherwise: it must not
    be taken for speech of this run.

    Args:
        sources: resolved paths that stay.
    """
    old = made_with(task.output)
    if old is None or old == task.facts:
        return
    # The record goes last: whoever is interrupted here finds the rest by it.
    endings = (".mp4" if old.get("format") == "mp4" else None, ".wav", ".npz" if old.get("save") else None, ".json")
    for path in (task.output.with_suffix(ending) for ending in endings if ending):
        if path.resolve() not in sources:
            path.unlink(missing_ok=True)


def write_failed(output: Path, failed: Sequence[Failure]) -> None:
    """The list of clips without speech; none where there are none."""
    if not failed:
        (output / FAILED).unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["key", "uri", "reason", "message"])
    rows.writerows([each.key, each.uri, each.reason, each.message] for each in failed)
    write_whole(output / FAILED, text.getvalue().encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    open_store(str(path.parent)).write(path.name, data)
