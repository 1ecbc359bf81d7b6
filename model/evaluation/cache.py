"""Scores of pairs of files that were measured before."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import warn
from shards.storage import file_sha256, open_store, user_cache

if TYPE_CHECKING:
    from model.evaluation.metrics import Scores


class ScoreCache:
    """One JSON file per pair, published whole, named by all that its scores depend on. Processes may share the folder.

    Args:
        folder: default in the user's cache.
        measured: how the metrics are set up (`Metrics.describe`).
    """

    def __init__(self, folder: Path | None, measured: dict[str, Any]) -> None:
        self.folder = folder or user_cache() / "scores"
        self._store = open_store(str(self.folder))
        self._measured = json.dumps(measured, sort_keys=True, default=str)
        self._warned = False

    def name(self, generated: Path, reference: Path, text: str | None) -> str:
        """Of the entry for two files, by their bytes. Raises OSError: one cannot be read."""
        parts = [file_sha256(generated), file_sha256(reference), text, self._measured]
        digest = sha256(json.dumps(parts).encode()).hexdigest()
        return f"{digest[:2]}/{digest[2:]}.json"

    def get(self, name: str) -> Scores | None:
        """None where there is no entry, or a damaged one."""
        try:
            return _parse(json.loads(self._store.read(name)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def put(self, name: str, scores: Scores) -> None:
        """Keep scores. A folder that cannot be written to is a warning, once."""
        try:
            self._store.write(name, json.dumps(asdict(scores)).encode())
        except OSError as error:
            if not self._warned:
                warn(f"{self.folder}: scores are not kept ({error.strerror or error})")
            self._warned = True


def _parse(tree: Any) -> Scores:
    """Raises what a tree of another shape leads to."""
    from model.evaluation.metrics import Scores

    sums = {str(key): (float(total), float(count)) for key, (total, count) in tree["sums"].items()}
    heard, heard_reference = tree["heard"], tree["heard_reference"]
    words = [*(text for text in (heard, heard_reference) if text is not None), *tree["notes"]]
    if not all(isinstance(word, str) for word in words):
        raise TypeError("texts")
    if not all(math.isfinite(number) for pair in sums.values() for number in pair):
        raise ValueError("numbers")
    return Scores(sums, heard, heard_reference, tuple(tree["notes"]))
