"""What a build loses when things die: nodes, workers, and workers on clips that kill them.

    python -m benchmarks.drill --clips 18 --json drill.json
    python -m benchmarks.drill --only "node lost" --only segfault

A Ray cluster of two nodes with a processor each on this machine (and a head without), synthetic clips, real stages of
the profile `offline`. A lost node is SIGKILL to its raylet and all its workers at once. Clips are poisoned from
outside, by tests/poison. Each build has to end by itself, with the bytes of an undisturbed one; where a clip is
poisoned, of one in which the same stage refuses the same clip.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.watched_build import Ended, WatchedBuild, stage_env
from pipeline.synthetic.corpus import write_corpus
from shards.dataset import Dataset
from shards.signals import catch_signals
from shards.storage import TEMPORARY
from shards.verify import verify
from tests.two_nodes import Cluster

SETTINGS = ("pack.shard_clips=6", "speech.clusters=20", "run.clip_timeout=20", "run.memory_gb=2.5")
REJOIN = 5.0
"""Seconds from the loss of a node to the start of one that replaces it."""


@dataclass(frozen=True)
class Fault:
    """What happens to the clip at `place` of the source, ordered by key, in a stage, and what comes of it.

    `reason` is that of the quarantine; empty where the clip comes through, as the fault happens only once.
    """

    stage: str
    place: int
    what: str
    reason: str


@dataclass(frozen=True)
class Scenario:
    """A disturbed build.

    Attributes:
        blows: share of the tasks that are done, and what happens then: `lose` a node, `freeze` one, `thaw` it, `kill`
            a worker, `join` for another node `REJOIN` seconds later.
    """

    name: str
    faults: tuple[Fault, ...] = ()
    blows: tuple[tuple[float, str], ...] = ()

    def refused(self) -> frozenset[tuple[str, int]]:
        """Stage and place of the clips that end in quarantine for it."""
        return frozenset((fault.stage, fault.place) for fault in self.faults if fault.reason)


SCENARIOS = (
    Scenario("node lost, another joins", blows=((0.4, "lose"), (0.4, "join"))),
    Scenario("node lost for good", blows=((0.4, "lose"),)),
    Scenario("two nodes lost, one after the other", blows=((0.2, "lose"), (0.2, "join"), (0.6, "lose"), (0.6, "join"))),
    Scenario("node out of reach, comes back", blows=((0.3, "freeze"), (0.7, "thaw"))),
    Scenario("worker killed", blows=((0.3, "kill"),)),
    Scenario("workers killed, five times", blows=tuple((share, "kill") for share in (0.1, 0.25, 0.4, 0.55, 0.7))),
    Scenario("worker kills itself once", (Fault("landmarks", 2, "kill_once", ""),)),
    Scenario("segfault", (Fault("landmarks", 7, "segfault", "crash"),)),
    Scenario("abort", (Fault("landmarks", 7, "abort", "crash"),)),
    Scenario("exit", (Fault("landmarks", 7, "exit", "crash"),)),
    Scenario("hang", (Fault("landmarks", 7, "hang", "hang"),)),
    Scenario("hang in native code", (Fault("landmarks", 7, "hang_in_c", "hang"),)),
    Scenario("memory", (Fault("landmarks", 7, "memory", "memory"),)),
    Scenario("segfault in a batch", (Fault("speech", 4, "segfault", "crash"),)),
    Scenario("two clips of a shard", (Fault("energy", 6, "segfault", "crash"), Fault("energy", 8, "hang", "hang"))),
    Scenario(
        "all together",
        (
            Fault("landmarks", 7, "segfault", "crash"),
            Fault("speech", 4, "hang", "hang"),
            Fault("pitch", 11, "memory", "memory"),
            Fault("lips", 2, "kill_once", ""),
        ),
        ((0.2, "kill"), (0.4, "lose"), (0.4, "join"), (0.6, "kill")),
    ),
)


@dataclass
class Outcome:
    """What came of a scenario.

    Attributes:
        seconds: wall clock of the build; `times`: over the undisturbed one.
        lost: (why, stage, seconds of work) of each worker that was lost.
        quarantine: stage, reason and message of the poisoned clips.
        wrong: what is not as it has to be.
    """

    name: str
    seconds: float = 0.0
    times: float = 0.0
    lost: list[tuple[str, str, float]] = field(default_factory=list)
    quarantine: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class Drill:
    """Builds of one source on one cluster; use as a context manager.

    Args:
        folder: for datasets, and the file that says which stages misbehave.
        settings: of all builds.
    """

    def __init__(self, source: Path, folder: Path, settings: Sequence[str] = SETTINGS) -> None:
        self._source, self._folder, self._settings = source, folder, settings
        self._plan = folder / "stages.json"
        self._references: dict[frozenset[tuple[str, int]], tuple[Dataset, float]] = {}
        self._tasks = 0
        self._frozen = ""
        self._builds = 0
        self.cluster = Cluster((1, 1), stage_env(self._plan))
        self.keys = sorted(path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*.mp4"))

    def __enter__(self) -> Drill:
        self.cluster.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.cluster.__exit__(*error)

    def warm_up(self) -> None:
        """A build that does not count: network files and compiled loops are in the page cache for the others."""
        self._write([])
        self._build()[0].finish()

    def reference(self, refused: frozenset[tuple[str, int]] = frozenset()) -> tuple[Dataset, float]:
        """A build without disturbance, in which these stages refuse these clips; and its seconds.

        Raises:
            RuntimeError: it did not go through.
        """
        if refused not in self._references:
            self._write([{"stage": stage, "key": self.keys[place], "what": "reject"} for stage, place in refused])
            build, dataset = self._build()
            ended = build.finish()
            if ended.status:
                raise RuntimeError(f"the undisturbed build failed:\n{ended.said}")
            self._tasks = self._tasks or len(ended.of("done"))
            self._references[refused] = dataset, ended.seconds
        return self._references[refused]

    def run(self, scenario: Scenario) -> Outcome:
        """Build with its disturbances, and hold the result against the undisturbed one."""
        plain = self.reference()[1]
        expected = self.reference(scenario.refused())[0]
        self._write([self._fault(fault, scenario.name) for fault in scenario.faults])
        build, dataset = self._build()
        for share, blow in scenario.blows:
            if build.wait("done", round(share * self._tasks)):
                self._strike(blow)
        ended = build.finish()
        outcome = Outcome(scenario.name, round(ended.seconds, 1), round(ended.seconds / plain, 2))
        outcome.lost = [(event["why"], event["stage"], event["seconds"]) for event in ended.of("lost")]
        self._check(scenario, ended, dataset, expected, outcome)
        self.cluster.add(*[1] * (2 - len(self.cluster.nodes)))
        return outcome

    def _write(self, faults: list[dict[str, Any]]) -> None:
        self._plan.write_text(json.dumps({"faults": faults}))

    def _fault(self, fault: Fault, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"stage": fault.stage, "key": self.keys[fault.place], "what": fault.what, "gb": 4}
        if fault.what.endswith("_once"):
            flag = self._folder / f"{name}-{fault.stage}.once"
            flag.unlink(missing_ok=True)
            found |= {"what": fault.what.removesuffix("_once"), "once": str(flag)}
        return found

    def _build(self) -> tuple[WatchedBuild, Dataset]:
        self._builds += 1
        folder = self._folder / f"dataset{self._builds}"
        options = ["--ray-address", self.cluster.address]
        return WatchedBuild(self._source, folder, self._settings, options), Dataset(str(folder))

    def _strike(self, blow: str) -> None:
        if blow == "join":
            time.sleep(REJOIN)
            self.cluster.add(1)
        elif blow == "lose":
            self.cluster.lose(self.cluster.nodes[0])
        elif blow == "freeze":
            self._frozen = self.cluster.nodes[0]
            self.cluster.freeze(self._frozen)
        elif blow == "thaw":
            self.cluster.thaw(self._frozen)
        else:
            self.cluster.kill_worker()

    def _check(self, scenario: Scenario, ended: Ended, dataset: Dataset, expected: Dataset, outcome: Outcome) -> None:
        if ended.status:
            outcome.wrong.append(f"exit status {ended.status}: {ended.said[-600:]}")
            return
        if shards_of(dataset) != shards_of(expected):
            outcome.wrong.append("packed shards differ from the undisturbed build's")
        with contextlib.redirect_stderr(io.StringIO()):
            outcome.wrong += verify(dataset.uri).problems
        rows = {row.key: row for row in dataset.quarantine()}
        poisoned = {self.keys[fault.place]: fault for fault in scenario.faults if fault.reason}
        others = {row.key: row.reason for row in expected.quarantine() if row.key not in poisoned}
        if {key: row.reason for key, row in rows.items() if key not in poisoned} != others:
            outcome.wrong.append(
                f"quarantine: {Counter(row.reason for row in rows.values())}, beside the poisoned clips"
            )
        for key, fault in poisoned.items():
            row = rows.get(key)
            if row is None:
                outcome.wrong.append(f"{key} is not in quarantine")
                continue
            outcome.quarantine[key] = row.stage, row.reason, row.message
            if (row.stage, row.reason) != (fault.stage, fault.reason) or not row.retriable:
                outcome.wrong.append(f"{key}: {row.stage}, {row.reason}, retriable {row.retriable}")
        left = [found.name for found in dataset.store.list() if TEMPORARY in found.name]
        if left and not scenario.blows and not scenario.faults:
            outcome.wrong.append(f"left behind: {left}")


def shards_of(dataset: Dataset) -> dict[str, str]:
    """Name -> sha256 of every packed shard."""
    return {shard.name: shard.sha256 for shard in dataset.index().shards}


def rows_of(outcomes: Sequence[Outcome], plain: float) -> list[str]:
    """The table."""
    lines = [f"{'':<37}{'seconds':>8}{'times':>7}  {'work lost, s':<24}result"]
    lines.append(f"{'undisturbed':<37}{plain:>8.1f}{1:>7.2f}")
    for one in outcomes:
        lost = ", ".join(f"{why} {seconds:.1f}" for why, _, seconds in one.lost)
        lines.append(
            f"{one.name:<37}{one.seconds:>8.1f}{one.times:>7.2f}  {lost:<24}  {'; '.join(one.wrong) or 'same bytes'}"
        )
        lines += [f"    {key}: {stage} {reason}: {message}" for key, (stage, reason, message) in one.quarantine.items()]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=18)
    parser.add_argument("--source", type=Path, help="at least 12 clips of your own instead of synthetic ones")
    parser.add_argument("--only", action="append", metavar="NAME", help="scenarios whose names have this; repeatable")
    parser.add_argument("--set", action="append", default=[], help="as of `f2v build`")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    chosen = [one for one in SCENARIOS if not args.only or any(word in one.name for word in args.only)]
    outcomes: list[Outcome] = []
    catch_signals()  # so that the cluster ends with us
    with tempfile.TemporaryDirectory() as temporary:
        source = args.source or Path(temporary, "corpus")
        if not args.source:
            write_corpus(source, clips=args.clips, voices=2, seed=1)
        with Drill(source, Path(temporary), (*SETTINGS, *args.set)) as drill:
            drill.warm_up()
            plain = drill.reference()[1]
            for scenario in chosen:
                outcomes.append(drill.run(scenario))
                print(rows_of(outcomes[-1:], plain)[2], file=sys.stderr, flush=True)
    print("\n".join(rows_of(outcomes, plain)))
    if args.json:
        facts = {"clips": args.clips, "undisturbed": plain, "scenarios": [asdict(outcome) for outcome in outcomes]}
        args.json.write_text(json.dumps(facts, indent=1))
    return any(outcome.wrong for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
