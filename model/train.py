"""The training loop, top to bottom in the order in which it happens."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from model import checkpoint
from model.config import ModelConfig
from model.faces2voices import FacesToVoices
from model.meter import Meter
from model.train_config import OptimiserConfig, TrainConfig, dataset_facts, model_config
from shards.augment import generator
from shards.clip_table import ClipTable, Snapshot
from shards.config import Config
from shards.errors import UserError
from shards.progress import Progress
from shards.stream import TrainingStream

STATISTICS_CLIPS = 500
"""Clips over which the mel mean and deviation are taken."""


@dataclass(frozen=True)
class Result:
    """How a run ended; `first` and `last` are mean losses of the first and last log line."""

    folder: str
    step: int
    first: float
    last: float
    stopped: bool


def train(uri: str, folder: Path, config: TrainConfig) -> Result:
    """Train on the dataset at `uri`, writing checkpoints and TensorBoard events to `folder`; goes on where it stopped.

    Raises:
        UserError: unusable dataset, a checkpoint of another configuration, no GPU where one was asked for, or a loss
            that is not finite.
    """
    device = _device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    state = checkpoint.load(folder) if checkpoint.found(folder) else None
    snapshots = _snapshots(state) if state is not None and config.data.index == "first" else None
    with TrainingStream(uri, config.data, config.seed, snapshots=snapshots) as stream:
        return _train(stream, folder, config, device, state)


def _train(
    stream: TrainingStream, folder: Path, config: TrainConfig, device: torch.device, state: checkpoint.Checkpoint | None
) -> Result:
    facts = dataset_facts(stream.index, config.data.split)
    facts["snapshots"] = [snapshot.model_dump() for snapshot in stream.snapshots]
    shape = model_config(config, facts)
    if state is not None:
        _same_run(folder, state, config, shape, facts)
        if state.step >= config.steps:
            return Result(str(folder), state.step, math.nan, math.nan, False)
    if shape.lip_encoder.frozen and config.lip_weights is None:
        raise UserError("the lip encoder is frozen and has no weights: give lip_weights, or train it along (size=tiny)")
    network = FacesToVoices(shape)
    if config.lip_weights is not None:
        network.lip_encoder.load_public(config.lip_weights)
    network.to(device)
    optimiser = torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=config.optimiser.lr,
        betas=config.optimiser.betas,
        eps=config.optimiser.eps,
        weight_decay=config.optimiser.weight_decay,
    )
    step = 0
    if state is not None:
        network.load_state_dict(state.model)
        optimiser.load_state_dict(state.optimiser)
        step = state.step
    else:
        mean, deviation = mel_statistics(stream.tables)
        network.mel_mean.fill_(mean)
        network.mel_std.fill_(deviation)

    folder.mkdir(parents=True, exist_ok=True)
    log = SummaryWriter(str(folder), purge_step=step + 1)
    meter = Meter()
    first: float | None = None
    last = math.nan
    start, said = step, 0
    begin = time.monotonic()

    def save() -> None:
        plain = _plain(config), _plain(shape), facts
        now = checkpoint.Checkpoint(step, *plain, network.state_dict(), optimiser.state_dict())
        checkpoint.save(folder, now, config.keep)

    network.train()
    done = False
    with _stop_signal(stream.interrupt) as stop, Progress("train", config.steps, "steps") as progress:
        progress.advance(step)
        for batch in stream.batches(step, device):
            arrived = time.perf_counter()
            if step == start:
                progress.note(
                    f"data: {stream.clips} clips, {stream.clips / config.data.batch:.1f} steps an epoch, batches take "
                    f"{stream.memory_bytes / 1e6:.0f} MB"
                )
            while said < len(stream.skipped):
                progress.note(f"step {step}: skipped {stream.skipped[said]}")
                said += 1
            # Noise and dropout depend on the step alone, so a resumed run draws what the first would have drawn.
            torch.manual_seed(config.seed * 1_000_003 + step)
            noise = torch.Generator(device).manual_seed(config.seed * 1_000_003 + step)
            rate = _rate(config.optimiser, step, stream.epoch(step))
            for group in optimiser.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                losses = network.losses(batch, noise)
            if not torch.isfinite(losses["loss"]):
                raise UserError(_not_finite(step, losses, batch["keys"]))
            optimiser.zero_grad(set_to_none=True)
            losses["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimiser.clip_norm)
            if not torch.isfinite(norm):
                raise UserError(_not_finite(step, losses, batch["keys"]))
            optimiser.step()
            step += 1

            meter.add(
                {name: float(value.detach()) for name, value in losses.items()} | {"grad_norm": float(norm)},
                arrived,
            )
            progress.advance()
            done = step >= config.steps or stop() or _over(begin, config.minutes)
            if step % config.log_every == 0 or done:
                means = meter.take(config.data.batch)
                last = means["loss"]
                first = last if first is None else first
                for name, value in {**means, "lr": rate}.items():
                    log.add_scalar(f"train/{name}", value, step)
                progress.note(_line(step, stream.epoch(step), stream.digest(step - 1), means))
            if step % config.checkpoint_every == 0 or done:
                save()
            if done:
                break
        if not done:
            # A signal came while there was no data.
            save()
    log.close()
    return Result(str(folder), step, math.nan if first is None else first, last, step < config.steps)


def mel_statistics(tables: Sequence[ClipTable]) -> tuple[float, float]:
    """Mean and standard deviation of the log-mel over all bins and frames of up to `STATISTICS_CLIPS` clips."""
    clips = [(table, clip) for table in tables for clip in range(len(table.keys))]
    order = generator("mel statistics").permutation(len(clips))[:STATISTICS_CLIPS]
    count, total, squares = 0, 0.0, 0.0
    for table, clip in (clips[position] for position in sorted(order)):
        mel = table.read(clip, "mel").astype("float64")
        count, total, squares = count + mel.size, total + mel.sum(), squares + (mel**2).sum()
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean**2, 1e-8))


def _snapshots(state: checkpoint.Checkpoint) -> list[Snapshot] | None:
    found = state.dataset.get("snapshots")
    return found and [Snapshot.model_validate(facts) for facts in found]


@contextmanager
def _stop_signal(interrupt: Callable[[], None]) -> Iterator[Any]:
    """Turn SIGTERM and Ctrl-C into a flag, so that the step in hand ends and a checkpoint is written; `interrupt` ends
    the wait for data."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        interrupt()

    # Python lets the main thread alone handle signals.
    ours = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in ours}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: this torch sees no GPU; install a CUDA build or set device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _rate(config: OptimiserConfig, step: int, epoch: int) -> float:
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return float(config.lr * warm * config.decay**epoch)


def _over(begin: float, minutes: float | None) -> bool:
    return minutes is not None and time.monotonic() - begin > 60 * minutes


def _same_run(
    folder: Path, state: checkpoint.Checkpoint, config: TrainConfig, shape: ModelConfig, facts: dict[str, Any]
) -> None:
    """A run goes on only with what decides its results unchanged: settings, network and how the shards were made."""
    run = ("steps", "minutes", "device", "threads", "log_every", "checkpoint_every", "keep", "model")
    reading = ("workers", "prefetch", "cache", "cache_bytes", "ahead", "verify", "damaged", "index", "augment_on")
    loose = (*run, *(f"data.{name}" for name in reading), "dataset.snapshots")
    ours = {**_plain(config), "network": _plain(shape), "dataset": facts}
    theirs = {**state.config, "network": state.shape, "dataset": state.dataset}
    mine, old = _flat(ours), _flat(theirs)
    odd = [key for key in sorted({*mine, *old}) if mine.get(key) != old.get(key)]
    odd = [key for key in odd if not any(key == name or key.startswith(f"{name}.") for name in loose)]
    if odd:
        key, more = odd[0], f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise UserError(
            f"{folder}: checkpoint of another configuration: {key} was {old.get(key)!r}, is {mine.get(key)!r}{more}; "
            "name another folder or set it back"
        )


def _plain(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _not_finite(step: int, losses: dict[str, Tensor], keys: list[str]) -> str:
    terms = ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in losses.items())
    return f"step {step}: the loss or its gradient is not finite ({terms}); clips of the batch: {', '.join(keys)}"


def _line(step: int, epoch: int, digest: str, means: dict[str, float]) -> str:
    speeds = ("steps_per_s", "clips_per_s", "data_wait")
    terms = " ".join(f"{name} {value:.3f}" for name, value in means.items() if name not in speeds)
    pace = f"{means['steps_per_s']:.2f} steps/s, waiting for data {means['data_wait']:.0%}"
    return f"step {step} epoch {epoch} data {digest}: {terms} | {pace}"
