"""What the drill does to builds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tests.two_nodes import AT_WORK, Size

STARTING = "ray::Worker"
"""In the command line of a worker that has been asked for, whether or not it has a task."""


@dataclass(frozen=True)
class Fault:
    """What happens to the clip at `place` of the source, ordered by key, in a stage, and what comes of it.

    `what` is as in tests/poison, or that with `_once`. `reason` is that of the quarantine; empty where the clip comes
    through, as the fault happens only once. In the stage "codebook", the fit of centroids, the clip is only left out.
    """

    stage: str
    place: int
    what: str
    reason: str = ""

    @property
    def once(self) -> bool:
        """Whether it happens once in a build."""
        return self.what.endswith("_once")


@dataclass(frozen=True)
class Blow:
    """What happens to the cluster, and when.

    Attributes:
        what: `lose` or `freeze` the first node, `thaw` it, `kill` a worker that works, `join` for another node
            some seconds later.
        share: of the tasks, that are done before.
        event: instead of `share`, the event of the build after which it happens; "fault" for the first fault that
            happens once, and on the node where it does.
        seconds: after that.
        word: in the command line of a process of the node, without which it is not lost.
    """

    what: Literal["lose", "freeze", "thaw", "kill", "join"]
    share: float = 0.0
    event: str = "done"
    seconds: float = 0.0
    word: str = AT_WORK


@dataclass(frozen=True)
class Scenario:
    """A disturbed build.

    Attributes:
        nodes: of a cluster of its own; none: the drill's.
        settings: besides those of the drill.
        headroom: bytes by which the machine's memory in use may grow before Ray's own monitor ends workers; 0 leaves
            the monitor as it is.
    """

    name: str
    faults: tuple[Fault, ...] = ()
    blows: tuple[Blow, ...] = ()
    nodes: tuple[Size, ...] = ()
    settings: tuple[str, ...] = ()
    headroom: int = 0

    def refused(self) -> frozenset[tuple[str, int]]:
        """Stage and place of the clips that end in quarantine for it, or are left out of the fit."""
        return frozenset((fault.stage, fault.place) for fault in self.faults if fault.reason)

    def lost(self) -> dict[str, int]:
        """So many workers with a task are lost by these means, at least."""
        at_work = [blow for blow in self.blows if blow.what in ("lose", "freeze") and blow.word == AT_WORK]
        killed = sum(blow.what == "kill" for blow in self.blows)
        return {"node": len(at_work), "killed": killed + sum(fault.what == "kill_once" for fault in self.faults)}


ON_GPU = ("run.gpus=0.5",)
"""In the profile `offline` that is speech and the fit of centroids, in torch; all other stages take a processor."""

SCENARIOS = (
    Scenario("node lost, another joins", blows=(Blow("lose", 0.4), Blow("join", 0.4))),
    Scenario("node lost for good", blows=(Blow("lose", 0.4),)),
    Scenario(
        "two nodes lost, one after the other",
        blows=(Blow("lose", 0.2), Blow("join", 0.2), Blow("lose", 0.6), Blow("join", 0.6)),
    ),
    Scenario("node out of reach, comes back", blows=(Blow("freeze", 0.3), Blow("thaw", 0.7))),
    Scenario("node lost while workers start", blows=(Blow("lose", event="begin", seconds=1.0, word=STARTING),)),
    Scenario("node lost with the first task", blows=(Blow("lose", event="given"),)),
    Scenario("node lost in the fit", (Fault("codebook", 4, "hang_once"),), blows=(Blow("lose", event="fault"),)),
    Scenario("worker killed", blows=(Blow("kill", 0.3),)),
    Scenario("workers killed, five times", blows=tuple(Blow("kill", share) for share in (0.1, 0.25, 0.4, 0.55, 0.7))),
    Scenario("worker kills itself once", (Fault("landmarks", 2, "kill_once"),)),
    Scenario("segfault", (Fault("landmarks", 7, "segfault", "crash"),)),
    Scenario("abort", (Fault("landmarks", 7, "abort", "crash"),)),
    Scenario("exit", (Fault("landmarks", 7, "exit", "crash"),)),
    Scenario("hang", (Fault("landmarks", 7, "hang", "hang"),)),
    Scenario("hang in native code", (Fault("landmarks", 7, "hang_in_c", "hang"),)),
    Scenario("memory", (Fault("landmarks", 7, "memory", "memory"),)),
    Scenario(
        "memory, seen by Ray alone",
        (Fault("landmarks", 7, "memory", "memory"),),
        # By memory that Ray reckons with, a worker's share is half of this.
        nodes=(Size(2, memory=3 << 30),),
        settings=("run.memory_gb=20",),
        headroom=3 << 30,
    ),
    Scenario("segfault in a batch", (Fault("speech", 4, "segfault", "crash"),)),
    Scenario(
        "segfault in the fit", (Fault("codebook", 4, "segfault", "crash"), Fault("speech", 4, "segfault", "crash"))
    ),
    Scenario("two clips of a shard", (Fault("energy", 6, "segfault", "crash"), Fault("energy", 8, "hang", "hang"))),
    Scenario("GPU and few processors", nodes=(Size(2, gpus=1),), settings=ON_GPU),
    Scenario("node without a GPU lost", blows=(Blow("lose", 0.4),), nodes=(Size(1), Size(2, gpus=1)), settings=ON_GPU),
    Scenario(
        "all together",
        (
            Fault("landmarks", 7, "segfault", "crash"),
            Fault("speech", 4, "hang", "hang"),
            Fault("pitch", 11, "memory", "memory"),
            Fault("lips", 2, "kill_once"),
        ),
        (Blow("kill", 0.2), Blow("lose", 0.4), Blow("join", 0.4), Blow("kill", 0.6)),
    ),
)
