"""Training of the vocoder: HiFi-GAN (Kong et al. 2020) on the sound and mels of a dataset's shards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import checkpoint
from model.checkpoint import Checkpoint
from model.ema import MovingAverage
from model.flops import count_flops
from model.flow import Place
from model.loop import Result, Session, clipped, precision, run_loop, session, validation_split
from model.meter import Meter
from model.optimiser import set_rate
from model.rehearsal import rehearsal
from model.resume import check_same_run, describe, plain
from model.statistics import mel_statistics
from model.vocoder.begin import begin_with
from model.vocoder.discriminators import Discriminators
from model.vocoder.hifigan import Generator
from model.vocoder.losses import FEATURE_WEIGHT, discriminator_loss, feature_loss, generator_loss, mel_loss
from model.vocoder.robust import roughen
from model.vocoder.train_config import VocoderConfig, VocoderOptimiser, network_configs
from model.vocoder.validate import Validation
from shards.device import Batch
from shards.mel import FLOOR
from shards.schema import MEL_PER_FRAME


def train_vocoder(uri: str, folder: str | Path, config: VocoderConfig) -> Result:
    """Train on the dataset at `uri`, writing checkpoints and TensorBoard events to `folder`; goes on where it stopped.

    Started by `torchrun`, the processes share each step's batch.

    Args:
        folder: a path or the address of a bucket's folder.

    Raises:
        UserError: unusable dataset, a checkpoint of another configuration, no GPU where one was asked for, too little
            memory, or a loss that is not finite.
    """
    lower = f"validation.max_frames (now {config.validation.max_frames})"
    with session(uri, folder, config, lower) as here:
        state = here.state
        # Every process begins with the same parameters.
        torch.manual_seed(config.seed)
        pair = Pair(config, here.facts)
        shape = pair.generator.config
        if state is not None:
            check_same_run(here.run.uri, state, config, shape, here.facts)
            if here.start >= config.steps:
                return here.done()
        here.agree(config)
        if state is not None:
            checkpoint.restore(pair, state)
        elif config.begin is not None:
            begin_with(pair, config.begin, here.facts["stages"]["mel"]["settings"]["filterbank"])
        else:
            mean, deviation = mel_statistics(here.stream.tables)
            pair.generator.mel_mean.fill_(mean)
            pair.generator.mel_std.fill_(deviation)
        training = VocoderTraining(pair.to(here.device).train(), config, here)
        if here.ranks.first:
            here.run.note("run.json", describe(config, shape, here.ranks, here.start))
        return run_loop(training, here, config, config.validation.every)


class Pair(nn.Module):
    """The generator and its discriminators: what a checkpoint holds."""

    def __init__(self, config: VocoderConfig, facts: dict[str, Any]) -> None:
        super().__init__()
        generator, discriminators = network_configs(config, facts)
        self.generator, self.discriminators = Generator(generator), Discriminators(discriminators)


class VocoderTraining:
    """A `model.loop.Training`; see there."""

    def __init__(self, pair: Pair, config: VocoderConfig, here: Session) -> None:
        self._pair, self._config, self._here = pair, config, here
        self._device, self._ranks, state = here.device, here.ranks, here.state
        self._optimisers = {
            "generator": _adamw(pair.generator, config.optimiser),
            "discriminators": _adamw(pair.discriminators, config.optimiser),
        }
        # Named as the checkpoint names them.
        alone = nn.ModuleDict({"generator": pair.generator})
        self._average = MovingAverage(alone, config.ema, state.ema if state else None) if config.ema else None
        if state is not None:
            for name, optimiser in self._optimisers.items():
                optimiser.load_state_dict(state.optimiser[name])
            state.release()
        self._generator: nn.Module = pair.generator
        self._discriminators: nn.Module = pair.discriminators
        if here.ranks.world > 1:
            places = [here.device] if here.device.type == "cuda" else None
            self._generator = DistributedDataParallel(pair.generator, places)
            self._discriminators = DistributedDataParallel(pair.discriminators, places)
        self._validation: Validation | None = None

    def begin(self, say: Callable[[str], None]) -> None:
        wanted = self._config.validation
        if wanted.every and validation_split(self._here.stream, wanted.split, "split" in wanted.model_fields_set, say):
            self._validation = Validation(
                self._here.stream.tables[0],
                self._config,
                self._ranks,
                self._here.facts["stages"]["mel"]["settings"]["filterbank"],
            )

    def prepare(self, batch: Batch, say: Callable[[str], None]) -> Meter:
        adversarial = self._config.discriminator_from < self._config.steps

        def step() -> None:
            wave, made = self._made(self._pair.generator, batch, 0)
            if adversarial:
                self._judge(self._pair.discriminators, wave, made)["discriminators"].backward()
            self._losses(wave, made, adversarial)["loss"].backward()

        with rehearsal(self._pair):
            flops = count_flops(step)
        return self._here.meter(self._config, flops)

    def step(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], float]:
        config = self._config
        adversarial = step >= config.discriminator_from
        for optimiser in self._optimisers.values():
            rate = set_rate(optimiser, config.optimiser, step, self._here.stream.epoch(step))
            optimiser.zero_grad(set_to_none=True)
        wave, made = self._made(self._generator, batch, step)
        values: dict[str, Tensor] = {}
        if adversarial:
            values |= self._judge(self._discriminators, wave, made)
            values["discriminators"].backward()
            values["discriminators_grad_norm"] = clipped(self._pair.discriminators.parameters(), config.optimiser)
            self._optimisers["discriminators"].step()
        values |= self._losses(wave, made, adversarial)
        values["loss"].backward()
        values["grad_norm"] = clipped(self._pair.generator.parameters(), config.optimiser)
        self._optimisers["generator"].step()
        if self._average is not None:
            self._average.update(step + 1)
        return {name: value.detach() for name, value in values.items()}, rate

    def _made(self, generator: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """The true segments [B, 1, N] of a batch, and those that the generator makes."""
        rows = len(batch["frames"])
        # What is drawn depends on the step and the sample (dropout on the process): a resumed run draws the same.
        seed = self._config.seed * 1_000_003 + step
        torch.manual_seed(seed * 4096 + self._ranks.rank)
        place = Place(self._ranks.rank * rows, self._config.data.batch)
        mel = silenced(batch["mel"], batch["frames"])
        wave, mel = roughen(batch["wave"], mel, self._config.robust, torch.Generator().manual_seed(seed), place)
        with precision(self._config, self._device):
            # Units of padding, which is silent, may be any.
            units = batch["units"].clamp(min=0) if "units" in batch else None
            made: Tensor = generator(mel, units, batch.get("timbre"))
        return wave, made.float()

    def _judge(self, discriminators: nn.Module, wave: Tensor, made: Tensor) -> dict[str, Tensor]:
        """The discriminators' loss."""
        with precision(self._config, self._device):
            # Both in one pass, so that processes average its gradient once.
            scores, _ = discriminators(torch.cat([wave, made.detach()]))
        real, other = zip(*(score.chunk(2) for score in scores), strict=True)
        return {"discriminators": discriminator_loss(real, other)}

    def _losses(self, wave: Tensor, made: Tensor, adversarial: bool) -> dict[str, Tensor]:
        """The generator's `loss` and its parts."""
        values = {"mel": mel_loss(wave, made)}
        loss = self._config.mel_weight * values["mel"]
        if adversarial:
            judges = self._pair.discriminators.requires_grad_(False)
            with precision(self._config, self._device):
                with torch.no_grad():
                    _, real = judges(wave)
                scores, features = judges(made)
            judges.requires_grad_(True)
            values["adversarial"], values["features"] = generator_loss(scores), feature_loss(real, features)
            loss = loss + values["adversarial"] + FEATURE_WEIGHT * values["features"]
        return {"loss": loss, **values}

    def state(self, step: int) -> Checkpoint:
        words = plain(self._config), plain(self._pair.generator.config), self._here.facts
        optimisers = {name: optimiser.state_dict() for name, optimiser in self._optimisers.items()}
        return Checkpoint(
            step, *words, self._pair.state_dict(), optimisers, self._average.average if self._average else None
        )

    def validate(self, step: int, log: Any) -> dict[str, float]:
        if self._validation is None:
            return {}
        averaged = self._average.applied() if self._average else contextlib.nullcontext()
        # In float32, as speech is made.
        with averaged:
            return self._validation.measure(self._pair.generator, self._device, step, log)


def silenced(mel: Tensor, frames: Tensor) -> Tensor:
    """A mel [B, 80, T] whose padding, behind `frames` video frames, is that of silence."""
    valid = torch.arange(mel.shape[2], device=mel.device) < MEL_PER_FRAME * frames[:, None]
    return torch.where(valid[:, None], mel, math.log(FLOOR))


def _adamw(network: nn.Module, config: VocoderOptimiser) -> torch.optim.AdamW:
    values = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    return torch.optim.AdamW(network.parameters(), **values)  # type: ignore[arg-type]
