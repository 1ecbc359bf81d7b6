"""Digests of source media taken on the machines of a cluster, so that the one that asks reads none of them itself."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.digests import Facts, Files, read_here
from pipeline.session import nodes
from shards.errors import UserError
from shards.signals import check_signals

import ray  # isort: skip  # after pipeline.session, which sets its environment
import ray.exceptions  # isort: skip

_FILES = 64
"""Files of a task: seconds of reading."""
_TRIES = 5
"""How often a task is given out that loses its machine."""


def read_on_ray(files: Files) -> Iterator[tuple[str, Facts]]:
    """As `read_here`, on the machines of the session that is open.

    Raises:
        StorageError: a bucket refuses or does not answer.
        OSError: a disk does not work.
        UserError: machine after machine was lost.
    """
    read = ray.remote(_read).options(num_cpus=1, max_retries=_TRIES)
    waiting = [files[start : start + _FILES] for start in range(0, len(files), _FILES)][::-1]
    running: list[ray.ObjectRef] = []
    while waiting or running:
        # Two for each processor: one at work and one to follow, however many machines there are by now.
        most = 2 * max(1, int(sum(node.cpus for node in nodes() if node.alive)))
        while waiting and len(running) < most:
            running.append(read.remote(waiting.pop()))
        check_signals()
        ready, running = ray.wait(running, num_returns=1, timeout=1)
        for call in ready:
            try:
                yield from ray.get(call)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, (UserError, OSError)):
                    raise error.cause from None
                raise
            except ray.exceptions.RayError as error:
                words = " ".join(str(error).split())[:300]
                raise UserError(f"ray: reading the source lost its machine {_TRIES} times ({words})") from None


def _read(files: Files) -> list[tuple[str, Facts]]:
    return list(read_here(files))
