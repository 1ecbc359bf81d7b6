"""What workers say of their work: what a task took, what they are at, and the nodes that they run on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a task took.

    Attributes:
        seconds: wall clock of the whole task.
        compute: of them, inside the stage itself: without reading columns, encoding and writing. 0 for packing, and all
            of a fit of centroids.
        setup: of them, loading networks; 0 where an earlier task of the worker did.
        read, written: bytes of columns.
        peak: most bytes that the process held in memory since it started.
        host, node: where; Ray's id of the node.
        clips, refused: clips that came out, and those that were refused.
    """

    seconds: float
    compute: float
    setup: float
    read: int
    written: int
    peak: int
    host: str
    node: str
    clips: int
    refused: int


@dataclass(frozen=True)
class Look:
    """What a worker is at.

    Attributes:
        stage, shard: of its task; empty where it has none.
        done, total, refused: clips of the task.
        since: seconds since a clip last went in or came out.
        rss: bytes that the process holds.
        cpu: processor seconds of the process so far.
        gpu: share of its GPU that is in use; None without one.
        host, node: where; Ray's id of the node.
        notes: path, on that node, of the file that outlives the process.
        code: digest of the code that it runs.
    """

    stage: str
    shard: str
    done: int
    total: int
    refused: int
    since: float
    rss: int
    cpu: float
    gpu: float | None
    host: str
    node: str
    notes: str
    code: str = ""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster; `kind` is its Ray label `f2v.node`, else `gpu` or `cpu` by what it has, `memory` the
    bytes that its workers share."""

    id: str
    host: str
    cpus: float
    gpus: float
    kind: str
    alive: bool
    memory: float = 0.0
