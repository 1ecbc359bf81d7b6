"""Fingerprints: the hash of all that decides a column's content."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.networks.weights import MissingCheckpoint, no_fetching
from pipeline.stage import Clip, Stage
from shards.errors import UserError
from shards.manifest import Manifest, Recipe
from shards.schema import SCHEMA_VERSION
from shards.storage import file_sha256, open_store, user_cache

CACHE = "digests.json"
ABSENT = "not at hand"
"""Stands for the digest of networks that are not there; no column has it."""


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Hash of the code that makes columns: what a version number says nothing of between two commits."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for floor in ("pipeline", "shards") for path in (root / floor).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def recipe_of(stage: Stage[Any]) -> Recipe:
    """What a stage is: version, settings, networks and centroids.

    Paths among the settings do not count: the content of the files they name does, through the digests.

    Raises:
        UserError: a network file cannot be read.
    """
    return _recipe(stage, weights_digest(stage.weights()))


def likely_recipe(stage: Stage[Any], manifest: Manifest | None) -> tuple[Recipe, MissingCheckpoint | None]:
    """What a stage is, without fetching its network, and what is missing of that.

    A missing file is taken for the one that the dataset's columns of this stage and these settings were made with, or
    else for one that no column was made with.

    Raises:
        UserError: a network file cannot be read.
    """
    try:
        with no_fetching():
            return recipe_of(stage), None
    except MissingCheckpoint as error:
        missing = error
    recipe = _recipe(stage, ABSENT)
    known = manifest.recipes.get(stage.name, {}) if manifest else {}
    used = Counter(ref.recipe for ref in manifest.columns.get(stage.name, {}).values()) if manifest else Counter()
    for old in (known[key] for key in sorted(known, key=lambda key: -used[key])):
        like = recipe.model_copy(update={"weights": old.weights})
        if like.model_copy(update={"codebook": old.codebook}) == old or stage.differ_in_codebook(old, like):
            return like, missing
    return recipe, missing


def _recipe(stage: Stage[Any], weights: str) -> Recipe:
    fields = type(stage.config).model_fields
    paths = {key for key, field in fields.items() if "Path" in str(field.annotation)}
    settings = stage.config.model_dump(mode="json", exclude=paths)
    return Recipe(
        version=stage.version,
        settings=settings,
        weights=weights,
        codebook=weights_digest(stage.codebook()),
    )


def recipe_key(recipe: Recipe) -> str:
    """Short hash of a recipe."""
    return _hash(recipe.model_dump())


def fingerprint(stage: str, recipe: Recipe, reads: Mapping[str, str], media: str, attempt: int) -> str:
    """Hash of all that decides a column's content.

    Args:
        reads: upstream stage -> fingerprint of the column that is read.
        media: `media_digest` of the shard, for stages that decode media; else empty.
        attempt: counts from 1; a repeated attempt is another column, so that no object ever changes.
    """
    identity = {
        "schema": SCHEMA_VERSION,
        "stage": stage,
        "recipe": recipe.model_dump(),
        "reads": dict(reads),
        "media": media,
        "attempt": attempt,
    }
    return _hash(identity)


def media_digest(clips: Sequence[Clip]) -> str:
    """Hash of the content and cut of a shard's clips."""
    return _hash([(clip.key, clip.digest, clip.start, clip.end, *_refusal(clip)) for clip in clips])


def _refusal(clip: Clip) -> tuple[str, ...]:
    """Reason and words without the path, for a clip that was refused before any stage."""
    return (clip.refused.reason.value, clip.refused.message.replace(clip.uri, "")) if clip.refused else ()


def pack_inputs(
    columns: Mapping[str, str], fields: Sequence[str], clips: Sequence[Clip], raw: Sequence[str] = ()
) -> str:
    """Hash of all that decides a packed shard.

    Args:
        columns: stage -> fingerprint, of every stage.
        fields: to be packed.
        raw: those among them that the schema stores as `jpg` and that are packed as `npy`.
    """
    identity: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "columns": dict(columns),
        "fields": list(fields),
        "clips": [(clip.key, clip.digest, clip.split, clip.speaker, clip.text) for clip in clips],
    }
    if raw:  # no key without, so that shards that were packed before there was a choice keep their names
        identity["raw"] = list(raw)
    return _hash(identity)


def weights_digest(paths: Sequence[Path]) -> str:
    """sha256 over the digests of the files in the order given; empty for no files.

    A file is read once per machine: its digest is kept in the user's cache with size and modification time.

    Raises:
        UserError: a file cannot be read.
    """
    if not paths:
        return ""
    known = _load()
    before = dict(known)
    digests = []
    try:
        for path in paths:
            found = path.stat()
            key = f"{path.resolve()} {found.st_size} {found.st_mtime_ns}"
            if key not in known:
                known[key] = file_sha256(path)
            digests.append(known[key])
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if known != before:
        _save(known)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _hash(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _load() -> dict[str, str]:
    try:
        tree = json.loads((user_cache() / CACHE).read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in tree.items() if isinstance(v, str)} if isinstance(tree, dict) else {}


def _save(known: dict[str, str]) -> None:
    # Without a home to write to, files are read anew each time.
    with contextlib.suppress(OSError):
        open_store(str(user_cache())).write(CACHE, json.dumps(known).encode())
