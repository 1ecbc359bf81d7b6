"""A picture of one packed clip: face, lips, mel with pitch, units."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.dataset import Dataset
from shards.errors import UserError
from shards.reader import read_fields
from shards.schema import MEL_RATE, VIDEO_RATE

SHOWN = 10
"""Frames shown of face and lips."""


def draw_clip(uri: str, key: str, path: Path) -> Path:
    """Draw a clip of the dataset at `uri` into a PNG file.

    Raises:
        UserError: no such clip in the packed shards, or a field that the picture needs was not packed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dataset = Dataset(uri)
    places = [(shard, clip) for shard in dataset.index().shards for clip in shard.clips if clip.key == key]
    if not places:
        raise UserError(f"{uri}: no packed clip {key!r}; clips.parquet lists the keys")
    values = read_fields(dataset, *places[0], ("meta", "face", "lips", "mel", "pitch", "units"))
    mel, pitch, units = values["mel"], values["pitch"], values["units"]
    chosen = np.linspace(0, len(values["face"]) - 1, SHOWN).round().astype(int)
    seconds = len(mel) / MEL_RATE
    figure, axes = pyplot.subplots(4, 1, figsize=(10, 6.6), height_ratios=[1, 1, 2.4, 0.4], layout="constrained")
    title = f"{key}  \u201c{values['meta']['text']}\u201d  {len(values['face'])} frames, {seconds:.2f} s"
    for axis, name in zip(axes, ("face", "lips"), strict=False):
        axis.imshow(np.concatenate(list(values[name][chosen]), axis=1), cmap="gray")
        axis.set_ylabel(name)
        axis.set_yticks([])
        width = values[name].shape[2]
        axis.set_xticks((np.arange(SHOWN) + 0.5) * width, [f"{frame / VIDEO_RATE:.2f} s" for frame in chosen])
    axes[0].set_title(title)
    axes[2].imshow(mel.T, origin="lower", aspect="auto", extent=(0, seconds, 0, mel.shape[1]), cmap="magma")
    axes[2].set_ylabel("mel bin")
    over = axes[2].twinx()
    over.plot((np.arange(len(pitch)) + 0.5) / MEL_RATE, pitch, color="cyan", linewidth=2)
    over.set_ylabel("pitch, Hz")
    over.set_ylim(50, 400)
    axes[3].imshow(units[None], aspect="auto", extent=(0, seconds, 0, 1), cmap="prism", interpolation="nearest")
    axes[3].set_yticks([])
    axes[3].set_ylabel("units")
    axes[3].set_xlabel("s")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return path
