"""Figures for Prometheus, through Ray's own export. Without a Ray session nothing happens.

Ray puts `ray_` before each name, `_total` after those that only grow, and adds tags of its own (node, session, job).
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pipeline.cost import Cost

Kind = Literal["Counter", "Gauge", "Histogram"]

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
"""Upper ends of the bins of times."""

METRICS: dict[str, tuple[Kind, tuple[str, ...], str]] = {
    "f2v_clips": ("Counter", ("stage",), "clips that came out of a stage"),
    "f2v_quarantined": ("Counter", ("stage", "reason"), "clips that a stage refused"),
    "f2v_clip_seconds": ("Histogram", ("stage",), "seconds between a clip and the one before it, for a worker"),
    "f2v_tasks": ("Counter", ("stage",), "tasks that were computed"),
    "f2v_task_seconds": ("Counter", ("stage",), "worker seconds of tasks"),
    "f2v_compute_seconds": ("Counter", ("stage",), "of them, inside the stage itself"),
    "f2v_setup_seconds": ("Counter", ("stage",), "of them, loading networks"),
    "f2v_read_bytes": ("Counter", ("stage",), "bytes of columns read"),
    "f2v_written_bytes": ("Counter", ("stage",), "bytes of columns and packed shards written"),
    "f2v_lost": ("Counter", ("why",), "tasks that lost their worker"),
    "f2v_nodes_lost": ("Counter", ("kind",), "machines that went away during the build"),
    "f2v_waiting": ("Gauge", ("stage",), "tasks that no worker has yet"),
    "f2v_running": ("Gauge", ("stage",), "tasks that a worker is at"),
    "f2v_workers": ("Gauge", (), "workers that have a task"),
}
"""Name -> what it is for Ray, its tags, and what it says."""


def clip(stage: str, seconds: float, reason: str | None) -> None:
    """A clip came out of a stage after `seconds`, or was refused with `reason`. For workers."""
    if reason is None:
        _count("f2v_clips", 1, stage=stage)
    else:
        _count("f2v_quarantined", 1, stage=stage, reason=reason)
    if _on():
        _metric("f2v_clip_seconds").observe(seconds, {"stage": stage})


def task(stage: str, cost: Cost) -> None:
    """A task was computed. For workers."""
    _count("f2v_tasks", 1, stage=stage)
    _count("f2v_task_seconds", cost.seconds, stage=stage)
    _count("f2v_compute_seconds", cost.compute, stage=stage)
    _count("f2v_setup_seconds", cost.setup, stage=stage)
    _count("f2v_read_bytes", cost.read, stage=stage)
    _count("f2v_written_bytes", cost.written, stage=stage)


def lost(why: str) -> None:
    """A task lost its worker. For the driver, as all that follow."""
    _count("f2v_lost", 1, why=why)


def node_lost(kind: str) -> None:
    """A machine of this kind went away."""
    _count("f2v_nodes_lost", 1, kind=kind)


def waiting(stage: str, number: int) -> None:
    """So many tasks have no worker yet."""
    _set("f2v_waiting", number, stage=stage)


def running(stage: str, number: int) -> None:
    """So many tasks are being worked on."""
    _set("f2v_running", number, stage=stage)


def workers(number: int) -> None:
    """So many workers have a task."""
    _set("f2v_workers", number)


def _on() -> bool:
    """Whether this process has a Ray session; Ray is not imported to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _count(name: str, value: float, **tags: str) -> None:
    if value > 0 and _on():  # Ray refuses to count nothing
        _metric(name).inc(value, tags)


def _set(name: str, value: float, **tags: str) -> None:
    if _on():
        _metric(name).set(value, tags)


@cache
def _metric(name: str) -> Any:
    """Made when it is first needed: Ray's registry belongs to a process."""
    import ray.util.metrics

    kind, tags, words = METRICS[name]
    more: dict[str, Any] = {"boundaries": list(SECONDS)} if kind == "Histogram" else {}
    return getattr(ray.util.metrics, kind)(name, description=words, tag_keys=tags, **more)
