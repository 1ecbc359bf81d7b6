"""Pairs scored by several processes; one that dies or hangs over a clip costs that clip alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from model.evaluation.config import EvaluationConfig
from model.evaluation.partners import Pair
from shards.errors import UserError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Read by libraries when they are loaded; processes, not threads, share the cores."""
PATIENCE = 1800.0
"""Seconds that a clip may take, loading of networks among them; a process that needs longer hangs."""
FAILURES = 5
"""Clips that fail one after the other, before any has scores, after which it is not for the clips."""
FAREWELL = 10.0
"""Seconds that a process may take to end."""


class Scorer(Protocol):
    """What `Metrics` is to this file."""

    def score(self, generated: Any, reference: Any, text: str | None) -> Any: ...

    def describe(self) -> dict[str, Any]: ...


Make = Callable[[EvaluationConfig], Scorer]


@dataclass(frozen=True)
class Failed:
    """Why a pair has no scores.

    Attributes:
        unreadable: one of its files cannot be read; else scoring failed.
    """

    why: str
    unreadable: bool = False


def score_pairs(
    pairs: Sequence[Pair], config: EvaluationConfig, workers: int, make: Make, works: bool = False
) -> Iterator[tuple[int, Any]]:
    """Index and `Scores` (or `Failed`) of every pair, as they come.

    Args:
        make: builds the metrics in each process, so it must be importable there.
        works: scores were got in this way before, so what fails now is held to be the clips' own fault.

    Raises:
        UserError: the metrics cannot work at all, for want of a file, say; or scoring failed for the first `FAILURES`
            pairs, those that cannot be read aside.
    """
    failures = 0
    todo = list(enumerate(pairs))[::-1]
    crew: dict[Connection, _Worker] = {}
    try:
        while todo or crew:
            while todo and len(crew) < workers:
                worker = _Worker(config, make)
                crew[worker.connection] = worker
                worker.give(*todo.pop())
            ready = wait(list(crew), max(0.0, min(worker.deadline for worker in crew.values()) - time.monotonic()))
            late = [one for one, worker in crew.items() if one not in ready and worker.late()]
            for connection in (*ready, *late):
                worker = crew[connection]  # type: ignore[index]
                answer = worker.answer()
                yield worker.index, answer
                if isinstance(answer, Failed):
                    failures += not answer.unreadable
                    if failures >= FAILURES and not works:
                        raise UserError(
                            f"{failures} clips in a row failed and none has scores, so this is not for the clips: "
                            f"{answer.why}; try --workers 1 where memory is short, or leave out some --metrics"
                        )
                else:
                    works = True
                if todo and worker.alive:
                    worker.give(*todo.pop())
                else:
                    crew.pop(worker.connection).end()
    finally:
        for worker in crew.values():
            worker.end(now=True)


class _Worker:
    """A process with one pair at a time."""

    def __init__(self, config: EvaluationConfig, make: Make) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.index, self.alive, self.deadline = -1, True, 0.0
        with _environment(dict.fromkeys(THREADS, str(config.threads))):
            self._process: SpawnProcess = context.Process(target=_work, args=(theirs, config, make), daemon=True)
            self._process.start()
        theirs.close()

    def give(self, index: int, pair: Pair) -> None:
        self.index, self.deadline = index, time.monotonic() + PATIENCE
        # A process that died meanwhile is found out when it answers.
        with contextlib.suppress(OSError):
            self.connection.send(pair)

    def late(self) -> bool:
        """Whether its clip takes too long."""
        return time.monotonic() >= self.deadline

    def answer(self) -> Any:
        """Scores or `Failed`; a process that has none by now is killed. Raises UserError: see `score_pairs`."""
        if not self.connection.poll():
            self.alive = False
            self._process.kill()
            return Failed(f"not scored within {PATIENCE:g} s")
        try:
            found = self.connection.recv()
        except (EOFError, OSError):
            self.alive = False
            self._process.join()
            return Failed(f"the process that scored it died ({_status(self._process.exitcode)})")
        if isinstance(found, UserError):
            raise found
        return found

    def end(self, now: bool = False) -> None:
        if now:
            self._process.terminate()
        self.connection.close()
        self._process.join(FAREWELL)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


def _work(connection: Connection, config: EvaluationConfig, make: Make) -> None:
    """A process's life: pairs in, answers out, until the other side is gone."""
    # Ctrl-C reaches the whole group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from model.evaluation.sound import load_sound

    metrics: Scorer | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pair: Pair = connection.recv()
            answer: Any
            try:
                metrics = metrics or make(config)
                try:
                    sounds = load_sound(pair.generated), load_sound(pair.reference)
                except UserError as error:
                    answer = Failed(str(error), unreadable=True)
                else:
                    answer = metrics.score(*sounds, pair.text)
            except UserError as error:
                answer = error
            except ModuleNotFoundError as error:
                way = "pip install 'faces2voices[evaluate]' brings it"
                answer = UserError(f"the package {error.name!r} is not installed; {way}, or leave its metrics out")
            except Exception as error:
                answer = Failed(f"could not be scored ({type(error).__name__}: {' '.join(str(error).split())})")
            connection.send(answer)


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"status {code}"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
