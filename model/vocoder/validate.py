"""Validation of a vocoder: how far the mel of what it says is from the mel it was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.griffinlim import playable
from model.ranks import Ranks
from model.validate import picture
from model.vocoder.hifigan import Generator
from model.vocoder.losses import mel_loss
from model.vocoder.train_config import VocoderConfig
from shards.augment import generator
from shards.clip_table import ClipTable, load_clips
from shards.mel import Filterbank, log_mel
from shards.schema import HOP, MEL_PER_FRAME, SAMPLE_RATE
from shards.stream_config import Condition
from shards.whole_clips import WholeClips


class Validation:
    """A fixed draw of whole clips of the validation split.

    Args:
        table: of the dataset; its state is read.
        filterbank: of its mels.

    Raises:
        UserError: no clip of that split, see `shards.clip_table.load_clips`.
    """

    def __init__(self, table: ClipTable, config: VocoderConfig, ranks: Ranks, filterbank: Filterbank) -> None:
        wanted, data = config.validation, config.data
        self._config, self._ranks, self._filterbank = wanted, ranks, filterbank
        place = table.uri, wanted.split, data.min_frames, data.where, table.snapshot
        keys = load_clips(*place, fields=data.fields).keys
        drawn = [keys[position] for position in generator("validation").permutation(len(keys))[: wanted.clips]]
        reading = data.model_copy(update={"split": wanted.split, "where": {"key": Condition(one_of=tuple(drawn))}})
        self._clips = WholeClips(table.uri, reading, wanted.max_frames, ranks.rank, ranks.world, table.snapshot)
        self._spoken = set(drawn[: wanted.samples])
        self._first = True

    @torch.no_grad()
    def measure(self, network: Generator, device: torch.device, step: int, log: Any) -> dict[str, float]:
        """`mel_l1`: mean absolute difference over frames and bins, in ln amplitude, of the mel of what is spoken and
        the mel that it was spoken from. `fine_l1`: of the mels of the training loss, which have shorter windows and are
        closer together, of what is spoken and the true sound. The first time `griffin_lim_mel_l1` and
        `griffin_lim_fine_l1` as well, the same of Griffin-Lim.

        Some clips go into `log`, where there is one, as sound and mel; the true ones along with the first.
        """
        network.eval()
        peer = self._first and self._config.griffin_lim
        sums = torch.zeros(5, dtype=torch.float64)
        for batch in self._clips.batches(device):
            for row, key in enumerate(batch["keys"]):
                length = MEL_PER_FRAME * int(batch["frames"][row])
                mel = batch["mel"][row : row + 1, :, :length]
                units = batch["units"][row : row + 1, :length] if "units" in batch else None
                speaker = batch["timbre"][row : row + 1] if "timbre" in batch else None
                true, wave = mel[0].T.cpu().numpy(), batch["wave"][row, 0, : HOP * length].cpu().numpy()
                said = network(mel, units, speaker)[0, 0].float().cpu().numpy()
                other = playable(true, self._filterbank) if peer else wave
                distances = [*self._distances(said, wave, true), *self._distances(other, wave, true)]
                sums += torch.tensor([*(length * distance for distance in distances), length], dtype=torch.float64)
                if log is not None and key in self._spoken:
                    self._show(log, step, key, true, {"spoken": said, "true": wave, "griffin_lim": other})
        network.train()
        *totals, count = self._ranks.total(sums).tolist()
        names = ("mel_l1", "fine_l1", *(("griffin_lim_mel_l1", "griffin_lim_fine_l1") if peer else ()))
        self._first = False
        return {name: total / count for name, total in zip(names, totals, strict=False)}

    def _distances(
        self, made: NDArray[np.float32], wave: NDArray[np.float32], mel: NDArray[np.float32]
    ) -> tuple[float, float]:
        """Of a wave [320 T] from the mel [T, 80] and from the true wave."""
        one, other = (torch.from_numpy(sound)[None, None] for sound in (made, wave))
        return float(np.abs(log_mel(made, self._filterbank) - mel).mean()), float(mel_loss(other, one))

    def _show(
        self, log: Any, step: int, key: str, mel: NDArray[np.float32], sounds: dict[str, NDArray[np.float32]]
    ) -> None:
        for name, sound in sounds.items():
            if name == "spoken" or (self._first and (name == "true" or self._config.griffin_lim)):
                log.add_audio(f"{key}/{name}", sound[None], step, sample_rate=SAMPLE_RATE)
        log.add_image(f"{key}/mel", picture(mel, log_mel(sounds["spoken"], self._filterbank)), step, dataformats="HWC")
