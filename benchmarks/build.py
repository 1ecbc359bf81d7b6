"""What a build costs beside the stages' own work, how that grows with the number of clips, and memory.

    python -m benchmarks.build overhead --clips 300 --json overhead.json
    python -m benchmarks.build growth --clips 100 1000 10000 --json growth.json
    python -m benchmarks.build memory --clips 100 1000 --json memory.json

`overhead`: worker time (wall clock of the whole command times workers) that is not inside the stages, from a build of
synthetic clips with the profile `offline` on a Ray of its own; where it went; and seconds from the command to the first
clip that came out of a stage. `growth`: the same with stages that take no time, on two-frame clips, 256 a shard.
`memory`: the most that driver and workers held, with the real stages; beyond `--distinct` clips, they are the same ones
again under other names. Ratios of one run count; on a busy machine the other work counts as the stages' own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.watched_build import Ended, WatchedBuild, stage_env
from pipeline.run_record import RunRecord, last_run
from pipeline.synthetic.corpus import write_corpus
from shards.dataset import Dataset

WORKERS = 2
OVERHEADS = ("source", "ray", "worker", "networks", "read, write", "pack", "hand over", "idle", "end")


def built(
    source: Path, dataset: Path, settings: Sequence[str], plan: Mapping[str, Any], profile: Path | None = None
) -> tuple[Ended, RunRecord]:
    """A build from scratch, with stages changed as `plan` says (tests/poison).

    Raises:
        RuntimeError: it failed.
    """
    file = dataset.with_suffix(".json")
    file.write_text(json.dumps(plan))
    settings = [f"run.cpus={WORKERS}", *settings]
    ended = WatchedBuild(source, dataset, settings, env=stage_env(file), profile=profile).finish(timeout=3 * 3600)
    record = last_run(Dataset(str(dataset))) if ended.status == 0 else None
    if record is None:
        raise RuntimeError(f"the build ended with {ended.status}:\n{ended.said[-3000:]}")
    return ended, record


def at_work(events: Sequence[Mapping[str, Any]]) -> float:
    """Worker seconds between the handing out of a task and its end, whatever that was."""
    given: dict[tuple[str, str], float] = {}
    total = 0.0
    for event in events:
        place = event.get("stage", ""), event.get("shard", "")
        if event["event"] == "given":
            given[place] = event["at"]
        elif event["event"] in ("done", "lost"):
            total += event["at"] - given.pop(place)
    return total


def account(ended: Ended, record: RunRecord) -> dict[str, float]:
    """Worker seconds by what they went into; they add up to the wall clock times the workers.

    compute: inside the stages, the fit of centroids among them. source: imports, the look at dataset and source, the
    digests of media. ray: its start, and the plan. worker: until the first one has a task. networks: loading them.
    read, write: columns, their decoding and encoding. pack: packed shards. hand over: from the driver to the worker and
    back. idle: without a task while others have one, a worker's own start among them. end: from the last task on:
    commit, the end of Ray.
    """
    stages = {name: stage for name, stage in record.stages.items() if name != "pack"}
    inside = sum(stage.seconds for stage in stages.values())
    compute, setup = (sum(getattr(stage, what) for stage in stages.values()) for what in ("compute", "setup"))
    pack = record.stages["pack"].seconds
    ready = min(event["at"] for event in ended.of("begin"))
    first = min(event["at"] for event in ended.of("given"))
    last = max(event["at"] for event in ended.of("done"))
    busy = at_work(ended.events)
    return {
        "compute": compute,
        "source": WORKERS * (ended.listed - ended.begin),
        "ray": WORKERS * (ready - ended.listed),
        "worker": WORKERS * (first - ready),
        "networks": setup,
        "read, write": inside - compute - setup,
        "pack": pack,
        "hand over": busy - inside - pack,
        "idle": WORKERS * (last - first) - busy,
        "end": WORKERS * (ended.end - last),
    }


def idle_by_phase(ended: Ended) -> dict[str, float]:
    """Idle worker seconds: before both workers had a task for the first time, while the centroids are fitted, in the
    tail (from when a worker had its last task), and between."""
    marks = [event for event in ended.events if event["event"] in ("given", "done", "lost")]
    hand: set[tuple[str, str]] = set()
    full = [event["at"] for event in marks if _count(hand, event) >= WORKERS]
    begin, end = (full[0], full[-1]) if full else (marks[-1]["at"], marks[-1]["at"])
    hand = set()
    found = {"at first": 0.0, "fit": 0.0, "tail": 0.0, "between": 0.0}
    for event, after in pairwise(marks):
        _count(hand, event)
        idle = (WORKERS - len(hand)) * (after["at"] - event["at"])
        fitting = any(stage == "codebook" for stage, _ in hand)
        phase = "at first" if event["at"] < begin else "fit" if fitting else "between"
        # `full` has the moments when nobody lacked a task; the last of these lasts until its first worker is through.
        found["tail" if event["at"] > end and not fitting else phase] += idle
    return found


def _count(hand: set[tuple[str, str]], event: Mapping[str, Any]) -> int:
    place = event["stage"], event["shard"]
    hand.add(place) if event["event"] == "given" else hand.discard(place)
    return len(hand)


def overhead(folder: Path, source: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Where worker time went, and the first clip."""
    stamp = folder / "first"
    ended, record = built(source, folder / "overhead", settings, {"first": str(stamp)})
    parts = account(ended, record)
    capacity = WORKERS * ended.seconds
    return {
        "clips": ended.summary["clips"],
        "video_seconds": ended.summary["seconds"],
        "seconds": ended.seconds,
        "first_clip": float(stamp.read_text()) - ended.begin,
        "worker_seconds": parts,
        "idle": idle_by_phase(ended),
        "overhead": 1 - parts["compute"] / capacity,
        "stages": {
            name: {
                "compute": stage.compute,
                "networks": stage.setup,
                "read, write": stage.seconds - stage.compute - stage.setup,
            }
            for name, stage in record.stages.items()
        },
        "load": os.getloadavg()[0],
    }


def growth(folder: Path, clips: int, profile: Path | None) -> dict[str, Any]:
    """A build of trivial stages over so many clips, and one after it that has nothing to do."""
    source = folder / f"source{clips}"
    for number in range(clips):
        path = source / f"{number % 100:02d}" / f"clip{number:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    centroids = folder / "centroids.npy"
    np.save(centroids, np.zeros((2, 384), np.float32))
    settings = [f"speech.centroids={centroids}", "speech.clusters=2"]
    dataset = folder / f"dataset{clips}"
    ended, record = built(source, dataset, settings, {"trivial": True}, profile)
    assert ended.summary["clips"] == clips, ended.summary
    parts = account(ended, record)
    again = WatchedBuild(source, dataset, settings, env=stage_env(dataset.with_suffix(".json"))).finish()
    assert again.status == 0, again.said
    return {
        "seconds": ended.seconds,
        "per_clip": ended.seconds / clips,
        "worker_seconds": parts,
        "nothing_to_do": again.seconds,
        "driver_bytes": ended.peak,
        "worker_bytes": max(stage.peak for stage in record.stages.values()),
        "tasks": sum(stage.tasks for stage in record.stages.values()),
    }


def memory(folder: Path, source: Path, clips: int, settings: Sequence[str]) -> dict[str, Any]:
    """Peaks of a build of so many clips; those of `source` in turn, each time under another name."""
    paths = sorted(source.rglob("*.mp4"))
    linked = folder / f"source{clips}"
    for number in range(clips):
        path = paths[number % len(paths)]
        target = linked / path.relative_to(source).parent / f"{path.stem}-{number // len(paths)}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
    ended, record = built(linked, folder / f"dataset{clips}", settings, {})
    return {
        "seconds": ended.seconds,
        "driver_bytes": ended.peak,
        "worker_bytes": max(stage.peak for stage in record.stages.values()),
        "by_stage": {name: stage.peak for name, stage in record.stages.items()},
    }


def show_overhead(facts: Mapping[str, Any]) -> list[str]:
    """The table of `overhead`."""
    total = WORKERS * facts["seconds"]
    lines = [
        f"{facts['clips']} clips ({facts['video_seconds']:.0f} s of video) in {facts['seconds']:.1f} s on {WORKERS} "
        f"workers; first clip after {facts['first_clip']:.1f} s; load {facts['load']:.1f}",
        f"outside the stages: {facts['overhead']:.1%}",
    ]
    lines += [
        f"  {name:<14}{seconds:>8.1f} s{seconds / total:>8.1%}" for name, seconds in facts["worker_seconds"].items()
    ]
    for what in ("networks", "read, write"):
        parts = sorted(((stage[what], name) for name, stage in facts["stages"].items()), reverse=True)
        lines.append(f"{what}: {', '.join(f'{name} {seconds:.1f} s' for seconds, name in parts if seconds >= 0.05)}")
    return [*lines, f"idle: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in facts['idle'].items())}"]


def show_growth(facts: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """The table of `growth`."""
    lines = ["".join([f"{'clips':<24}", *(f"{clips:>10}" for clips in facts)])]

    def row(name: str, values: Sequence[float], digits: int) -> None:
        lines.append("".join([f"{name:<24}", *(f"{value:>10.{digits}f}" for value in values)]))

    row("seconds", [one["seconds"] for one in facts.values()], 1)
    row("ms per clip", [1000 * one["per_clip"] for one in facts.values()], 1)
    for name in ("compute", *OVERHEADS):
        row(f"  {name}", [one["worker_seconds"][name] for one in facts.values()], 1)
    row("nothing to do", [one["nothing_to_do"] for one in facts.values()], 1)
    return [*lines, *_peaks(facts)]


def _peaks(facts: Mapping[int, Mapping[str, Any]]) -> list[str]:
    return [
        "".join([f"{f'{who}, MB':<24}", *(f"{one[f'{who}_bytes'] / 1e6:>10.0f}" for one in facts.values())])
        for who in ("driver", "worker")
    ]


def show_memory(facts: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """The table of `memory`."""
    return ["".join([f"{'clips':<24}", *(f"{clips:>10}" for clips in facts)]), *_peaks(facts)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("overhead", "growth", "memory"))
    parser.add_argument("--clips", type=int, nargs="+", help="default: 300; 100 1000 10000; 100 1000")
    parser.add_argument("--source", type=Path, help="clips of your own instead of synthetic ones")
    parser.add_argument("--distinct", type=int, default=100, help="synthetic clips of `memory` (default 100)")
    parser.add_argument("--set", action="append", default=[], help="as of `f2v build`")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="of `growth`: cProfile of the last driver")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = args.source or folder / "corpus"
        facts: dict[Any, Any] = {}
        if args.what == "growth":
            sizes = args.clips or [100, 1000, 10000]
            for clips in sizes:
                facts[clips] = growth(folder, clips, args.profile if clips == sizes[-1] else None)
            lines = show_growth(facts)
        else:
            sizes = args.clips or ([300] if args.what == "overhead" else [100, 1000])
            if not args.source:
                distinct = sizes[0] if args.what == "overhead" else args.distinct
                write_corpus(source, clips=distinct, seed=1, workers=WORKERS)
            if args.what == "overhead":
                facts = overhead(folder, source, args.set)
                lines = show_overhead(facts)
            else:
                facts = {clips: memory(folder, source, clips, args.set) for clips in sizes}
                lines = show_memory(facts)
    print("\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
