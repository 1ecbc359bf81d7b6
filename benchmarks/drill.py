"""What a build loses when things die: nodes, workers, and workers on clips that kill them.

    python -m benchmarks.drill --clips 18 --json drill.json
    python -m benchmarks.drill --only "node lost" --only segfault

A Ray cluster of two nodes with a processor each on this machine (and a head without), synthetic clips, real stages of
the profile `offline`. A lost node is SIGKILL to its raylet and all its workers at once. Clips are poisoned from
outside, by tests/poison. Each build has to end by itself, with the bytes of an undisturbed one; where a clip is
poisoned, of one in which the same stage refuses the same clip. What was to disturb a build, and did not happen, fails
its scenario too.
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
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.drill_scenarios import SCENARIOS, Blow, Fault, Scenario
from benchmarks.watched_build import Ended, WatchedBuild, stage_env
from pipeline.synthetic.corpus import write_corpus
from shards.dataset import Dataset
from shards.signals import catch_signals
from shards.storage import TEMPORARY
from shards.verify import verify
from tests.two_nodes import Cluster, Size

SETTINGS = ("pack.shard_clips=6", "speech.clusters=20", "run.clip_timeout=20", "run.memory_gb=2.5")
REJOIN = 5.0
"""Seconds from the loss of a node to the start of one that replaces it."""


GROWS_TO = 5
"""GB that the fault `memory` takes."""


@dataclass
class Outcome:
    """What came of a scenario.

    Attributes:
        seconds: wall clock of the build; `times`: over the undisturbed one.
        lost: (why, stage, seconds of work) of each worker that was lost.
        quarantine: stage, reason and message of the poisoned clips.
        wrong: what is not as it has to be.
        skipped: why this machine cannot do it.
    """

    name: str
    seconds: float = 0.0
    times: float = 0.0
    lost: list[tuple[str, str, float]] = field(default_factory=list)
    quarantine: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""


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
        self.cluster = Cluster(env=stage_env(self._plan))
        self.keys = sorted(path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*.mp4"))

    def __enter__(self) -> Drill:
        self.cluster.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.cluster.__exit__(*error)

    def warm_up(self) -> None:
        """A build that does not count: network files and compiled loops are in the page cache for the others."""
        self._write([])
        self._build(self.cluster)[0].finish()

    def reference(self, refused: frozenset[tuple[str, int]] = frozenset()) -> tuple[Dataset, float]:
        """A build without disturbance, in which these stages refuse these clips; and its seconds.

        Raises:
            RuntimeError: it did not go through.
        """
        if refused not in self._references:
            self._write([{"stage": stage, "key": self.keys[place], "what": "reject"} for stage, place in refused])
            build, dataset = self._build(self.cluster)
            ended = build.finish()
            if ended.status:
                raise RuntimeError(f"the undisturbed build failed:\n{ended.said}")
            self._tasks = self._tasks or len(ended.of("done"))
            self._references[refused] = dataset, ended.seconds
        return self._references[refused]

    def run(self, scenario: Scenario) -> Outcome:
        """Build with its disturbances, and hold the result against the undisturbed one."""
        outcome = Outcome(scenario.name)
        if scenario.headroom and memory()[1] < scenario.headroom + (GROWS_TO << 30):
            outcome.skipped = f"{memory()[1] / 1e9:.1f} GB of memory are free, which is too little"
            return outcome
        plain = self.reference()[1]
        expected = self.reference(scenario.refused())[0]
        self._write([self._fault(fault, scenario.name) for fault in scenario.faults])
        env = {**stage_env(self._plan), **_monitor(scenario.headroom)}
        own = Cluster(scenario.nodes, env) if scenario.nodes else contextlib.nullcontext(self.cluster)
        with own as cluster:
            build, dataset = self._build(cluster, scenario.settings)
            for blow in scenario.blows:
                if not self._strike(blow, build, cluster, scenario):
                    outcome.wrong.append(f"did not happen: {blow}")
            ended = build.finish()
        outcome.seconds, outcome.times = round(ended.seconds, 1), round(ended.seconds / plain, 2)
        outcome.lost = [(event["why"], event["stage"], event["seconds"]) for event in ended.of("lost")]
        happened = {fault for fault in scenario.faults if fault.once and self._flag(fault, scenario.name).exists()}
        outcome.wrong += undisturbed(scenario, ended, happened)
        self._check(scenario, ended, dataset, expected, outcome)
        self.cluster.add(*[Size()] * (2 - len(self.cluster.nodes)))
        return outcome

    def _write(self, faults: list[dict[str, Any]]) -> None:
        self._plan.write_text(json.dumps({"faults": faults}))

    def _flag(self, fault: Fault, name: str) -> Path:
        return self._folder / f"{name}-{fault.stage}.once"

    def _fault(self, fault: Fault, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"stage": fault.stage, "key": self.keys[fault.place], "gb": GROWS_TO}
        if fault.once:
            flag = self._flag(fault, name)
            flag.unlink(missing_ok=True)
            found["once"] = str(flag)
        return {**found, "what": fault.what.removesuffix("_once")}

    def _build(self, cluster: Cluster, settings: Sequence[str] = ()) -> tuple[WatchedBuild, Dataset]:
        self._builds += 1
        folder = self._folder / f"dataset{self._builds}"
        options = ["--ray-address", cluster.address]
        return WatchedBuild(self._source, folder, [*self._settings, *settings], options), Dataset(str(folder))

    def _strike(self, blow: Blow, build: WatchedBuild, cluster: Cluster, scenario: Scenario) -> bool:
        """Whether it could be done."""
        node = cluster.nodes[0]
        if blow.event == "fault":
            flag = next(self._flag(fault, scenario.name) for fault in scenario.faults if fault.once)
            if not _wait(lambda: flag.exists() and flag.read_text().endswith("\n"), build):
                return False
            node = flag.read_text().strip().rpartition("/")[2]
        elif not build.wait(blow.event, round(blow.share * self._tasks) if blow.event == "done" else 1):
            return False
        time.sleep(blow.seconds)
        if blow.what == "join":
            time.sleep(REJOIN)
            cluster.add(Size())
        elif blow.what == "thaw":
            cluster.thaw(self._frozen)
        elif blow.what == "kill":
            return cluster.kill_worker()
        elif blow.what == "freeze":
            self._frozen = node
            return cluster.freeze(node, blow.word)
        else:
            return cluster.lose(node, blow.word)
        return True

    def _check(self, scenario: Scenario, ended: Ended, dataset: Dataset, expected: Dataset, outcome: Outcome) -> None:
        if ended.status:
            outcome.wrong.append(f"exit status {ended.status}: {ended.said[-600:]}")
            return
        if shards_of(dataset) != shards_of(expected):
            outcome.wrong.append("packed shards differ from the undisturbed build's")
        with contextlib.redirect_stderr(io.StringIO()):
            outcome.wrong += verify(dataset.uri).problems
        rows = {row.key: row for row in dataset.quarantine()}
        given_up = {(event["key"], event["stage"], event["reason"]) for event in ended.of("poison")}
        faults = [fault for fault in scenario.faults if fault.reason]
        wanted = {(self.keys[fault.place], fault.stage, fault.reason) for fault in faults}
        if given_up != wanted:
            outcome.wrong.append(f"given up: {sorted(given_up)}, not {sorted(wanted)}")
        poisoned = {self.keys[fault.place]: fault for fault in faults if fault.stage != "codebook"}
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


def undisturbed(scenario: Scenario, ended: Ended, happened: Container[Fault]) -> list[str]:
    """What of a scenario left no trace in its build; `happened`: faults that happened, of those that do so once."""
    wrong = [f"did not happen: {fault}" for fault in scenario.faults if fault.once and fault not in happened]
    lost = Counter(event["why"] for event in ended.of("lost"))
    wrong += [f"lost by {why}: {lost[why]}, not {least}" for why, least in scenario.lost().items() if lost[why] < least]
    gone = sum(not event["alive"] for event in ended.of("node"))
    least = sum(blow.what in ("lose", "freeze") for blow in scenario.blows)
    return [*wrong, f"nodes that it saw go: {gone}, not {least}"] if gone < least else wrong


def memory() -> tuple[int, int]:
    """Bytes that this machine has, and that are free."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    return total, free


def _monitor(headroom: int) -> dict[str, str]:
    """Environment of nodes whose own monitor ends workers where the memory in use grows by `headroom`."""
    if not headroom:
        return {}
    total, free = memory()
    share = (total - free + headroom) / total
    return {"RAY_memory_usage_threshold": f"{share:.3f}", "RAY_memory_monitor_refresh_ms": "100"}


def _wait(ready: Callable[[], bool], build: WatchedBuild, timeout: float = 300) -> bool:
    last = time.monotonic() + timeout
    while not ready():
        if build.process.poll() is not None or time.monotonic() > last:
            return False
        time.sleep(0.05)
    return True


def shards_of(dataset: Dataset) -> dict[str, str]:
    """Name -> sha256 of every packed shard."""
    return {shard.name: shard.sha256 for shard in dataset.index().shards}


def rows_of(outcomes: Sequence[Outcome], plain: float) -> list[str]:
    """The table."""
    lines = [f"{'':<37}{'seconds':>8}{'times':>7}  {'work lost, s':<24}result"]
    lines.append(f"{'undisturbed':<37}{plain:>8.1f}{1:>7.2f}")
    for one in outcomes:
        lost = ", ".join(f"{why} {seconds:.1f}" for why, _, seconds in one.lost)
        lines.append(f"{one.name:<37}{one.seconds:>8.1f}{one.times:>7.2f}  {lost:<24}  {_result(one)}")
        lines += [f"    {key}: {stage} {reason}: {message}" for key, (stage, reason, message) in one.quarantine.items()]
    return lines


def _result(one: Outcome) -> str:
    return f"skipped: {one.skipped}" if one.skipped else "; ".join(one.wrong) or "same bytes"


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
