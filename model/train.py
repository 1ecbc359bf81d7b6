"""Training of a video-to-speech system on a dataset's shards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.checkpoint import Checkpoint, LeftOut
from model.ema import MovingAverage
from model.flops import count_flops
from model.flow import Place
from model.loop import Result, Session, clipped, precision, run_loop, session, validation_split
from model.meter import Meter
from model.optimiser import adamw, set_rate
from model.ranks import Ranks
from model.rehearsal import rehearsal
from model.resume import begun_network, check_same_run, describe, plain
from model.system import System
from model.train_config import TrainConfig, check_profile, model_config
from model.validate import Validation
from shards.device import Batch
from shards.errors import UserError, warn


def train(uri: str, folder: str | Path, config: TrainConfig) -> Result:
    """Train on the dataset at `uri`, writing checkpoints and TensorBoard events to `folder`; goes on where it stopped.

    Started by `torchrun`, the processes share each step's batch.

    Args:
        folder: a path or the address of a bucket's folder.

    Raises:
        UserError: unusable dataset, a checkpoint of another configuration, no GPU where one was asked for, too little
            memory, or a loss that is not finite.
    """
    lower = f"validation.max_frames (now {config.validation.max_frames})"
    with session(uri, folder, config, f"{lower}, or raise accumulate (now {config.accumulate})") as here:
        check_profile(here.stream.index, config)
        shape = model_config(config, here.facts)
        if here.state is not None:
            check_same_run(here.run.uri, here.state, config, shape, here.facts)
            if here.start >= config.steps:
                return here.done()
        here.agree(config)
        rows = config.data.batch // here.ranks.world
        if rows % config.accumulate:
            raise UserError(f"a process's {rows} samples of data.batch cannot be split into {config.accumulate} parts")
        # Every process begins with the same parameters.
        torch.manual_seed(config.seed)
        network, without = begun_network(config, shape, here.state, here.stream.tables)
        training = SystemTraining(network.to(here.device).train(), without, config, here)
        if here.ranks.first:
            here.run.note("run.json", describe(config, shape, here.ranks, here.start))
        return run_loop(training, here, config, config.validation.every)


class SystemTraining:
    """A `model.loop.Training` of a system; see there.

    Args:
        without: what checkpoints leave out of the network.
    """

    def __init__(self, network: System, without: LeftOut | None, config: TrainConfig, here: Session) -> None:
        self._network, self._without, self._config, self._here = network, without, config, here
        self._optimiser = adamw(network, config.optimiser)
        state = here.state
        if state is not None:
            self._optimiser.load_state_dict(state.optimiser)
        self._average = MovingAverage(network, config.ema, state.ema if state else None) if config.ema else None
        self._model: nn.Module = network
        if here.ranks.world > 1:
            self._model = DistributedDataParallel(network, [here.device] if here.device.type == "cuda" else None)
        if state is not None:
            state.release()
        self._validation: Validation | None = None

    def begin(self, say: Callable[[str], None]) -> None:
        config, stream = self._config, self._here.stream
        wanted = config.validation
        if wanted.every and validation_split(stream, wanted.split, "split" in wanted.model_fields_set, say):
            table, filterbank = stream.tables[0], self._here.facts["stages"]["mel"]["settings"]["filterbank"]
            self._validation = Validation(table.uri, config, table.snapshot, self._here.ranks, filterbank)

    def prepare(self, batch: Batch, say: Callable[[str], None]) -> Meter:
        # Compiling and counting leave no trace in the network.
        config, network, device = self._config, self._network, self._here.device
        rows = len(batch["frames"]) // config.accumulate
        part = {name: value[:rows] for name, value in batch.items()}

        def step() -> None:
            with precision(config, device):
                losses = network.losses(part, torch.Generator(device))
            losses["loss"].backward()

        with rehearsal(network):
            flops = count_flops(step) * config.accumulate
        if config.compile:
            # Takes seconds to import.
            from model.compiling import compile_parts

            say("compiling: a minute or more the first time, seconds when it is done again")
            # What fails is said by every process: one that runs without would hold up the others.
            compile_parts(network, warn, step)
        return self._here.meter(config, flops)

    def step(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], float]:
        config = self._config
        rate = set_rate(self._optimiser, config.optimiser, step, self._here.stream.epoch(step))
        self._optimiser.zero_grad(set_to_none=True)
        values = _gradient(self._model, batch, config, step, self._here.ranks)
        values["grad_norm"] = clipped(self._network.parameters(), config.optimiser)
        self._optimiser.step()
        if self._average is not None:
            self._average.update(step + 1)
        return values, rate

    def state(self, step: int) -> Checkpoint:
        words = plain(self._config), plain(self._network.config), self._here.facts
        tensors = self._network.state_dict(), self._optimiser.state_dict()
        return Checkpoint(step, *words, *tensors, self._average.average if self._average else None, self._without)

    def validate(self, step: int, log: Any) -> dict[str, float]:
        if self._validation is None:
            return {}
        device = self._here.device
        averaged = self._average.applied() if self._average else contextlib.nullcontext()
        with averaged, precision(self._config, device):
            means = self._validation.measure(self._network, device)
            if log is not None:
                self._validation.speak(self._network, device, log, step)
        return means


def _gradient(model: nn.Module, batch: Batch, config: TrainConfig, step: int, ranks: Ranks) -> dict[str, Tensor]:
    """Backward pass over a process's share of a batch, part by part; means of the losses over the parts."""
    device = batch["frames"].device
    # Dropout depends on the step and the process alone, the flow's noise on the step and the sample: a resumed run
    # draws what the first would have drawn.
    seed = config.seed * 1_000_003 + step
    torch.manual_seed(seed * 4096 + ranks.rank)
    noise = torch.Generator(device)
    rows = len(batch["frames"]) // config.accumulate
    frames = ranks.total(batch["frames"].sum()) / (ranks.world * config.accumulate)
    values: dict[str, Tensor] = {}
    for number in range(config.accumulate):
        part = {name: value[number * rows : (number + 1) * rows] for name, value in batch.items()}
        place = Place((ranks.rank * config.accumulate + number) * rows, config.data.batch)
        # Gradients of processes are averaged once, in the last part.
        alone = isinstance(model, DistributedDataParallel) and number < config.accumulate - 1
        with model.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            with precision(config, device):
                losses = model(part, noise.manual_seed(seed), place, part["frames"].sum() / frames)
            (losses["loss"] / config.accumulate).backward()
        for name, value in losses.items():
            values[name] = values.get(name, 0.0) + value.detach() / config.accumulate
    return values
