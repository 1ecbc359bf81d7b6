"""Vocoders for speech: Griffin-Lim, our own checkpoints, and public HiFi-GAN files for a hop of 320."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import checkpoint
from model.checkpoint import Checkpoint, as_uri
from model.checkpoint_file import Unreadable
from model.griffinlim import playable
from model.vocoder.config import GeneratorConfig
from model.vocoder.hifigan import Generator
from model.vocoder.public import read_public
from shards.config import load_config
from shards.errors import UserError
from shards.mel import Filterbank
from shards.schema import HOP, MEL_BINS
from shards.storage import is_remote, local_path

GENERATOR = "generator."
"""The generator's tensors are called so in the checkpoints of a training run, beside the discriminators'."""
PIECE = 500
"""Mel frames that go through the network at a time; ten seconds."""


class Vocoder(Protocol):
    """Turns what was predicted of a clip into sound.

    Attributes:
        name: as results state it: "Griffin-Lim", "HiFi-GAN, step 2000", "HiFi-GAN, FILE".
        needs: which predictions it reads.
    """

    name: str
    needs: tuple[str, ...]

    def __call__(self, spoken: Mapping[str, NDArray[Any]], seed: int = 0) -> NDArray[np.float32]:
        """Sound of a clip.

        Args:
            spoken: mel float [T, 80] in ln amplitude, T at least 2; units int [T] and timbre float [D] where needed.
            seed: of what is drawn by chance, if anything is.

        Returns:
            float32 [320 T] within -1..1; made quieter as a whole where it would pass beyond.

        Raises:
            ValueError: a value is missing, not finite, or has another shape.
        """


def load_vocoder(
    place: str | Path | None,
    filterbank: Filterbank,
    device: str | torch.device = "cpu",
    speech: Mapping[str, Any] | None = None,
) -> Vocoder:
    """The vocoder at `place`.

    Args:
        place: None is Griffin-Lim. Otherwise the folder or a checkpoint of a vocoder's training run, or a public
            HiFi-GAN file, see `read_public`. Such a file does not say which filterbank its mels had.
        filterbank: of the mels that it will be given.
        device: where the network runs.
        speech: recipe of the stage that made the units and timbre that it will be given; None: the caller has none.

    Raises:
        UserError: nothing there, a file of another kind, or a vocoder for another filterbank, units or timbre.
        StorageError: the storage refuses or does not answer.
    """
    if place is None:
        return GriffinLim(filterbank)
    uri = as_uri(place)
    state = run_or_file(uri)
    if isinstance(state, Path):
        return HiFiGAN(read_public(state), f"HiFi-GAN, {state.name}", device)
    network, trained_on = restored(state, uri), mel_filterbank(state, uri)
    if trained_on != filterbank:
        raise UserError(
            f"{uri}: this vocoder was trained on {trained_on} mels, these are {filterbank} mels; take a vocoder that "
            f"was trained on the same dataset, or none for Griffin-Lim"
        )
    if speech is not None:
        _check_speech(network.config, state, speech, uri)
    return HiFiGAN(network, f"HiFi-GAN, step {state.step}", device)


def run_or_file(uri: str) -> Checkpoint | Path:
    """The checkpoint at `uri`, or, of a file that is none of ours, its path: it may be a public one.

    Raises:
        UserError: nothing there, or something else in a bucket or folder.
        StorageError: the storage refuses or does not answer.
    """
    try:
        return checkpoint.load(uri)
    except Unreadable:
        if is_remote(uri) or not local_path(uri).is_file():
            raise
        return local_path(uri)


def restored(state: Checkpoint, uri: str) -> Generator:
    """The generator of a training run's checkpoint, on the CPU, with averaged parameters where it has them.

    Raises:
        UserError: a checkpoint of another network.
    """
    kind = f"{uri}: no vocoder's checkpoint"
    tensors = {key: value for key, value in state.model.items() if key.startswith(GENERATOR)}
    if not tensors:
        raise UserError(f"{kind}, it holds {', '.join(sorted({key.split('.')[0] for key in state.model})[:6])}")
    try:
        network = Generator(load_config(GeneratorConfig, base=state.shape))
        averaged = {key: value for key, value in (state.ema or {}).items() if key in tensors}
        network.load_state_dict({key.removeprefix(GENERATOR): value for key, value in (tensors | averaged).items()})
    except (UserError, RuntimeError) as error:
        raise UserError(f"{kind} of this version ({' '.join(str(error).split())[:200]})") from None
    return network


def mel_filterbank(state: Checkpoint, uri: str) -> str:
    """The filterbank of the mels that a run was trained on. Raises UserError: the checkpoint does not say."""
    try:
        return str(state.dataset["stages"]["mel"]["settings"]["filterbank"])
    except (KeyError, TypeError):
        raise UserError(f"{uri}: does not say which filterbank the mels of its dataset had") from None


def _check_speech(reads: GeneratorConfig, state: Checkpoint, given: Mapping[str, Any], uri: str) -> None:
    """Raises UserError: the vocoder reads units or timbre, and learnt them as another speech stage made them."""
    if not reads.units and not reads.timbre_dim:
        return
    learnt = state.dataset["stages"].get("speech", {})
    # Timbre is that of the first layer, whatever the units are read from.
    keys = ("weights", "codebook") if reads.units else ("weights",)
    settings = ("encoder", "layer") if reads.units else ("encoder",)
    odd = [key for key in keys if learnt.get(key) != given.get(key)]
    odd += [key for key in settings if learnt.get("settings", {}).get(key) != given.get("settings", {}).get(key)]
    if odd:
        raise UserError(
            f"{uri}: this vocoder learnt {'units' if reads.units else 'timbre'} of another speech stage "
            f"({', '.join(odd)}) than the one that the system was trained on; take a vocoder that was trained on the "
            "same dataset, or one that reads the mel alone"
        )


class GriffinLim:
    """The `Vocoder` that needs no training."""

    name = "Griffin-Lim"
    needs: tuple[str, ...] = ("mel",)

    def __init__(self, filterbank: Filterbank) -> None:
        self.filterbank = filterbank

    def __call__(self, spoken: Mapping[str, NDArray[Any]], seed: int = 0) -> NDArray[np.float32]:
        """See `Vocoder`."""
        return playable(_mel(spoken), self.filterbank, seed)


class HiFiGAN:
    """A trained generator as a `Vocoder`; long clips go through it in pieces, with the samples of the whole."""

    def __init__(self, network: Generator, name: str, device: str | torch.device = "cpu", piece: int = PIECE) -> None:
        self.network, self.name, self.device, self.piece = network.eval().fold().to(device), name, device, piece
        config = network.config
        reads = {"mel": True, "units": config.units > 0, "timbre": config.timbre_dim > 0}
        self.needs: tuple[str, ...] = tuple(key for key, read in reads.items() if read)

    def __call__(self, spoken: Mapping[str, NDArray[Any]], seed: int = 0) -> NDArray[np.float32]:
        """See `Vocoder`; nothing here is drawn by chance."""
        mel = torch.from_numpy(_mel(spoken).astype(np.float32).T.copy())[None]
        units, speaker = self._beside(spoken, mel.shape[2])
        whole, margin = mel.shape[2], self.network.reach
        wave = np.empty(whole * HOP, np.float32)
        with torch.inference_mode():
            for begin in range(0, whole, self.piece):
                end = min(begin + self.piece, whole)
                first, last = max(begin - margin, 0), min(end + margin, whole)
                part = self.network(
                    mel[:, :, first:last].to(self.device),
                    None if units is None else units[:, first:last],
                    speaker,
                )
                inner = part[0, 0, (begin - first) * HOP : (end - first) * HOP]
                wave[begin * HOP : end * HOP] = inner.cpu().numpy()
        return wave

    def _beside(self, spoken: Mapping[str, NDArray[Any]], frames: int) -> tuple[Tensor | None, Tensor | None]:
        """Units [1, T] and speaker embedding [1, D] where the network reads them."""
        config = self.network.config
        units = speaker = None
        if config.units:
            values = _value(spoken, "units", (frames,))
            if values.min() < 0 or values.max() >= config.units:
                raise ValueError(f"units: {values.min()}..{values.max()} where the vocoder knows {config.units} units")
            units = torch.from_numpy(values.astype(np.int64))[None].to(self.device)
        if config.timbre_dim:
            values = _value(spoken, "timbre", (config.timbre_dim,))
            speaker = torch.from_numpy(values.astype(np.float32))[None].to(self.device)
        return units, speaker


def _mel(spoken: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    mel = spoken["mel"]
    if mel.ndim != 2 or mel.shape[1] != MEL_BINS or len(mel) < 2 or not np.isfinite(mel).all():
        raise ValueError(f"expected a finite log-mel [T >= 2, {MEL_BINS}], got shape {mel.shape}")
    return mel


def _value(spoken: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if name not in spoken:
        raise ValueError(f"{name}: this vocoder reads them beside the mel")
    value = spoken[name]
    if value.shape != shape or not np.isfinite(value).all():
        raise ValueError(f"{name}: expected finite values of shape {shape}, got {value.shape}")
    return value
