"""Summarise the clips that are not in the shards, by reason, or list them with their messages."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset")
    parser.add_argument("--reason", help="only this reason")
    parser.add_argument("--list", action="store_true", help="every clip with its message")
    parser.add_argument("--traceback", action="store_true", help="with the traceback of faults (implies --list)")
    parser.add_argument("--json", action="store_true", help="print every row as JSON, one a line")


def run(args: argparse.Namespace) -> int:
    from shards.dataset import Dataset

    rows = [row for row in Dataset(args.dataset).quarantine() if args.reason in (None, row.reason)]
    if args.json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return 0
    if args.list or args.traceback:
        for row in rows:
            print(f"{row.key}: {row.stage}: {row.reason}: {row.message}")
            if args.traceback and row.traceback:
                print(row.traceback)
        return 0
    groups = defaultdict(list)
    for row in rows:
        groups[row.reason, row.stage].append(row)
    print(f"{len(rows)} clips in quarantine")
    for (reason, stage), members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        again = ", retriable" if members[0].retriable else ""
        print(f"  {len(members):>6}  {reason} ({stage}{again}): e.g. {members[0].key}: {members[0].message}")
    return 0
