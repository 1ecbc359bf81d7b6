"""How `benchmarks.stream` measures: every run in a process of its own, with all processes that it starts counted."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.stream_data import BATCH

WARM_UP = 8
"""Batches before the clock starts: more than an epoch, so that workers run and every page has been touched."""
LEAST = 12
"""Batches that a run counts at least."""
WAIT_S = 300
REASON = 300
"""Characters of an error that are shown, its last ones."""

Batches = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A contestant with what it reads and its number of worker processes."""

    open: Callable[[str, int], AbstractContextManager[Batches]]
    uri: str
    workers: int


def steady(entry: Entry, seconds: float) -> dict[str, float]:
    """Samples per second of wall clock, and per second of processor time of all its processes."""
    with entry.open(entry.uri, entry.workers) as batches:
        for _ in range(WARM_UP):
            take(batches)
        count, cpu, begin = 0, tree_cpu(), time.perf_counter()
        while (wall := time.perf_counter() - begin) < seconds or count < LEAST:
            take(batches)
            count += 1
        wall, cpu = time.perf_counter() - begin, tree_cpu() - cpu
    return {"per_s": BATCH * count / wall, "per_cpu_s": BATCH * count / cpu}


def first_epoch(entry: Entry, count: int, cold: list[str]) -> float:
    """Seconds until `count` batches are there, workers' start included; the files `cold` are not in memory before."""
    for path in cold:
        forget(path)
    begin = time.perf_counter()
    with entry.open(entry.uri, entry.workers) as batches:
        for _ in range(count):
            take(batches)
        return time.perf_counter() - begin


def take(batches: Batches) -> None:
    """Read one element of each tensor of the next batch."""
    batch = next(batches, None)
    if batch is None:
        raise EOFError(f"no more batches: some process has fewer than {BATCH} clips in its shards; give more --clips")
    for value in batch.values():
        if isinstance(value, torch.Tensor):
            value[(0,) * value.ndim].item()


def forget(path: str) -> None:
    """Drop a file's pages from the page cache."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a forked process, which leaves nothing behind in this one.

    Raises:
        RuntimeError: the call raised or its process died; the message says how.
    """
    with started(function, *arguments) as (_, line):
        return answer(line)


def peak_memory(entry: Entry, seconds: float) -> dict[str, float]:
    """Largest proportional set size in MB of a contestant's processes together, by kind of memory.

    Pages of files, libraries among them, can be given up at any time.
    """
    with started(steady, entry, seconds) as (pid, line):
        peak = proportional([pid])
        while not line.poll(0.1):
            now = proportional(family(pid))
            if now["Pss"] - now["Pss_File"] > peak["Pss"] - peak["Pss_File"]:
                peak = now
        answer(line)
    return {
        "all": peak["Pss"] / 1000,
        "anonymous_and_shared": (peak["Pss_Anon"] + peak["Pss_Shmem"]) / 1000,
        "file_pages": peak["Pss_File"] / 1000,
    }


@contextlib.contextmanager
def started(function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[int, Connection]]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    assert process.pid is not None
    try:
        yield process.pid, ours
    except BaseException:
        # Interrupted, or too slow: nothing of it may still write where the data are removed.
        for pid in family(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()


def answer(line: Connection) -> Any:
    if not line.poll(WAIT_S):
        least = f"{WARM_UP} batches of warm-up and {LEAST} that count"
        raise RuntimeError(f"no answer within {WAIT_S} s (too slow for {least}); try again when less else runs")
    try:
        good, result = line.recv()
    except EOFError:
        raise RuntimeError("its process died") from None
    if not good:
        raise RuntimeError(result)
    return result


def _call(line: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Libraries that print must not get between the lines of a result.
    os.dup2(2, 1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    try:
        line.send((True, function(*arguments)))
    except Exception as error:
        words = " ".join(str(error).split()) or repr(error)
        # A DataLoader's error has its worker's traceback in front of the reason.
        words = words if len(words) <= REASON else f"... {words[-REASON:]}"
        line.send((False, f"{type(error).__name__}: {words}"))


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def tree_cpu() -> float:
    """Seconds of processor time that this process and its descendants have used."""
    ticks = 0
    for pid in family(os.getpid()):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def proportional(pids: list[int]) -> dict[str, float]:
    """Sums over processes of /proc/PID/smaps_rollup, kB."""
    total = dict.fromkeys(("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem"), 0.0)
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in total:
                    total[name] += float(value.split()[0])
    return total
