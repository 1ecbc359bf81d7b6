"""The dataset's own k-means centroids, fitted on the sound of its training clips.

They stay while the settings of their fit stay, so that adding clips does not change the units of the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.columns import Column, load_column, read_members
from pipeline.config import BuildConfig
from pipeline.fingerprint import recipe_key, recipe_of
from pipeline.stages.audio import Audio
from pipeline.stages.speech import Speech, SpeechConfig
from shards.codec import decode
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import Codebook, Manifest, split_of
from shards.mel import from_pcm
from shards.progress import Progress
from shards.schema import FIELDS, MEL_PER_FRAME
from shards.storage import Conflict


def fit_key(config: BuildConfig) -> str:
    """Hash of all that decides a fit but the sources: settings of sound and units, and the encoder."""
    speech = config.speech.model_copy(update={"centroids": None})
    identity = [recipe_key(recipe_of(Audio(config.audio))), recipe_key(recipe_of(Speech(speech)))]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def usable_codebook(dataset: Dataset, manifest: Manifest | None, config: BuildConfig) -> Codebook | None:
    """The dataset's codebook, if it was fitted with these settings and its object is there.

    Raises:
        UserError: the object is damaged.
    """
    book = manifest.codebook if manifest else None
    if book is None or book.fit != fit_key(config) or not dataset.store.exists(book.name):
        return None
    if dataset.store.sha256(book.name) != book.sha256:
        raise UserError(f"{dataset.uri}/{book.name}: damaged; delete it and build again, it is fitted anew")
    return book


def fit(dataset: Dataset, marks: dict[str, str], config: BuildConfig) -> Codebook | None:
    """The codebook of the training shards' sound (of all shards, where no training clip has any), fitted unless a
    build that was stopped did so; None without any sound.

    Args:
        marks: shard -> fingerprint of its `audio` column.

    Raises:
        UserError: fewer frames of sound than clusters.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = list(pool.map(lambda item: load_column(dataset, "audio", *item), marks.items()))
    usable = [column for column in found if column and column.clips]
    columns = [column for column in usable if split_of(column.task.shard) == "train"] or usable
    if not columns:
        return None
    key = fit_key(config)
    inputs = hashlib.sha256("".join([key, *(column.sha256 for column in columns)]).encode()).hexdigest()[:16]
    name = f"codebooks/units-{inputs}.npy"
    if not dataset.store.exists(name):
        # Another build may fit the same at the same time, on another kind of processor: the first one counts.
        with contextlib.suppress(Conflict):
            dataset.store.swap(name, _fit(dataset, columns, config.speech), None)
    data = dataset.store.read(name)
    return Codebook(name=name, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), fit=key)


def _fit(dataset: Dataset, columns: Sequence[Column], config: SpeechConfig) -> bytes:
    """Centroids as npy."""
    import torch

    from pipeline.networks.whisper import load_encoder
    from pipeline.units import describe_codebook, fit_codebook, sample_features, save_codebook

    encoder = load_encoder()
    if config.layer > len(encoder.blocks):
        raise UserError(f"speech.layer {config.layer}: the encoder has {len(encoder.blocks)} blocks")
    threads = torch.get_num_threads()
    # One thread, as in the workers: sums split over threads differ in the last bits from machine to machine.
    torch.set_num_threads(1)
    clips = _sample([(column, key) for column in columns for key in column.clips], 4 * config.fit_frames)
    with Progress("fit units", len(clips), "clips") as progress:

        def frames() -> Iterator[np.ndarray]:
            for column, key in clips:
                members = next(read_members(dataset, column, [key], ("wav",)))
                wav = decode(FIELDS["wav"], members["wav"], column.clips[key].frames)
                yield encoder.states(from_pcm(wav), config.layer)[config.layer]
                progress.advance()

        features = sample_features(frames(), config.fit_frames, config.seed)
        centroids = fit_codebook(features, config.clusters, config.seed)
        report = describe_codebook(features, centroids)
        progress.note(
            f"units: {report.clusters} clusters on {report.frames} frames, mean squared distance {report.inertia:.3g} "
            f"of {report.variance:.3g}, {report.dead} dead, perplexity {report.perplexity:.1f}"
        )
    torch.set_num_threads(threads)
    buffer = io.BytesIO()
    save_codebook(buffer, centroids)
    return buffer.getvalue()


def _sample(clips: list[tuple[Column, str]], frames: int) -> list[tuple[Column, str]]:
    """As many clips, in the order of a hash of their keys, as hold `frames` acoustic frames; a large corpus is not
    encoded whole for the sake of a small sample."""
    clips = sorted(clips, key=lambda clip: hashlib.sha256(clip[1].encode()).digest())
    total = np.cumsum([MEL_PER_FRAME * column.clips[key].frames for column, key in clips])
    return clips[: int(np.searchsorted(total, frames)) + 1]
