"""The Ray session of a command: a cluster that runs already, or one started on this machine for the time being."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from pipeline.config import RunConfig
from pipeline.cost import Node
from pipeline.stage import Resources
from pipeline.worker import worker_env
from shards.errors import UserError
from shards.signals import check_signals

# Quiet, and nothing leaves the machine: no usage report, no look for `uv`, no token between local processes.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# A lost node is noticed within seconds.
os.environ.setdefault("RAY_health_check_period_ms", "1000")
os.environ.setdefault("RAY_health_check_timeout_ms", "3000")
os.environ.setdefault("RAY_health_check_failure_threshold", "3")

import ray
import ray.exceptions

KIND = "f2v.node"
"""Ray label that says of what kind a machine is."""
_RAYS = "ray_listen_error_messages"
_SAID_BETTER = ("worker died or was killed", "Raylet is terminated", "has been marked dead")
_STARTS = 3
"""Ray gives its own processes half a minute to start, which a busy machine may exceed."""


@contextmanager
def ray_session(run: RunConfig) -> Iterator[None]:
    """Connect to the cluster of `run`, or start Ray on this machine for the time of the block. A session that this
    process has open already is used, and stays.

    Raises:
        UserError: no cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    printed = sys.stdout
    sys.stdout = _Output(printed)
    # Ray takes SIGTERM for itself; who called us keeps it.
    handler = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if run.ray_address is not None:
            _knock(run.ray_address)
            ray.init(address=run.ray_address, **quiet)
        else:
            _start(run, quiet)
    except Exception as error:  # Ray raises all kinds here, a bare Exception among them
        sys.stdout = printed
        what = f"no cluster at {run.ray_address!r}" if run.ray_address else "could not be started"
        raise UserError(f"ray: {what} ({' '.join(str(error).split())})") from None
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        ray.shutdown()
        sys.stdout = printed


class _Output(io.TextIOBase):
    """Standard output without what Ray prints there from a thread of its own: that goes to standard error, but for
    workers and machines that died, which whoever uses them says better."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        if threading.current_thread().name != _RAYS:
            return self._stream.write(text)
        # The end of a line is written by itself.
        self._dropped = any(words in text for words in _SAID_BETTER) or (self._dropped and text == "\n")
        if not self._dropped:
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()


def _start(run: RunConfig, quiet: dict[str, Any]) -> None:
    memory = run.object_store_mb << 20
    for attempt in range(1, _STARTS + 1):
        try:
            # "local": never join whatever cluster this machine or RAY_ADDRESS happens to know.
            ray.init(address="local", num_cpus=run.cpus, object_store_memory=memory, include_dashboard=False, **quiet)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == _STARTS:
                raise
            ray.shutdown()
            print("ray: did not start within half a minute (a busy machine); once more", file=sys.stderr, flush=True)


def _knock(address: str) -> None:
    """Raise OSError where nobody listens; Ray itself would try for minutes."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def answers(calls: Sequence[Any]) -> list[Any]:
    """Calls that have an answer, waiting for one a second at most.

    Raises:
        Stopped: a signal asks to stop.
    """
    check_signals()
    try:
        if not calls:
            time.sleep(0.2)
            return []
        if ray.wait([*calls], num_returns=1, timeout=1)[0]:
            return list(ray.wait([*calls], num_returns=len(calls), timeout=0)[0])
        return []
    except SystemError:
        check_signals()  # a signal that came inside Ray's own code shows as this
        raise


def nodes() -> list[Node]:
    """The machines of the cluster, those that it lost among them."""
    return [_node(found) for found in ray.nodes()]


def _node(found: Mapping[str, Any]) -> Node:
    has, labels = found.get("Resources", {}), found.get("Labels") or {}
    return Node(
        id=found["NodeID"],
        host=found.get("NodeManagerHostname") or found.get("NodeManagerAddress", ""),
        cpus=float(has.get("CPU", 0)),
        gpus=float(has.get("GPU", 0)),
        kind=labels.get(KIND) or ("gpu" if has.get("GPU") else "cpu"),
        alive=bool(found["Alive"]),
        memory=float(has.get("memory", 0)),
    )


def actor_options(resources: Resources) -> dict[str, Any]:
    """What Ray is told of a worker."""
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "runtime_env": {"env_vars": worker_env(resources)},
    }


def places(node: Node, wanted: Resources) -> int:
    """Workers that a machine has room for."""
    counts = [node.cpus / wanted.cpus]
    if wanted.gpus:
        counts.append(node.gpus / wanted.gpus)
    return int(min(counts) + 1e-6)


def failure(where: str, error: ray.exceptions.RayTaskError, advice: str) -> UserError:
    """What to say of a task that raised: what itself is meant for the user stays as it is."""
    cause = error.cause
    if isinstance(cause, UserError):
        return cause
    if isinstance(cause, OSError):
        # A full disk, missing permission: the machine's words are the clearest.
        name = f"{cause.filename}: " if cause.filename else ""
        return UserError(f"{where}: {name}{cause.strerror or cause}; {advice}")
    return UserError(f"{where}: {cause!r}\n{error}")


def no_room(wanted: Resources, seconds: float, machines: Sequence[Node]) -> UserError:
    """What to say where a worker waited so long for its place, and in vain."""
    what = f"{wanted.cpus:g} processor" + (f" and {wanted.gpus:g} GPU" if wanted.gpus else "")
    there = ", ".join(f"{node.host} {node.cpus:g} CPU {node.gpus:g} GPU" for node in machines)
    return UserError(
        f"ray: no room for a worker ({what}) in {seconds / 60:.1f} minutes (run.wait_minutes); the cluster has "
        f"{there}, which others may use; what is done is kept, build again to go on"
    )


def room_to_come(run: RunConfig, machines: Sequence[Node]) -> list[dict[str, float]]:
    """What each machine has, as Ray names it; and, on a cluster that may grow, what one more may have."""
    has = [{"CPU": node.cpus, "GPU": node.gpus} for node in machines if node.alive]
    if run.ray_address is None:
        return has
    most = max((node["GPU"] for node in has), default=0)
    return [*has, {"CPU": run.max_cpus or 0, "GPU": run.max_gpus or most}]


def check_room(workers: Iterable[Resources], machines: Sequence[Mapping[str, float]]) -> None:
    """See that each kind of worker finds room on some machine.

    Args:
        machines: what each machine of the cluster has, as Ray names it.

    Raises:
        UserError: what is asked for is on no machine.
    """
    for wanted in workers:
        if any(wanted.cpus <= has.get("CPU", 0) and wanted.gpus <= has.get("GPU", 0) for has in machines):
            continue
        cpus, gpus = (max((has.get(name, 0) for has in machines), default=0) for name in ("CPU", "GPU"))
        if wanted.gpus > gpus:
            there = f"no machine of the cluster has more than {gpus:g}" if gpus else "the cluster has no GPU"
            raise UserError(
                f"run.gpus = {wanted.gpus:g}, but {there}; run.gpus=0 keeps networks on processors, run.max_gpus lets "
                "a cluster that has an autoscaler grow"
            )
        if wanted.cpus > cpus:
            raise UserError(
                f"a worker needs {wanted.cpus:g} processor, but no machine of the cluster has more than {cpus:g}; "
                "run.max_cpus lets a cluster that has an autoscaler grow"
            )
        raise UserError(
            f"a worker needs {wanted.cpus:g} processor and {wanted.gpus:g} GPU (run.gpus), but no machine has both"
        )
