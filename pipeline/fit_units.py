"""Centroids from a folder of audio: draw recordings, encode them, cluster their frames.

The recipe of fairseq's speech2unit (Lakhotia et al. 2021): a tenth of the recordings, mini-batch k-means in batches of
10,000 frames, seed 1369.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.audio_files import draw, list_audio, read_audio
from pipeline.batches import in_batches
from pipeline.networks.encoders import make_encoder
from pipeline.stages.speech import SpeechConfig
from pipeline.units import (
    CodebookReport,
    Floats,
    check_output,
    describe_codebook,
    fit_codebook,
    sample_features,
    write_codebook,
)
from shards.progress import Progress
from shards.schema import HOP


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
    check_output(output)
    recordings = draw(list_audio(source), fraction, config.seed, source)
    encoder = make_encoder(config.encoder, config.layer, weights, config.precision)
    failed: list[str] = []
    with Progress("fit units", len(recordings), "recordings") as progress:

        def pieces() -> Iterator[Floats]:
            for path in recordings:
                try:
                    yield from read_audio(path)
                except OSError as error:
                    failed.append(str(error))
                progress.advance()

        def encode(batch: list[Floats]) -> list[Floats]:
            return [features for _, features in encoder.encode(batch, config.layer)]

        encoded = in_batches(pieces(), lambda piece: len(piece) // HOP, encoder.budget, encode, encoder.waste)
        features = sample_features((values for _, values in encoded), most, config.seed)
        if failed:
            progress.note(f"{len(failed)} recordings could not be read, e.g. {failed[0]}")
        progress.note(f"{len(features)} frames are clustered; nothing is stored before that is done")
        centroids = fit_codebook(features, config.clusters, config.seed)
    write_codebook(output, centroids)
    return describe_codebook(features, centroids)
