"""Validation: losses and predictions on whole clips that training has not seen, and speech to listen to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from model.griffinlim import playable
from model.layers import length_mask
from model.losses import mel_loss, prosody_loss, timbre_loss, total_loss
from model.ranks import Ranks
from model.system import System
from model.train_config import TrainConfig
from shards.augment import generator
from shards.clip_table import Snapshot, load_clips
from shards.device import Batch
from shards.mel import Filterbank
from shards.schema import SAMPLE_RATE
from shards.stream_config import Condition
from shards.whole_clips import WholeClips

SEED = 20_250_611
"""Of the noise, the same at every validation of every run."""


class Validation:
    """A fixed draw of clips of the validation split.

    Args:
        uri: of the dataset.
        filterbank: of its mels, for Griffin-Lim.

    Raises:
        UserError: no clip of that split, see `shards.clip_table.load_clips`.
    """

    def __init__(self, uri: str, config: TrainConfig, snapshot: Snapshot, ranks: Ranks, filterbank: Filterbank) -> None:
        wanted, data = config.validation, config.data
        self._config, self._ranks, self._filterbank = wanted, ranks, filterbank
        keys = load_clips(uri, wanted.split, data.min_frames, data.where, snapshot).keys
        drawn = generator("validation").permutation(len(keys))[: wanted.clips]

        def clips(positions: np.ndarray, rank: int, world: int) -> WholeClips:
            where = {"key": Condition(one_of=tuple(keys[position] for position in positions))}
            reading = data.model_copy(update={"split": wanted.split, "where": where})
            return WholeClips(uri, reading, wanted.max_frames, rank, world, snapshot)

        self._clips = clips(drawn, 0, 1)
        # Where there are fewer batches than processes, each takes all: every process must have the same terms to sum.
        if 1 < ranks.world <= len(self._clips):
            self._clips = clips(drawn, ranks.rank, ranks.world)
        self._spoken = clips(drawn[: wanted.samples], 0, 1) if wanted.samples else None
        self._shown: set[str] = set()

    @torch.no_grad()
    def measure(self, network: System, device: torch.device) -> dict[str, float]:
        """Means over all clips and processes: `loss` and its parts with teacher forcing; `free_timbre`, `free_pitch`,
        `free_energy` (mean absolute errors) and `free_mel` (of mu against the standardised mel) where predictions feed
        on, as in synthesis.

        The network is in evaluation mode meanwhile; the random state of training is not touched.
        """
        network.eval()
        sums: dict[str, torch.Tensor] = {}
        noise = torch.Generator(device)
        for batch in self._clips.batches(device):
            frames, rows = batch["frames"].sum(), len(batch["frames"])
            noise.manual_seed(SEED)
            values = network.losses(batch, noise, share=frames) | _free(network, batch, frames)
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.double() * (rows if name.endswith("timbre") else 1)
            for name, count in (("frames", frames), ("rows", torch.tensor(rows, device=device))):
                sums[name] = sums.get(name, 0) + count.double()
        network.train()
        names = sorted(sums)
        totals = dict(zip(names, self._ranks.total(torch.stack([sums[name] for name in names])).tolist(), strict=True))
        frames, rows = totals.pop("frames"), totals.pop("rows")
        means = {name: value / (rows if name.endswith("timbre") else frames) for name, value in totals.items()}
        parts = {name: torch.tensor(value) for name, value in means.items() if name in _PARTS}
        return means | {"loss": float(total_loss(parts, network.config.loss))}

    @torch.no_grad()
    def speak(self, network: System, device: torch.device, log: SummaryWriter, step: int) -> None:
        """Speak for the sample clips into TensorBoard; each clip's own sound and mel come along once."""
        if self._spoken is None:
            return
        network.eval()
        for batch in self._spoken.batches(device):
            noise = torch.Generator(device).manual_seed(SEED)
            found = network.synthesize(batch, noise, self._config.steps, self._config.guidance)["mel"]
            for row, key in enumerate(batch["keys"]):
                length = 2 * int(batch["frames"][row])
                pair = {"true": batch["mel"][row, :, :length], "spoken": found[row, :, :length]}
                mels = {name: mel.float().T.cpu().numpy() for name, mel in pair.items()}
                for name, mel in mels.items():
                    if name == "true" and key in self._shown:
                        continue
                    sound = playable(mel, self._filterbank)
                    log.add_audio(f"{key}/{name}", sound[None], step, sample_rate=SAMPLE_RATE)
                self._shown.add(key)
                log.add_image(f"{key}/mel", picture(mels["true"], mels["spoken"]), step, dataformats="HWC")
        network.train()


_PARTS = ("cfm", "prior", "mel", "content", "timbre", "pitch", "energy")


def _free(network: System, batch: Batch, frames: torch.Tensor) -> dict[str, Any]:
    """Sums over frames (timbre: means over clips) of the errors of predictions that feed on."""
    found = network.predict(batch)
    mask = length_mask(2 * batch["frames"], batch["mel"].shape[2])
    mel = (batch["mel"] - network.mel_mean) / network.mel_std
    errors = {"free_mel": mel_loss(found["mu"], mel, mask) * frames}
    if "timbre" in found:
        errors["free_timbre"] = timbre_loss(found["timbre"], batch["timbre"])
    for name in {"pitch", "energy"} & set(found):
        errors[f"free_{name}"] = prosody_loss(found[name], batch[name], mask) * frames
    return errors


_COLOURS = np.array(
    [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]], np.float32
)
"""Dark to bright, in equal steps."""


def picture(*mels: np.ndarray) -> np.ndarray:
    """Mels [T, bins] of one length, above each other on one scale, low bins at the bottom: uint8 [H, W, 3]."""
    low, high = float(mels[0].min()), float(mels[0].max())
    rows = []
    for mel in mels:
        level = np.clip((mel.T[::-1] - low) / max(high - low, 1e-6), 0, 1) * (len(_COLOURS) - 1)
        step = np.minimum(level.astype(int), len(_COLOURS) - 2)
        part = (level - step)[..., None]
        image = _COLOURS[step] * (1 - part) + _COLOURS[step + 1] * part
        rows += [image.repeat(3, axis=0).repeat(3, axis=1), np.full((6, 3 * mel.shape[0], 3), 255.0)]
    return np.concatenate(rows[:-1]).astype(np.uint8)
