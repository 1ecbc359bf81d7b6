"""Centroids from a folder of audio: draw recordings, encode them, cluster their frames.

The recipe of fairseq's speech2unit (Lakhotia et al. 2021): a tenth of the recordings, mini-batch k-means in batches of
10,000 frames, seed 1369.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.audio_files import draw, list_audio, read_audio
from pipeline.batches import in_batches
from pipeline.networks.encoders import make_encoder
from pipeline.stages.audio import AudioConfig, level_dbfs
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
from pipeline.words import count
from shards.errors import UserError
from shards.progress import Progress
from shards.schema import HOP, SAMPLE_RATE

SILENCE_DBFS = AudioConfig().silence_dbfs
"""Pieces below this level hold no speech, as clips in a build."""


@dataclass(frozen=True)
class FitReport(CodebookReport):
    """What a fit took, and how its centroids fit that.

    Attributes:
        found: files below the folder; `drawn` those that the fraction picked.
        taken: those of which at least a part was used, and `seconds` of sound in them that was encoded.
        skipped: path below the folder -> why nothing of it was used.
    """

    found: int
    drawn: int
    taken: int
    seconds: float
    skipped: dict[str, str]


def fit_units(
    source: Path,
    output: Path,
    config: SpeechConfig,
    weights: Path | None,
    fraction: float,
    most: int,
    force: bool = False,
) -> FitReport:
    """Fit `config.clusters` centroids of a layer's features on a folder of audio and write them as npy.

    Args:
        config: encoder, layer, precision, clusters and seed.
        weights: folder with checkpoints, as `run.weights`.
        fraction: part of the recordings that is drawn.
        most: frames held in memory; of more, a uniform sample is kept.
        force: replace an output that is there.

    Raises:
        UserError: no usable audio, too little of it, or an output that cannot be written or is there already.
    """
    check_output(output, force)
    found = list_audio(source)
    recordings = draw(found, fraction, config.seed, source)
    encoder = make_encoder(config.encoder, config.layer, weights, config.precision)
    skipped: dict[str, str] = {}
    taken, samples = 0, 0
    with Progress("fit units", len(recordings), "recordings") as progress:

        def pieces() -> Iterator[Floats]:
            nonlocal taken, samples
            for path in recordings:
                used, why = 0, "too short, or no finite samples"
                try:
                    for piece in read_audio(path):
                        if level_dbfs(piece) < SILENCE_DBFS:
                            why = f"silent (below {SILENCE_DBFS:g} dBFS)"
                            continue
                        used += len(piece)
                        yield piece
                except OSError as error:
                    why = f"unreadable ({str(error).removeprefix(f'{path}: ')})"
                taken, samples = taken + bool(used), samples + used
                if not used:
                    skipped[path.relative_to(source).as_posix()] = why
                progress.advance()

        def encode(batch: list[Floats]) -> list[Floats]:
            return [features for _, features in encoder.encode(batch, config.layer)]

        encoded = in_batches(pieces(), lambda piece: len(piece) // HOP, encoder.budget, encode, encoder.waste)
        try:
            features = sample_features((values for _, values in encoded), most, config.seed)
        except UserError:
            if taken:
                raise
            example = next(iter(skipped))
            raise UserError(
                f"{source}: no usable sound in {count(len(recordings), 'file')}, e.g. {example}: {skipped[example]}"
            ) from None
        progress.note(f"{len(features)} frames are clustered; nothing is stored before that is done")
        centroids = fit_codebook(features, config.clusters, config.seed, config.reassignment)
    write_codebook(output, centroids)
    report = describe_codebook(features, centroids)
    return FitReport(
        **asdict(report),
        found=len(found),
        drawn=len(recordings),
        taken=taken,
        seconds=samples / SAMPLE_RATE,
        skipped=dict(sorted(skipped.items())),
    )
