"""Summarise the clips that are not in the shards, by reason, or list them with their messages."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict

from pipeline.words import count, printable
from shards.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset")
    parser.add_argument("--reason", help="only this reason")
    parser.add_argument("--list", action="store_true", help="every clip with its message")
    parser.add_argument("--traceback", action="store_true", help="with the traceback of faults (implies --list)")
    parser.add_argument("--json", action="store_true", help="print every row as JSON, one a line")


def run(args: argparse.Namespace) -> int:
    from pipeline.stage import Reason
    from shards.dataset import Dataset

    known = [reason.value for reason in Reason]
    if args.reason not in (None, *known):
        raise UserError(f"no reason {args.reason!r}; choose from {', '.join(known)}")
    rows = [row for row in Dataset(args.dataset).quarantine() if args.reason in (None, row.reason)]
    if args.json:
        for row in rows:
            print(json.dumps(asdict(row)))
        return 0
    if args.list or args.traceback:
        for row in rows:
            print(printable(f"{row.key}: {row.stage}: {row.reason}: {row.message}"))
            if args.traceback and row.traceback:
                print(*map(printable, row.traceback.splitlines()), sep="\n")
        return 0
    groups = defaultdict(list)
    for row in rows:
        groups[row.reason, row.stage].append(row)
    print(f"{count(len(rows), 'clip')} in quarantine")
    for (reason, stage), members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        again = ", retriable" if any(row.retriable for row in members) else ""
        example = printable(f"{members[0].key}: {members[0].message}")
        print(f"  {len(members):>6}  {reason} ({stage}{again}): e.g. {example}")
    return 0
