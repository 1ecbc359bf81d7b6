"""What training loops share: how they are ended, watched and reported."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model import checkpoint
from model.checkpoint import Checkpoint
from model.flops import matmul_peak
from model.meter import Meter, NotFinite, log_line, terms_of
from model.process import choose_device, memory_advice, stop_signal
from model.ranks import Ranks
from model.resume import plain, snapshots
from model.run_config import AdamWConfig, RunConfig
from model.run_folder import RunFolder
from model.train_config import dataset_facts
from shards.device import Batch
from shards.errors import UserError
from shards.progress import Progress
from shards.stream import TrainingStream


@dataclass(frozen=True)
class Result:
    """How a run ended; `first` and `last` are mean losses of the first and last log line, NaN without one."""

    folder: str
    step: int
    first: float
    last: float
    stopped: bool

    def lines(self) -> list[str]:
        """In words."""
        if math.isnan(self.first):
            if self.stopped:
                return [f"{self.folder}: stopped at step {self.step}, before a step was done"]
            return [f"{self.folder}: at step {self.step} already; give more --steps to go on"]
        done = f"step {self.step}: loss {self.first:.3f} -> {self.last:.3f}; checkpoints in {self.folder}"
        return [done, *(["stopped early; the same command goes on from the last checkpoint"] if self.stopped else [])]


@dataclass(frozen=True)
class Session:
    """What a run works with.

    Attributes:
        state: checkpoint that it goes on from; None where it begins.
        facts: what checkpoints remember of the dataset.
    """

    stream: TrainingStream
    run: RunFolder
    device: torch.device
    ranks: Ranks
    state: Checkpoint | None
    facts: dict[str, Any]

    @property
    def start(self) -> int:
        """Steps that are done already."""
        return self.state.step if self.state is not None else 0

    def agree(self, config: RunConfig) -> None:
        """Raises UserError: processes of the run have other settings, data or checkpoints."""
        if not self.ranks.alike(f"{self.start} {json.dumps([plain(config), self.facts], sort_keys=True)}"):
            where = self.run.uri
            raise UserError(f"processes see different settings, datasets or checkpoints; {where} must be one for all")

    def done(self) -> Result:
        """Of a run that has no step left."""
        return Result(self.run.uri, self.start, math.nan, math.nan, False)

    def meter(self, config: RunConfig, flops: float) -> Meter:
        """Counts from here on, with an empty GPU.

        Args:
            flops: of a step of this process.
        """
        peak = config.peak_tflops and config.peak_tflops * 1e12
        peak = peak or matmul_peak(self.device, torch.bfloat16 if config.amp else torch.float32)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return Meter(self.device, flops, peak)


@contextlib.contextmanager
def session(uri: str, folder: str | Path, config: RunConfig, less_memory: str) -> Iterator[Session]:
    """Join the other processes of a run (see `torchrun`), choose the device, load the newest checkpoint in `folder`
    and open the stream; all is given back at the end.

    Args:
        uri: of the dataset.
        folder: a path or the address of a bucket's folder.
        less_memory: which settings, beside the batch, need less.

    Raises:
        UserError: unusable dataset or checkpoint, no GPU where one was asked for, or memory that ran out inside.
    """
    ranks = Ranks.joined()
    try:
        device = choose_device(config, ranks)
        if config.threads:
            torch.set_num_threads(config.threads)
        state = checkpoint.load(folder) if checkpoint.found(folder) else None
        begun = snapshots(state) if state is not None and config.data.index == "first" else None
        with (
            memory_advice(config, ranks, less_memory),
            TrainingStream(uri, config.data, config.seed, ranks.rank, ranks.world, begun) as stream,
            contextlib.closing(RunFolder(folder)) as run,
        ):
            facts = dataset_facts(stream.index, config.data.split)
            facts["snapshots"] = [snapshot.model_dump() for snapshot in stream.snapshots]
            yield Session(stream, run, device, ranks, state, facts)
    finally:
        ranks.close()


def is_over(begin: float, minutes: float | None) -> bool:
    """Whether a run that began at `begin` (`time.monotonic`) has had its time."""
    return minutes is not None and time.monotonic() - begin > 60 * minutes


def precision(config: RunConfig, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the run wants it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.amp)


def clipped(parameters: Iterable[nn.Parameter], config: AdamWConfig) -> Tensor:
    """Norm of the gradient of all parameters together, which is scaled down to the bound where there is one."""
    return nn.utils.clip_grad_norm_(list(parameters), config.clip_norm or math.inf)


def write_scalars(log: Any, group: str, values: dict[str, float], step: int) -> None:
    """Into TensorBoard; nothing where there is no `log`."""
    if log is not None:
        for name, value in values.items():
            log.add_scalar(f"{group}/{name}", value, step)


def not_finite(run: RunFolder, error: NotFinite, ranks: Ranks) -> UserError:
    """Note the step's clips in the run's folder, and say where."""
    name = f"step-{error.step:08d}-not-finite" + (f"-rank{ranks.rank}" if ranks.world > 1 else "")
    facts = {"step": error.step, "values": {k: str(v) for k, v in error.values.items()}, "keys": error.keys}
    where = run.note(f"{name}.json", json.dumps(facts, indent=1))
    terms = ", ".join(f"{name} {value:.3g}" for name, value in error.values.items())
    way = "begin another run with a checkpoint from before (begin=...) and a lower optimiser.lr"
    return UserError(
        f"step {error.step}: the loss or its gradient is not finite ({terms}); the batch's clips are in {where}; {way}"
    )


def validation_split(stream: TrainingStream, split: str, asked_for: bool, say: Callable[[str], None]) -> bool:
    """Whether the (first) dataset has the split that validation wants.

    Args:
        asked_for: the user named it.

    Raises:
        UserError: it has not, and the user named it.
    """
    table = stream.tables[0]
    splits = {shard.split for shard in table.index.shards}
    if split in splits:
        return True
    if asked_for:
        there = ", ".join(sorted(splits))
        raise UserError(f"validation.split: no split {split!r} in {table.uri}; splits are {there}")
    say(f"no validation: {table.uri} has no split {split!r}")
    return False


class Training(Protocol):
    """What `run_loop` repeats. All processes of a run make the same calls."""

    def begin(self, say: Callable[[str], None]) -> None:
        """Before the first batch is there. Raises UserError: what is asked for cannot be."""

    def prepare(self, batch: Batch, say: Callable[[str], None]) -> Meter:
        """With the first batch, before its step."""

    def step(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], float]:
        """One optimiser step; its values, `loss` among them, and the learning rate."""

    def state(self, step: int) -> Checkpoint:
        """What goes on from here after `step` steps."""

    def validate(self, step: int, log: Any) -> dict[str, float]:
        """Means of the validation, none where there is none; into `log`, where it is given, what is to be heard."""


def run_loop(training: Training, here: Session, config: RunConfig, validate_every: int) -> Result:
    """Train until all steps are done, the time is over or a signal asks to stop; the last two leave a checkpoint as
    well.

    Args:
        validate_every: steps; 0: never.

    Raises:
        UserError: a loss that is not finite, or see `Training.begin` and `TrainingStream.batches`.
    """
    stream, run, ranks, start = here.stream, here.run, here.ranks, here.start
    begin = time.monotonic()
    meter: Meter | None = None
    first, last, rate, step = math.nan, math.nan, 0.0, start
    log = run.writer(purge_step=start + 1) if ranks.first else None
    with (
        stop_signal(stream.interrupt) as stop,
        Progress("train", config.steps, "steps", quiet=not ranks.first) as progress,
    ):
        progress.note(f"data: {stream.clips} clips, {stream.clips / config.data.batch:.1f} steps an epoch")
        if config.data.batch > stream.clips:
            progress.note(f"a batch of {config.data.batch} has more samples than there are clips")
        training.begin(progress.note)
        progress.advance(start)
        said = 0

        def save() -> None:
            assert meter is not None
            meter.settle()
            if ranks.first:
                checkpoint.save(run.uri, training.state(step), config.keep, config.keep_every)
                run.sync()

        def report(means: dict[str, float]) -> None:
            nonlocal first, last
            last = means["loss"]
            first = last if math.isnan(first) else first
            write_scalars(log, "train", {**means, "lr": rate}, step)
            progress.note(log_line(step, stream.epoch(step), stream.digest(step - 1), means))

        batches = stream.batches(start, here.device)
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
                    meter = training.prepare(batch, progress.note)
                while said < len(stream.skipped):
                    progress.note(f"step {step}: skipped {stream.skipped[said]}")
                    said += 1
                values, rate = training.step(batch, step)
                step += 1
                meter.add(step - 1, batch["keys"], values)
                progress.advance()

                if step % config.log_every == 0:
                    report(ranks.mean(meter.take(config.data.batch)))
                    reported = step
                if step % config.checkpoint_every == 0:
                    with meter.paused():
                        save()
                    saved = step
                if validate_every and step % validate_every == 0:
                    meter.settle()
                    with meter.paused():
                        means = training.validate(step, log)
                    if means:
                        write_scalars(log, "valid", means, step)
                        progress.note(f"step {step} valid: {terms_of(means)}")
            if meter is not None and step > reported:
                report(ranks.mean(meter.take(config.data.batch)))
            if step > saved:
                save()
        except NotFinite as error:
            raise not_finite(run, error, ranks) from None
    return Result(run.uri, step, first, last, step < config.steps)
