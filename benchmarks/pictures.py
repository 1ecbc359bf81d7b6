"""Draw what the stages see, from real clips: landmarks and lip regions over frames, pitch over the spectrogram.

python benchmarks/pictures.py CLIP [CLIP ...] -o docs/stages.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from pipeline.config import BuildConfig
from pipeline.media import decode_video
from pipeline.registry import STAGES, make_stage
from pipeline.stage import Clip, Fields, Item, Rejection
from shards.schema import MEL_RATE, VIDEO_RATE

SHOWN = 6
"""Frames of each clip."""
NEEDED = ("faces", "landmarks", "lips", "audio", "mel", "pitch")


def fields_of(clip: Clip, stages: dict[str, Any]) -> Fields:
    """All that the stages say of a clip."""
    fields: Fields = {}
    for name in NEEDED:
        result = stages[name].attempt(Item(clip, {key: fields[key] for key in stages[name].reads}))
        if isinstance(result, Rejection):
            raise SystemExit(f"{clip.uri}: {result.reason.value}: {result.message}")
        fields |= result
    return fields


def draw_frames(axis: Axes, clip: Clip, fields: Fields, chosen: np.ndarray) -> None:
    """Frames cut about the face, with their landmarks."""
    frames = [frame for number, frame in enumerate(decode_video(clip.uri)) if number in set(chosen)]
    boxes = fields["boxes"][chosen]
    side = 1.7 * float((boxes[:, 2:] - boxes[:, :2]).max())
    crops = []
    for column, (frame, box, points) in enumerate(zip(frames, boxes, fields["landmarks"][chosen], strict=True)):
        corner = (box[:2] + box[2:]) / 2 - side / 2
        grid = np.linspace(0, side, 220, endpoint=False)
        rows = np.clip((corner[1] + grid).astype(int), 0, frame.shape[0] - 1)
        columns = np.clip((corner[0] + grid).astype(int), 0, frame.shape[1] - 1)
        crops.append(frame[rows][:, columns])
        shown = (points - corner) / side * 220 + (column * 220, 0)
        axis.scatter(*shown.T, s=3, c="lime", linewidths=0)
    axis.imshow(np.concatenate(crops, axis=1))
    axis.set_xticks((np.arange(len(chosen)) + 0.5) * 220, [f"{frame / VIDEO_RATE:.2f} s" for frame in chosen])
    axis.set_yticks([])
    axis.set_ylabel("landmarks")


def draw_pitch(axis: Axes, fields: Fields) -> None:
    """Pitch over the spectrogram, on a scale of Hz."""
    mel, pitch = fields["mel"], fields["pitch"]
    wave = fields["wav"].astype(float)
    padded = np.pad(wave, 480, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 1280)[::320] * np.hanning(1280)
    power = np.log(np.abs(np.fft.rfft(frames, 4096))[:, : int(1000 / 16000 * 4096)] + 1)
    seconds = len(mel) / MEL_RATE
    axis.imshow(power.T, origin="lower", aspect="auto", extent=(0, seconds, 0, 1000), cmap="magma")
    axis.plot((np.arange(len(pitch)) + 0.5) / MEL_RATE, pitch, color="cyan", linewidth=2)
    axis.set_ylabel("pitch, Hz")
    axis.set_xlabel("s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    config = BuildConfig()
    stages = {kind.name: make_stage(kind, config, None) for kind in STAGES if kind.name in NEEDED}
    for stage in stages.values():
        stage.setup()
    heights = [1.5, 1.2, 1.4]
    figure, axes = pyplot.subplots(
        3 * len(args.clips),
        1,
        figsize=(9, 4.6 * len(args.clips)),
        height_ratios=heights * len(args.clips),
        layout="constrained",
    )
    for number, path in enumerate(args.clips):
        clip = Clip(path.stem, str(path), "")
        fields = fields_of(clip, stages)
        chosen = np.linspace(0, len(fields["lips"]) - 1, SHOWN).round().astype(int)
        above, middle, below = axes[3 * number : 3 * number + 3]
        draw_frames(above, clip, fields, chosen)
        above.set_title(path.name)
        middle.imshow(np.concatenate(list(fields["lips"][chosen]), axis=1), cmap="gray")
        middle.set_ylabel("lips")
        middle.set_xticks([])
        middle.set_yticks([])
        draw_pitch(below, fields)
    figure.savefig(args.output, dpi=80)


if __name__ == "__main__":
    main()
