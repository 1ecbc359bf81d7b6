"""Batches filled by processes beside the training process, in memory that is shared and used again and again.

A batch goes back into use when nothing refers to it any more, so nobody has to copy it or to give it back.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from shards.download import TICK
from shards.errors import UserError, warn
from shards.fetch import Interrupted
from shards.fill import Filler, Sample
from shards.filler import fill_rows
from shards.layout import Layout, layout
from shards.stream_config import StreamConfig

CHUNK = 16
"""Samples in a job at most: several workers share a batch, so the first one is there early."""
LIVES = 3
"""Workers that may die over one job."""
SENT = 32
"""Jobs that a worker is sent before it has answered: so many answers always fit into its socket, so it never waits with
one while it is sent more."""
PAGE = 2 << 20
"""Slots begin at multiples of a huge page."""
START = (
    "import sys; sys.path = [path for path in sys.path if path] + [sys.argv[1]]; "
    "from shards.filler import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)
"""A worker as a program, which finds this package wherever it lies, and nothing in the working folder."""

Views = dict[str, NDArray[Any]]


@dataclass
class Task:
    """A batch on its way: `views` become valid when no job is open and nothing is `damaged`."""

    views: Views
    open: set[int] = field(default_factory=set)
    damaged: tuple[str, tuple[int, int]] | None = None


class Batches:
    """Fills batches, in this process or in `config.workers` others.

    Args:
        config: of the stream.
        seed: of the run.
        widths: named widths of the values.
        slot_bytes: of the largest batch.

    Attributes:
        slots: batches that there is memory for; grows while batches are held on to.
        locked: addresses of slots that are page-locked; kept by whoever locks them.
    """

    def __init__(self, config: StreamConfig, seed: int, widths: dict[str, int], slot_bytes: int) -> None:
        self._config, self._seed = config, seed
        self._widths = widths
        self.slot_bytes = slot_bytes + -slot_bytes % PAGE
        self.slots = 0
        self.locked: set[int] = set()
        self._free: deque[int] = deque()
        self._maps: dict[int, mmap.mmap] = {}
        self._memory = _anonymous_file()
        self._filler = None if config.workers else Filler(config, seed, widths)
        self._count = 0
        self._workers = [self._spawn() for _ in range(config.workers)]
        _all.add(self)

    def submit(self, samples: list[Sample], rows: int, frames: int) -> Task:
        """Begin to fill a batch of `rows` samples of `frames` video frames."""
        shape = self._layout(rows, frames)
        slot, memory = self._slot()
        task = Task(shape.views(memory))
        place = {"slot": slot, "rows": rows, "frames": frames}
        if self._filler is not None:
            self._note(task, fill_rows(self._filler, task.views, {"first": 0, "samples": [vars(s) for s in samples]}))
            return task
        chunk = min(CHUNK, -(-len(samples) // len(self._workers)))
        for first in range(0, len(samples), chunk):
            self._count += 1
            job = {"job": self._count, "first": first, "samples": [vars(s) for s in samples[first : first + chunk]]}
            task.open.add(self._count)
            worker = self._workers[self._count % len(self._workers)]
            worker.jobs[self._count] = _Job(task, json.dumps({**place, **job}).encode())
        self._listen(0)
        for worker in self._workers:
            worker.send()
        return task

    def finish(self, task: Task, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Wait until a batch is filled, or known to be damaged.

        Raises:
            Interrupted: as the caller asked for.
            UserError: workers died over one of its jobs again and again.
            RuntimeError: a fault of this program.
        """
        while task.open:
            if interrupted():
                raise Interrupted
            self._listen(TICK)

    def _listen(self, seconds: float) -> None:
        """Take the answers that are there, or come within so many seconds."""
        for line in wait([worker.line for worker in self._workers], seconds):
            worker = next(worker for worker in self._workers if worker.line is line)
            try:
                answer = json.loads(worker.line.recv_bytes())
            except (EOFError, OSError):
                self._replace(worker)
                continue
            job = worker.jobs.pop(answer["job"])
            worker.send()
            job.task.open.discard(answer["job"])
            self._note(job.task, answer)

    def close(self) -> None:
        """End the workers. Batches that somebody still holds stay valid."""
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.process.wait()
        if self._filler is not None:
            self._filler.close()
        self._workers.clear()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _layout(self, rows: int, frames: int) -> Layout:
        widths = tuple(sorted(self._widths.items()))
        return layout(rows, frames, widths, self._config.augment_on == "worker", self._config.fields)

    def _slot(self) -> tuple[int, NDArray[np.uint8]]:
        """A slot that nobody uses. It is used until the array, and all that was made from it, is gone."""
        try:
            slot = self._free.popleft()
        except IndexError:
            slot, self.slots = self.slots, self.slots + 1
            os.ftruncate(self._memory, self.slots * self.slot_bytes)
            self._maps[slot] = mmap.mmap(self._memory, self.slot_bytes, offset=slot * self.slot_bytes)
        memory = np.frombuffer(self._maps[slot], np.uint8)
        weakref.finalize(memory, self._free.append, slot).atexit = False
        return slot, memory

    def _note(self, task: Task, answer: dict[str, Any]) -> None:
        if "fault" in answer:
            raise RuntimeError(f"a worker of the training stream failed:\n{answer['fault']}")
        if "damaged" in answer and task.damaged is None:
            task.damaged = answer["damaged"], tuple(answer["shard"])

    def _spawn(self) -> _Worker:
        ours, theirs = Pipe()
        root = str(Path(__file__).resolve().parent.parent)
        process = subprocess.Popen(
            [sys.executable, "-c", START, root, str(theirs.fileno()), str(self._memory)],
            pass_fds=[theirs.fileno(), self._memory],
            stdin=subprocess.DEVNULL,
            # Ctrl-C is the training loop's to handle, also while a worker starts.
            start_new_session=True,
        )
        theirs.close()
        hello = {
            "config": self._config.model_dump(mode="json"),
            "seed": self._seed,
            "widths": self._widths,
            "slot_bytes": self.slot_bytes,
        }
        worker = _Worker(process, ours)
        worker.say(json.dumps(hello).encode())
        return worker

    def _replace(self, dead: _Worker) -> None:
        """Put another worker in the place of one that died, and give it all its open jobs: filling twice does no
        harm."""
        dead.line.close()
        ending = _ending(dead.process.wait())
        fresh, place = self._spawn(), self._workers.index(dead)
        self._workers[place] = fresh
        for number, job in dead.jobs.items():
            # Jobs are done in turn: it died over the first one.
            lives = job.lives - (not fresh.jobs)
            if not lives:
                keys = ", ".join(sample["key"] for sample in json.loads(job.data)["samples"])
                raise UserError(
                    f"workers of the training stream die again and again (the last one by {ending}) over the clips "
                    f"{keys}; try data.workers=0, fewer data.workers, or a smaller data.prefetch"
                )
            fresh.jobs[number] = _Job(job.task, job.data, lives)
        fresh.send()
        warn(f"data worker {place} was ended by {ending}; another takes its place, no sample is lost")


def _ending(status: int) -> str:
    """In words, what ended a process."""
    words = f"signal {-status}" if status < 0 else f"an exit with status {status}"
    return f"{words} (out of memory?)" if status == -signal.SIGKILL else words


@dataclass
class _Job:
    task: Task
    data: bytes
    lives: int = LIVES
    sent: bool = False


@dataclass(eq=False)
class _Worker:
    """A process, and what it has not answered yet. The jobs hold on to their batches."""

    process: subprocess.Popen[bytes]
    line: Connection
    jobs: dict[int, _Job] = field(default_factory=dict)

    def send(self) -> None:
        """Send the next jobs, as far as it may have so many."""
        for job in itertools.islice(self.jobs.values(), SENT):
            if not job.sent:
                job.sent = True
                self.say(job.data)

    def say(self, data: bytes) -> None:
        """That a worker is dead is noticed when its answer does not come."""
        with contextlib.suppress(ConnectionError):
            self.line.send_bytes(data)

    def dismiss(self) -> None:
        """Have it end, whoever else may hold a copy of the line."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.line.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)
        self.line.close()


_all: WeakSet[Batches] = WeakSet()


def _after_fork() -> None:
    """A child that lives longer than this process would keep its workers alive."""
    for batches in list(_all):
        for worker in batches._workers:
            worker.line.close()


os.register_at_fork(after_in_child=_after_fork)


def _anonymous_file() -> int:
    """A file without a name, in memory where the system has such: it is gone with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("faces2voices-batches", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as stream:
        return os.dup(stream.fileno())
