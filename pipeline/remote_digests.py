"""Digests of source media taken on the machines of a cluster, so that the one that asks reads none of them itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from pipeline.config import RunConfig
from pipeline.digests import Facts, Files, read_here
from pipeline.session import answers, check_room, no_room, nodes, room_to_come
from pipeline.stage import Resources
from shards.errors import UserError

import ray  # isort: skip  # after pipeline.session, which sets its environment
import ray.exceptions  # isort: skip

_FILES, _BYTES = 64, 1 << 30
"""Most files and bytes of a task, beyond its first file."""
_TRIES = 5
"""How often a task is given out again that lost its machine."""


def read_on_ray(files: Files, run: RunConfig) -> Iterator[tuple[str, Facts]]:
    """As `read_here`, on the machines of the session that is open.

    Raises:
        StorageError: a bucket refuses or does not answer.
        OSError: a disk does not work.
        UserError: no machine has a processor, and none comes in `wait_minutes`; machine after machine was lost.
    """
    check_room([Resources()], room_to_come(run, nodes()))
    read = ray.remote(_read).options(num_cpus=1, max_retries=_TRIES)
    waiting = _parts(files)[::-1]
    running: list[Any] = []
    alone = time.monotonic()
    while waiting or running:
        there = [node for node in nodes() if node.alive]
        cpus = int(sum(node.cpus for node in there))
        alone = time.monotonic() if cpus else alone
        waited = time.monotonic() - alone
        if waited > 60 * run.wait_minutes:
            raise no_room(Resources(), waited, there)
        # One at work and one to follow for each processor that there is; and as many as are to come.
        while waiting and len(running) < max(2 * cpus, run.max_cpus or 0, 1):
            running.append(read.remote(waiting.pop()))
        for call in answers(running):
            running.remove(call)
            try:
                yield from ray.get(call)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, (UserError, OSError)):
                    raise error.cause from None
                raise
            except ray.exceptions.RayError as error:
                words = " ".join(str(error).split())[:300]
                raise UserError(f"ray: reading the source lost machine after machine ({words})") from None


def _parts(files: Files) -> list[Files]:
    parts: list[list[Any]] = []
    held = 0
    for uri, found in files:
        held += found.size
        if not parts or len(parts[-1]) == _FILES or held > _BYTES:
            parts.append([])
            held = found.size
        parts[-1].append((uri, found))
    return [*parts]


def _read(files: Files) -> list[tuple[str, Facts]]:
    return list(read_here(files))
