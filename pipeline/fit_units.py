"""Centroids from a folder of audio: draw recordings, encode them, cluster their frames.

The recipe of fairseq's speech2unit (Lakhotia et al. 2021): a tenth of the recordings, mini-batch k-means in batches of
10,000 frames, seed 1369.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.audio_files import draw, list_audio, read_audio
from pipeline.networks.encoders import make_encoder
from pipeline.stages.speech import SpeechConfig
from pipeline.units import CodebookReport, describe_codebook, fit_codebook, sample_features, write_codebook
from shards.errors import UserError
from shards.progress import Progress


def fit_units(
    source: Path, output: Path, config: SpeechConfig, weights: Path | None, fraction: float, most: int
) -> CodebookReport:
    """Fit `config.clusters` centroids of a layer's features on a folder of audio and write them as npy.

    Args:
        config: encoder, layer, precision, clusters and seed.
        weights: folder with checkpoints, as `run.weights`.
        fraction: part of the recordings that is drawn.
        most: frames held in memory; of more, a uniform sample is kept.

    Raises:
        UserError: no usable audio, too little of it, or an output that cannot be written.
    """
    recordings = draw(list_audio(source), fraction, config.seed)
    if output.suffix != ".npy" or output.is_dir():
        raise UserError(f"{output}: name a file that ends in .npy")
    encoder = make_encoder(config.encoder, config.layer, weights, config.precision)
    failed: list[str] = []
    with Progress("fit units", len(recordings), "recordings") as progress:

        def frames() -> Iterator[np.ndarray]:
            for path in recordings:
                try:
                    for piece in read_audio(path):
                        yield encoder.encode([piece], config.layer)[0][1]
                except OSError as error:
                    failed.append(str(error))
                progress.advance()

        features = sample_features(frames(), most, config.seed)
        if failed:
            progress.note(f"{len(failed)} recordings could not be read, e.g. {failed[0]}")
        centroids = fit_codebook(features, config.clusters, config.seed)
    write_codebook(output, centroids)
    return describe_codebook(features, centroids)
