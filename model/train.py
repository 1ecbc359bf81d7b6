"""The training loop, top to bottom in the order in which it happens."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import checkpoint
from model.ema import MovingAverage
from model.flops import count_flops, matmul_peak
from model.flow import Place
from model.loop import Result, clipped, is_over, not_finite, precision, validation_split, write_scalars
from model.meter import Meter, NotFinite, log_line, terms_of
from model.optimiser import adamw, set_rate
from model.process import choose_device, memory_advice, stop_signal
from model.ranks import Ranks
from model.rehearsal import rehearsal
from model.resume import begun_network, check_same_run, describe, plain, snapshots
from model.run_folder import RunFolder
from model.system import System
from model.train_config import TrainConfig, check_profile, dataset_facts, model_config
from model.validate import Validation
from shards.device import Batch
from shards.errors import UserError, warn
from shards.progress import Progress
from shards.stream import TrainingStream


def train(uri: str, folder: str | Path, config: TrainConfig) -> Result:
    """Train on the dataset at `uri`, writing checkpoints and TensorBoard events to `folder`; goes on where it stopped.

    Started by `torchrun`, the processes share each step's batch.

    Args:
        folder: a path or the address of a bucket's folder.

    Raises:
        UserError: unusable dataset, a checkpoint of another configuration, no GPU where one was asked for, too little
            memory, or a loss that is not finite.
    """
    ranks = Ranks.joined()
    try:
        device = choose_device(config, ranks)
        if config.threads:
            torch.set_num_threads(config.threads)
        state = checkpoint.load(folder) if checkpoint.found(folder) else None
        begun = snapshots(state) if state is not None and config.data.index == "first" else None
        with (
            memory_advice(config, ranks, _less_memory(config)),
            TrainingStream(uri, config.data, config.seed, ranks.rank, ranks.world, begun) as stream,
            contextlib.closing(RunFolder(folder)) as run,
        ):
            return _train(stream, run, config, device, ranks, state)
    finally:
        ranks.close()


def _train(
    stream: TrainingStream,
    run: RunFolder,
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks,
    state: checkpoint.Checkpoint | None,
) -> Result:
    check_profile(stream.index, config)
    facts = dataset_facts(stream.index, config.data.split)
    facts["snapshots"] = [snapshot.model_dump() for snapshot in stream.snapshots]
    shape = model_config(config, facts)
    if state is not None:
        check_same_run(run.uri, state, config, shape, facts)
        if state.step >= config.steps:
            return Result(run.uri, state.step, math.nan, math.nan, False)
    if not ranks.alike(f"{state.step if state else 0} {json.dumps([plain(config), facts], sort_keys=True)}"):
        raise UserError(f"processes see different settings, datasets or checkpoints; {run.uri} must be one for all")
    rows = config.data.batch // ranks.world
    if rows % config.accumulate:
        raise UserError(f"a process's {rows} samples of data.batch cannot be split into {config.accumulate} parts")

    # Every process begins with the same parameters.
    torch.manual_seed(config.seed)
    network, without = begun_network(config, shape, state, stream.tables)
    network.to(device).train()
    optimiser = adamw(network, config.optimiser)
    if state is not None:
        optimiser.load_state_dict(state.optimiser)
    average = MovingAverage(network, config.ema, state.ema if state else None) if config.ema else None
    model: nn.Module = network
    if ranks.world > 1:
        model = DistributedDataParallel(network, [device] if device.type == "cuda" else None)
    step = start = state.step if state is not None else 0
    if state is not None:
        # The caller still holds it; its tensors would stay for the whole run.
        state.model.clear()
        state.optimiser.clear()
        (state.ema or {}).clear()

    begin = time.monotonic()
    meter: Meter | None = None
    first, last = math.nan, math.nan
    log = run.writer(purge_step=step + 1) if ranks.first else None
    if ranks.first:
        run.note("run.json", describe(config, shape, ranks, step))
    with (
        stop_signal(stream.interrupt) as stop,
        Progress("train", config.steps, "steps", quiet=not ranks.first) as progress,
    ):
        progress.note(f"data: {stream.clips} clips, {stream.clips / config.data.batch:.1f} steps an epoch")
        if config.data.batch > stream.clips:
            progress.note(f"a batch of {config.data.batch} has more samples than there are clips")
        validation = _validation(stream, config, ranks, facts, progress.note)
        progress.advance(step)
        said = 0

        def save() -> None:
            assert meter is not None
            meter.settle()
            if ranks.first:
                words = plain(config), plain(shape), facts
                tensors = network.state_dict(), optimiser.state_dict(), average.average if average else None
                now = checkpoint.Checkpoint(step, *words, *tensors, without)
                checkpoint.save(run.uri, now, config.keep, config.keep_every)
                run.sync()

        def report(means: dict[str, float]) -> None:
            nonlocal first, last
            last = means["loss"]
            first = last if math.isnan(first) else first
            write_scalars(log, "train", {**means, "lr": rate}, step)
            progress.note(log_line(step, stream.epoch(step), stream.digest(step - 1), means))

        batches = stream.batches(step, device)
        reported = saved = start
        try:
            while step < config.steps:
                batch = next(batches, None)
                if meter is not None:
                    meter.arrived()
                # All processes stop at the same step: whoever got a signal, ran out of time or has no data says so.
                if ranks.any(batch is None or stop() or is_over(begin, config.minutes)):
                    break
                assert batch is not None
                if meter is None:
                    progress.note(f"batches take {stream.memory_bytes / 1e6:.0f} MB")
                    meter = _prepare(network, batch, config, device, progress.note)
                while said < len(stream.skipped):
                    progress.note(f"step {step}: skipped {stream.skipped[said]}")
                    said += 1

                rate = set_rate(optimiser, config.optimiser, step, stream.epoch(step))
                optimiser.zero_grad(set_to_none=True)
                values = _gradient(model, batch, config, step, ranks)
                values["grad_norm"] = clipped(network.parameters(), config.optimiser)
                optimiser.step()
                step += 1
                if average is not None:
                    average.update(step)
                meter.add(step - 1, batch["keys"], values)
                progress.advance()

                if step % config.log_every == 0:
                    report(ranks.mean(meter.take(config.data.batch)))
                    reported = step
                if step % config.checkpoint_every == 0:
                    with meter.paused():
                        save()
                    saved = step
                if validation is not None and step % config.validation.every == 0:
                    averaged = average.applied() if average else contextlib.nullcontext()
                    meter.settle()
                    with meter.paused(), averaged, precision(config, device):
                        means = validation.measure(network, device)
                        if log is not None:
                            validation.speak(network, device, log, step)
                    write_scalars(log, "valid", means, step)
                    progress.note(f"step {step} valid: {terms_of(means)}")
            if meter is not None and step > reported:
                report(ranks.mean(meter.take(config.data.batch)))
            if step > saved:
                save()
        except NotFinite as error:
            raise not_finite(run, error, ranks) from None
    return Result(run.uri, step, first, last, step < config.steps)


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


def _prepare(
    network: System, batch: Batch, config: TrainConfig, device: torch.device, say: Callable[[str], None]
) -> Meter:
    """Compile the network, and count what a step of it costs; neither leaves a trace in it."""
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
    peak = config.peak_tflops and config.peak_tflops * 1e12
    peak = peak or matmul_peak(device, torch.bfloat16 if config.amp else torch.float32)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return Meter(device, flops, peak)


def _validation(
    stream: TrainingStream, config: TrainConfig, ranks: Ranks, facts: dict[str, Any], say: Callable[[str], None]
) -> Validation | None:
    if not config.validation.every:
        return None
    table, wanted = stream.tables[0], config.validation
    if not validation_split(stream, wanted.split, "split" in wanted.model_fields_set, say):
        return None
    return Validation(table.uri, config, table.snapshot, ranks, facts["stages"]["mel"]["settings"]["filterbank"])


def _less_memory(config: TrainConfig) -> str:
    lower = f"validation.max_frames (now {config.validation.max_frames})"
    return f"{lower}, or raise accumulate (now {config.accumulate})"
