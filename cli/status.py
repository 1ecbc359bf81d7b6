"""Show what a dataset holds: clips, hours and bytes per split, and quarantine by reason; for recordings cut into clips,
what was left out. Media and columns are not read. With --runs: its builds, what they took and cost; exit status 1 where
records of them cannot be read."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from cli.options import duration, money
from pipeline.words import count, printable, size

if TYPE_CHECKING:
    from pipeline.run_record import RunRecord


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset")
    parser.add_argument("--runs", action="store_true", help="list the builds that were made")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    if args.runs:
        return _runs(args)
    from pipeline.status import status

    found = status(args.dataset)
    if args.json:
        print(json.dumps(found.as_dict()))
        return 0
    cut = ", cut into segments" if found.segmented else ""
    print(f"{found.dataset}: profile {found.profile}, from {found.source}{cut}")
    if found.networks:
        print(f"  networks: {', '.join(f'{stage} {name}' for stage, name in found.networks.items())}")
    print(f"  {'split':<10}{'clips':>8}{'hours':>9}{'quarantine':>12}{'pending':>9}{'shards':>8}{'size':>11}")
    for split, row in found.splits.items():
        print(
            f"  {split:<10}{row.clips:>8}{row.hours:>9.3f}{row.quarantined:>12}{row.pending:>9}{row.shards:>8}"
            f"{size(row.bytes):>11}"
        )
    print(f"  {count(found.columns, 'column')}, {size(found.column_bytes)}")
    shards = sum(row.shards for row in found.splits.values())
    for field, number in found.raw.items():
        print(f"  {field}: as npy in {number} of {shards} packed shards")
    for stage, number in found.mixed.items():
        print(f"  {stage}: shards made in {number} ways; `f2v plan` says which")
    for stage, number in found.behind.items():
        some = count(number, "shard")
        print(f"  {stage}: in {some} it follows from columns that were made anew since; `f2v build` redoes it")
    if found.quarantined:
        print("  in quarantine (`f2v quarantine` has the messages):")
    for reason, number in found.quarantined.items():
        print(f"  {number:>10}  {reason}")
    if found.left_out:
        print(f"  of {found.recorded:.1f} s in {count(found.recordings, 'recording')}, left out:")
    for reason, seconds in found.left_out.items():
        print(f"  {seconds:>10.1f}  s {reason}")
    return 0


def _runs(args: argparse.Namespace) -> int:
    from pipeline.run_record import list_runs
    from shards.dataset import Dataset

    runs, faults = list_runs(Dataset(args.dataset))
    for why in faults.values():
        print(f"f2v status: left out: {printable(why)}", file=sys.stderr)
    if args.json:
        print(json.dumps({name: record.model_dump(mode="json") for name, record in runs.items()}))
        return int(bool(faults))
    if not runs:
        print(f"{args.dataset}: no build has left a record" + (" that can be read" if faults else ""))
        return int(bool(faults))
    print(f"{'began (UTC)':<17}{'ended':<9}{'took':>10}{'work':>10}{'clips':>9}{'refused':>9}{'lost':>6}{'cost':>10}")
    for record in runs.values():
        print(_run_line(record))
    return int(bool(faults))


def _run_line(record: RunRecord) -> str:
    stages = record.stages.values()
    clips = max((stage.clips + stage.refused for stage in stages), default=0)
    # A clip may be refused by several stages, and counts for packing once more.
    refused = max((stage.refused for stage in stages), default=0)
    lost = sum(lost.workers for lost in record.lost.values())
    cost = "-" if record.cost is None else money(record.cost)
    return (
        f"{record.begin[:16].replace('T', ' '):<17}{record.outcome:<9}{duration(record.seconds):>10}"
        f"{duration(record.work):>10}{clips:>9}{refused:>9}{lost:>6}{cost:>10}"
    )
