"""Machines that a build saw: which, for how long, and which of them went away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.cost import Node
from pipeline.run_record import HostRun


@dataclass
class _Seen:
    node: Node
    since: float
    seconds: float = 0.0


class Machines:
    """Fed with what the cluster is at some moments; times are seconds of one steady clock."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def see(self, nodes: Sequence[Node], now: float) -> list[tuple[Node, bool]]:
        """The machines of this moment; one that is not named is gone.

        Returns:
            What came (True) and what went (False) since the last time.
        """
        alive = {node.id: node for node in nodes if node.alive}
        changes = []
        for node in alive.values():
            seen = self._seen.get(node.id)
            if seen is None or not seen.node.alive:
                before = seen.seconds if seen else 0.0
                self._seen[node.id] = _Seen(node, now, before)
                changes.append((node, True))
        for seen in self._seen.values():
            if seen.node.alive and seen.node.id not in alive:
                seen.seconds += now - seen.since
                seen.node = replace(seen.node, alive=False)
                changes.append((seen.node, False))
        return changes

    def alive(self) -> int:
        """How many there are."""
        return sum(seen.node.alive for seen in self._seen.values())

    def hours(self, now: float) -> dict[str, float]:
        """Kind -> hours that machines of the kind were there."""
        found: dict[str, float] = {}
        for seen in self._seen.values():
            found[seen.node.kind] = found.get(seen.node.kind, 0.0) + _seconds(seen, now) / 3600
        return found

    def hosts(self, now: float) -> list[HostRun]:
        """All machines that were seen, for the run record."""
        return [
            HostRun(
                host=seen.node.host,
                node=seen.node.id,
                kind=seen.node.kind,
                cpus=seen.node.cpus,
                gpus=seen.node.gpus,
                seconds=round(_seconds(seen, now), 3),
                lost=not seen.node.alive,
            )
            for seen in self._seen.values()
        ]


def _seconds(seen: _Seen, now: float) -> float:
    return seen.seconds + (now - seen.since if seen.node.alive else 0.0)
