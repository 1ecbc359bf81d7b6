"""The dataset's own k-means centroids, fitted on the sound of its training clips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.columns import Column, read_members
from pipeline.stages.speech import SpeechConfig
from shards.codec import decode
from shards.dataset import Dataset
from shards.progress import Progress
from shards.schema import FIELDS


def fit_from_columns(dataset: Dataset, columns: Sequence[Column], config: SpeechConfig, name: str) -> None:
    """Fit centroids on the `audio` columns given and store them as the object `name`, npy float32 [clusters, D].

    Raises:
        UserError: fewer frames of sound than clusters.
    """
    import torch

    from pipeline.networks.whisper import load_encoder
    from pipeline.units import describe_codebook, fit_codebook, sample_features

    encoder = load_encoder()
    threads = torch.get_num_threads()
    # One thread, as in the workers: sums split over threads differ in the last bits from machine to machine.
    torch.set_num_threads(1)
    with Progress("fit units", sum(len(column.clips) for column in columns), "clips") as progress:

        def sounds() -> Iterator[np.ndarray]:
            for column in columns:
                keys = sorted(column.clips)
                for key, members in zip(keys, read_members(dataset, column, keys, ("wav",)), strict=True):
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
        np.lib.format.write_array(stream, centroids, version=(1, 0), allow_pickle=False)
