"""The dataset's own k-means centroids, fitted on the sound of its training clips."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.columns import Column, read_members
from pipeline.stages.speech import SpeechConfig
from shards.codec import decode
from shards.dataset import Dataset
from shards.errors import UserError
from shards.progress import Progress
from shards.schema import FIELDS, MEL_PER_FRAME


def fit_from_columns(dataset: Dataset, columns: Sequence[Column], config: SpeechConfig, name: str) -> None:
    """Fit centroids on the `audio` columns given and store them as the object `name`, npy float32 [clusters, D].

    Raises:
        UserError: fewer frames of sound than clusters.
    """
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

        def sounds() -> Iterator[np.ndarray]:
            for column, key in clips:
                members = next(read_members(dataset, column, [key], ("wav",)))
                yield decode(FIELDS["wav"], members["wav"], column.clips[key].frames)
                progress.advance()

        features = sample_features(sounds(), encoder, config.layer, config.fit_frames, config.seed)
        centroids = fit_codebook(features, config.clusters, config.seed)
        report = describe_codebook(features, centroids)
        progress.note(
            f"units: {report.clusters} clusters on {report.frames} frames, mean squared distance {report.inertia:.3g} "
            f"of {report.variance:.3g}, {report.dead} dead, perplexity {report.perplexity:.1f}"
        )
    torch.set_num_threads(threads)
    with dataset.store.writer(name) as stream:
        save_codebook(stream, centroids)


def _sample(clips: list[tuple[Column, str]], frames: int) -> list[tuple[Column, str]]:
    """As many clips, in the order of a hash of their keys, as hold `frames` acoustic frames; a large corpus is not
    encoded whole for the sake of a small sample."""
    clips = sorted(clips, key=lambda clip: hashlib.sha256(clip[1].encode()).digest())
    total = np.cumsum([MEL_PER_FRAME * column.clips[key].frames for column, key in clips])
    return clips[: int(np.searchsorted(total, frames)) + 1]
