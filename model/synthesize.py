"""Silent video in, speech out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model import checkpoint
from model.griffinlim import playable
from model.synthesis import load_network
from shards.augment import augmented, centred
from shards.codec import encode
from shards.errors import UserError
from shards.schema import FIELDS, SAMPLE_RATE
from shards.storage import open_store


@dataclass(frozen=True)
class Speech:
    """What was written: the wav, and the video with sound (None where only a wav was asked for)."""

    wav: Path
    video: Path | None
    seconds: float
    step: int
    vocoder: str


def synthesize(
    video: Path,
    run: Path,
    output: Path,
    steps: int = 10,
    guidance: float = 0.7,
    temperature: float = 1.0,
    seed: int = 0,
    lip_weights: Path | None = None,
) -> Speech:
    """Speak for a silent video; sound that it may have is not used.

    Args:
        run: checkpoint file, or the folder of a training run.
        output: `.mp4` writes the video with sound and a `.wav` beside it; `.wav` writes that alone.
        steps, guidance, temperature: Euler steps, guidance scale beta and scale of the first noise.
        lip_weights: see `load_network`.

    Raises:
        UserError: unusable video, checkpoint or output name.
    """
    if output.suffix.lower() not in (".mp4", ".wav"):
        raise UserError(f"{output}: the output must end in .mp4 or .wav")
    if not output.parent.is_dir():
        raise UserError(f"{output}: folder {output.parent} is missing")
    if output.resolve() == video.resolve():
        raise UserError(f"{output}: would overwrite the input")
    if steps < 1 or not (0 <= guidance < math.inf and 0 <= temperature < math.inf):
        raise UserError("--steps must be 1 or more, --guidance and --temperature 0 or more")
    state = checkpoint.load(run)
    network = load_network(state, lip_weights)

    from pipeline.prepare import visual_fields

    fields = visual_fields(video, state.dataset["profile"], state.dataset["stages"])
    batch = {
        "frames": torch.tensor([len(fields["lips"])]),
        "lips": torch.from_numpy(augmented(fields["lips"], centred(len(fields["lips"]))))[None, None],
        "identity": torch.from_numpy(fields["identity"].astype(np.float32))[None],
        "expression": torch.from_numpy(fields["expression"].astype(np.float32))[None],
    }
    noise = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        spoken = network.synthesize(batch, steps=steps, guidance=guidance, temperature=temperature, generator=noise)
    mel = spoken["mel"][0].T.numpy()
    samples = playable(mel, state.dataset["stages"]["mel"]["settings"]["filterbank"], seed)

    sound = output.with_suffix(".wav")
    write_wav(sound, samples)
    if output.suffix.lower() == ".mp4":
        from pipeline.media import decode_video
        from pipeline.mux import write_video

        write_video(output, decode_video(str(video)), samples)
    picture = output if output.suffix.lower() == ".mp4" else None
    return Speech(sound, picture, len(samples) / SAMPLE_RATE, state.step, "Griffin-Lim")


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Mono 16-bit PCM at 16 kHz from samples within -1..1."""
    open_store(str(path.parent)).write(path.name, encode(FIELDS["wav"], np.round(samples * 32767).astype(np.int16)))
