"""Parameters that a vocoder's training begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from model import checkpoint
from model.checkpoint import as_uri
from model.vocoder.hifigan import Generator
from model.vocoder.load import mel_filterbank, run_or_file
from model.vocoder.public import read_public
from shards.errors import UserError
from shards.mel import Filterbank


def begin_with(pair: nn.Module, place: str, filterbank: Filterbank) -> None:
    """Fill generator and discriminators from a checkpoint of such a run, or the generator alone from a public file.

    Args:
        pair: a module with the parts `generator` and `discriminators`.
        place: checkpoint or folder of a run, or a public HiFi-GAN file, see `model.vocoder.public.read_public`. Such a
            file does not say which filterbank its mels had.
        filterbank: of the mels of this run.

    Raises:
        UserError: nothing there, a file of another kind, another network, or a run with mels of another filterbank.
    """
    uri = as_uri(place)
    state = run_or_file(uri)
    if isinstance(state, Path):
        _copy(read_public(state), pair.get_submodule("generator"), uri)
        return
    ours = pair.get_submodule("generator")
    assert isinstance(ours, Generator)
    _check_same(state.shape, ours, uri)
    learnt = mel_filterbank(state, uri)
    if learnt != filterbank:
        raise UserError(
            f"{uri}: was trained on {learnt} mels, this dataset has {filterbank} mels; begin with a run on mels of the "
            f"same filterbank, or build the dataset with mel.filterbank={learnt}"
        )
    checkpoint.restore(pair, state)


def _check_same(theirs: dict[str, Any], ours: Generator, uri: str) -> None:
    shape = ours.config.model_dump(mode="json")
    odd = [f"{key} is {value}, not {shape.get(key)}" for key, value in theirs.items() if value != shape.get(key)]
    if odd:
        raise UserError(f"{uri}: another generator than the run's: {'; '.join(odd)}; set model.* to what it has")


@torch.no_grad()
def _copy(theirs: Generator, ours: nn.Module, uri: str) -> None:
    assert isinstance(ours, Generator)
    _check_same(theirs.config.model_dump(mode="json"), ours, uri)
    ours.mel_mean.copy_(theirs.mel_mean)
    ours.mel_std.copy_(theirs.mel_std)
    for name, layer in theirs.named_modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            mine = ours.get_submodule(name)
            assert isinstance(mine, nn.Conv1d | nn.ConvTranspose1d)
            assert layer.bias is not None
            assert mine.bias is not None
            # Weight norm takes a plain weight apart where it is assigned.
            mine.weight = layer.weight.detach().clone()
            mine.bias.copy_(layer.bias)
