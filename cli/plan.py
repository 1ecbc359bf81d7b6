"""Show what `f2v build` would do with the same arguments: what is fresh, stale or missing, why, and what it costs. Exit
status 1 where it would be refused."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cli.options import add_build_options, build_overrides, duration, money, selection
from pipeline.words import count, printable, size

if TYPE_CHECKING:
    from pipeline.estimate import Estimate
    from pipeline.plan import Plan

WIDEST = 60
"""Shards that are drawn one by one."""
MARKS = {"fresh": ".", "stored": "+", "stale": "s", "missing": "-"}


def configure(parser: argparse.ArgumentParser) -> None:
    add_build_options(parser)


def run(args: argparse.Namespace) -> int:
    from pipeline.build import plan_build
    from pipeline.estimate import estimate, to_pack
    from pipeline.run_record import last_run
    from pipeline.survey import Wanted, cut_words, survey

    there = survey(args.source, args.dataset, Wanted(args.config, tuple(build_overrides(args))))
    plan = plan_build(there, selection(args))
    cost = estimate(plan, there.shards, there.manifest, there.config, last_run(there.dataset))
    packs = to_pack(plan)
    unpublished = any(not gap.checkpoint.url for gap in plan.missing)
    refused = int(unpublished or (bool(there.gone) and not args.drop_missing))
    if args.json:
        keys = {"gone": there.gone, "recut": there.recut, "unsure": there.unsure}
        missing = [asdict(gap.checkpoint) for gap in plan.missing]
        print(json.dumps({"scan": len(there.scans), **_tree(plan, packs, cost), **keys, "missing": missing}))
        return refused
    for note in there.notes:
        print(printable(note))
    if there.gone:
        lost = count(len(there.gone), "clip")
        some = f"{lost} no longer in the source, or not to be read, e.g. {there.gone[0]}"
        if there.recut:
            some += f" ({len(there.recut)} because their recordings are {cut_words(there)})"
        print(printable(some if args.drop_missing else f"{some}; build needs --drop-missing"))
    if there.shards:
        _print_matrix(plan, list(there.shards))
    runs = sum(cell.run and cell.state != "stored" for row in plan.cells.values() for cell in row.values())
    if not runs and not packs and not there.scans:
        print("nothing to do" if plan.left() else "nothing to do: every column and shard is there already")
        return refused
    for gap in plan.missing:
        print(f"to be fetched first: {gap}" if gap.checkpoint.url else f"must be supplied: {gap}")
    first = f"{count(len(there.scans), 'recording')} to look through" if there.scans else ""
    if not there.shards:
        print(f"to do: {first}; their clips, and what the stages have to do, are known after that")
        return refused
    rest = f"{count(runs, 'stage shard')}, {count(len(packs), 'shard')} to pack"
    print(f"to do: {first}, then {rest}" if first else f"to do: {rest}")
    for why, number in Counter(_why_packed(plan).values()).items():
        print(f"  pack: {why}, {count(number, 'shard')}")
    _print_cost(cost)
    return refused


def _print_matrix(plan: Plan, shards: list[str]) -> None:
    print(f"  {'stage':<12}{'fresh':>6}{'stale':>6}{'missing':>8}{'run':>6}  why")
    for stage, row in plan.cells.items():
        states = Counter(cell.state for cell in row.values())
        running = sum(cell.run for cell in row.values())
        reasons = Counter(cell.why for cell in row.values() if cell.why)
        missing = states["missing"] + states["stored"]
        why = "; ".join(f"{reason}, {count(number, 'shard')}" for reason, number in reasons.most_common())
        print(f"  {stage:<12}{states['fresh']:>6}{states['stale']:>6}{missing:>8}{running:>6}  {why}".rstrip())
    if 1 < len(shards) <= WIDEST:
        print(f"  by shard, {shards[0]} to {shards[-1]} (. fresh, s stale, - missing, + computed, not committed):")
        for stage, row in plan.cells.items():
            print(f"  {stage:<12}{''.join(MARKS[row[shard].state] for shard in shards)}")


def _why_packed(plan: Plan) -> dict[str, str]:
    return {shard: pack.why for shard, pack in plan.packs.items() if pack.run and pack.why}


def _print_cost(cost: Estimate) -> None:
    if cost.work:
        where = count(cost.cpus, "processor")
        where += f" and {count(cost.gpu_workers, 'worker')} with a GPU" if cost.gpu_workers else ""
        print(
            f"estimate from the columns that are there: {duration(cost.seconds)} on {where}, "
            f"{size(cost.columns)} of columns, {size(cost.packed)} of packed shards"
        )
    if cost.cost is not None:
        print(f"cost: {money(cost.cost)}, by run.prices and the machine hours that such work took in the last build")
    if cost.unknown:
        print(f"no timings in this dataset yet for {', '.join(cost.unknown)}")


def _tree(plan: Plan, packs: list[str], cost: Estimate) -> dict[str, Any]:
    cells = {
        stage: {
            shard: {"state": cell.state, "why": cell.why, "run": cell.run}
            | ({"attempt": cell.task.attempt} if cell.task else {})
            for shard, cell in row.items()
        }
        for stage, row in plan.cells.items()
    }
    return {"stages": cells, "pack": packs, "pack_why": _why_packed(plan), "estimate": asdict(cost)}
