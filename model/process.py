"""What surrounds a training loop: its device, its signals, its memory."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from model.ranks import Ranks
from model.run_config import RunConfig
from shards.errors import UserError
from shards.signals import Stopped

REPEATED_S = 5.0


def choose_device(config: RunConfig, ranks: Ranks) -> torch.device:
    """The GPU of this process, or the CPU. Raises UserError: a GPU was asked for and is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: this torch sees no GPU; install a CUDA build or set device=cpu")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.local >= torch.cuda.device_count():
        raise UserError(f"process {ranks.local} of this machine has no GPU: there are {torch.cuda.device_count()}")
    torch.cuda.set_device(ranks.local)
    # What float32 work is left outside of bfloat16 may use TF32 as well.
    torch.set_float32_matmul_precision("high" if config.amp else "highest")
    torch.backends.cudnn.allow_tf32 = config.amp
    return torch.device("cuda", ranks.local)


@contextmanager
def stop_signal(interrupt: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and Ctrl-C into a flag, so that the step in hand ends and a checkpoint is written; `interrupt` ends
    the wait for data. Batch systems and launchers may send it twice; after `REPEATED_S` another one ends at once."""
    caught: list[float] = []

    def note(number: int, frame: object) -> None:
        if caught and time.monotonic() - caught[0] > REPEATED_S:
            raise Stopped(number)
        caught.append(time.monotonic())
        interrupt()

    # Python lets the main thread alone handle signals.
    handled = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in handled}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def memory_advice(config: RunConfig, ranks: Ranks, more: str) -> Iterator[None]:
    """Turn running out of memory into a `UserError` that says what to lower; `more`: keys that not all runs have."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        texts = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")
        memory = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
        if not memory and not any(text in str(error) for text in texts):
            raise
        reason = (str(error).strip().splitlines() or ["no memory"])[0][:200]
        raise UserError(
            f"out of memory ({reason}); lower data.batch (now {config.data.batch} over {ranks.world} processes), "
            f"data.crop_frames (now {config.data.crop_frames}) or {more}; amp=true needs less"
        ) from None
