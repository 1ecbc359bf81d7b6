"""The dataset's own k-means centroids, fitted on the sound of its training clips.

They stay while the settings of their fit stay, so that adding clips does not change the units of the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.batches import in_batches
from pipeline.columns import Column, load_column, read_members
from pipeline.config import BuildConfig
from pipeline.fingerprint import likely_recipe, recipe_key, recipe_of
from pipeline.in_flight import Watch
from pipeline.networks.device import pick_device
from pipeline.networks.encoders import WIDTHS, Floats, make_encoder
from pipeline.stages.audio import Audio
from pipeline.stages.speech import Speech, SpeechConfig
from pipeline.units import describe_codebook, fit_codebook, load_codebook, sample_features, save_codebook
from shards.codec import decode
from shards.config import Config
from shards.dataset import Dataset
from shards.errors import UserError
from shards.local_store import local_copy
from shards.manifest import Codebook, Manifest, split_of
from shards.mel import from_pcm
from shards.schema import FIELDS, MEL_PER_FRAME
from shards.storage import Conflict

SAMPLED = 4
"""Sound that is encoded for a fit, as a multiple of the frames that it takes."""


@dataclass(frozen=True)
class Care:
    """How clips are handled of which one may end the process.

    Attributes:
        watch: is told of each clip, by its place.
        places: key -> place among the order's clips.
        alone: keys of clips to be encoded one by one.
        skipped: keys of clips that are left out.
    """

    watch: Watch
    places: Mapping[str, int]
    alone: Collection[str] = ()
    skipped: Collection[str] = ()


class FitTask(Config):
    """A fit of centroids.

    Attributes:
        marks: shard -> fingerprint of its `audio` column.
        kept: shard -> fingerprint of a `speech` column with the features of that sound; the encoder runs for the rest.
    """

    marks: dict[str, str]
    kept: dict[str, str]
    stage: Literal["codebook"] = "codebook"
    shard: Literal["all"] = "all"


def fit_key(config: BuildConfig, manifest: Manifest | None = None) -> str:
    """Hash of all that decides a fit but the sources: settings of sound and units, and the encoder.

    Args:
        manifest: says which encoder it was, where that is not at hand.
    """
    stage = Speech(config.speech.model_copy(update={"centroids": None}), config.run.weights)
    speech, _ = likely_recipe(stage, manifest)
    # Features are rounded for the fit as they are when they are kept, so keeping them does not change it.
    speech = speech.model_copy(update={"settings": {**speech.settings, "keep_features": False}})
    identity = [recipe_key(recipe) for recipe in (recipe_of(Audio(config.audio)), speech)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


GIVEN = "given"
"""Stands for the settings of a fit, in a codebook that was none of ours."""


def check_given_centroids(config: SpeechConfig) -> None:
    """Look at the centroids that the settings name, before anything is run.

    Raises:
        UserError: they cannot be read, or are not `clusters` of the encoder's width.
    """
    if config.centroids is None:
        return
    found, wanted = load_codebook(config.centroids).shape, (config.clusters, WIDTHS[config.encoder])
    if found[0] != wanted[0]:
        raise UserError(
            f"centroids {config.centroids}: there are {found[0]}, but speech.clusters is {wanted[0]}; add "
            f"--set speech.clusters={found[0]}"
        )
    if found[1] != wanted[1]:
        raise UserError(
            f"centroids {config.centroids}: {found[1]} channels, but the features of {config.encoder} have "
            f"{wanted[1]}; name centroids that were fitted with it"
        )


def keep_given(dataset: Dataset, config: SpeechConfig) -> Codebook | None:
    """The centroids that the settings name, as an object of the dataset: it must not depend on a file elsewhere."""
    if config.centroids is None:
        return None
    data = config.centroids.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    name = f"codebooks/units-{digest[:16]}.npy"
    if not dataset.store.exists(name):
        with contextlib.suppress(Conflict):
            dataset.store.swap(name, data, None)
    return Codebook(name=name, sha256=digest, bytes=len(data), fit=GIVEN)


def find_given(dataset: Dataset, manifest: Manifest | None, config: BuildConfig) -> BuildConfig:
    """The settings, with the dataset's own copy of the centroids where the file that it was built with is gone."""
    path, book = config.speech.centroids, manifest.codebook if manifest else None
    if manifest is None or book is None or book.fit != GIVEN or path is None or path.exists():
        return config
    if manifest.config["speech"]["centroids"] != str(path.absolute()):
        return config
    speech = config.speech.model_copy(update={"centroids": local_copy(dataset.store, book.name)})
    return config.model_copy(update={"speech": speech})


def usable_codebook(dataset: Dataset, manifest: Manifest | None, config: BuildConfig) -> Codebook | None:
    """The dataset's codebook, if it was fitted with these settings and its object is there.

    Raises:
        UserError: the object is damaged.
    """
    book = manifest.codebook if manifest else None
    if book is None or book.fit != fit_key(config, manifest) or not dataset.store.exists(book.name):
        return None
    if dataset.store.sha256(book.name) != book.sha256:
        raise UserError(f"{dataset.uri}/{book.name}: damaged; delete it and build again, it is fitted anew")
    return book


def fit(dataset: Dataset, task: FitTask, config: BuildConfig, care: Care) -> tuple[Codebook | None, str]:
    """The codebook of the training shards' sound (of all shards, where no training clip has any), fitted unless a
    build that was stopped did so; None without any sound. Beside it, a line on the fit; empty where there was none.

    Args:
        care: for the clips; one that is skipped costs the fit its own frames.

    Raises:
        UserError: fewer frames of sound than clusters.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = list(pool.map(lambda item: load_column(dataset, "audio", *item), task.marks.items()))
    usable = [column for column in found if column and column.clips]
    columns = [column for column in usable if split_of(column.task.shard) == "train"] or usable
    if not columns:
        return None, ""
    key, note = fit_key(config), ""
    parts = [key, *(column.sha256 for column in columns), *sorted(care.skipped)]
    inputs = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    name = f"codebooks/units-{inputs}.npy"
    if not dataset.store.exists(name):
        data, note = _fit(dataset, columns, config, task.kept, care)
        # Another build may fit the same at the same time, on another kind of processor: the first one counts.
        with contextlib.suppress(Conflict):
            dataset.store.swap(name, data, None)
    data = dataset.store.read(name)
    return Codebook(name=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), fit=key), note


def _fit(
    dataset: Dataset,
    columns: Sequence[Column],
    config: BuildConfig,
    kept: Mapping[str, str],
    care: Care,
) -> tuple[bytes, str]:
    """Centroids as npy, and how they fit."""
    speech = config.speech
    clips = _sample([(column, key) for column in columns for key in column.clips], SAMPLED * speech.fit_frames)
    clips = [clip for clip in clips if clip[1] not in care.skipped]
    shards = {column.task.shard for column, _ in clips}
    found = {shard: load_column(dataset, "speech", shard, mark) for shard, mark in kept.items() if shard in shards}
    stored = {shard: column for shard, column in found.items() if column}

    def rounded() -> Iterator[Floats]:
        for values in _features(dataset, clips, stored, config, care):
            yield values.astype(np.float16).astype(np.float32)

    features = sample_features(rounded(), speech.fit_frames, speech.seed)
    care.watch.rest()  # clustering comes to its end, but may take long
    centroids = fit_codebook(features, speech.clusters, speech.seed, speech.reassignment)
    care.watch.prepare()
    report = describe_codebook(features, centroids)
    buffer = io.BytesIO()
    save_codebook(buffer, centroids)
    return buffer.getvalue(), (
        f"units: {report.clusters} clusters on {report.frames} frames, mean squared distance {report.inertia:.3g} "
        f"of {report.variance:.3g}, {report.dead} dead, perplexity {report.perplexity:.1f}"
    )


def _features(
    dataset: Dataset,
    clips: Sequence[tuple[Column, str]],
    stored: Mapping[str, Column],
    config: BuildConfig,
    care: Care,
) -> Iterator[Floats]:
    """Features of each clip, [2F, D], in order: read from the `speech` columns in `stored`, else encoded."""

    def has(clip: tuple[Column, str]) -> bool:
        column = stored.get(clip[0].task.shard)
        return column is not None and clip[1] in column.clips

    def read(column: Column, key: str, name: str) -> NDArray[Any]:
        members = next(read_members(dataset, column, [key], (name,)))
        return decode(FIELDS[name], members[name], column.clips[key].frames)

    if all(has(clip) for clip in clips):
        yield from (read(stored[column.task.shard], key, "features") for column, key in clips)
        return
    import torch

    speech = config.speech
    # Only where the settings gave this worker a share of one.
    device = pick_device() if config.run.gpus else torch.device("cpu")
    encoder = make_encoder(speech.encoder, speech.layer, config.run.weights, speech.precision, device)

    def work(batch: list[tuple[Column, str]]) -> list[Floats]:
        fresh = [clip for clip in batch if not has(clip)]
        together = [clip for clip in fresh if clip[1] not in care.alone]
        made: dict[str, Floats] = {}
        for group in [*([clip] for clip in fresh if clip[1] in care.alone), *([together] if together else [])]:
            for clip in group:
                care.watch.take(care.places[clip[1]])
            waves = [from_pcm(read(*clip, "wav")) for clip in group]
            for clip, (_, features) in zip(group, encoder.encode(waves, speech.layer), strict=True):
                made[clip[1]] = features
                care.watch.put(care.places[clip[1]], None)
        return [
            made[clip[1]] if clip[1] in made else read(stored[clip[0].task.shard], clip[1], "features")
            for clip in batch
        ]

    threads = torch.get_num_threads()
    # One thread, as in the workers: sums split over threads differ in the last bits from machine to machine.
    torch.set_num_threads(1)
    try:
        lengths = {clip[1]: MEL_PER_FRAME * clip[0].clips[clip[1]].frames for clip in clips}
        for _, values in in_batches(clips, lambda clip: lengths[clip[1]], encoder.budget, work, encoder.waste):
            yield values
    finally:
        torch.set_num_threads(threads)


def _sample(clips: list[tuple[Column, str]], frames: int) -> list[tuple[Column, str]]:
    """As many clips, in the order of a hash of their keys, as hold `frames` acoustic frames; a large corpus is not
    encoded whole for the sake of a small sample."""
    clips = sorted(clips, key=lambda clip: hashlib.sha256(clip[1].encode()).digest())
    total = np.cumsum([MEL_PER_FRAME * column.clips[key].frames for column, key in clips])
    return clips[: int(np.searchsorted(total, frames)) + 1]
