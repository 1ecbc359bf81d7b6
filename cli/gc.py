"""List what no manifest needs any more, and with --delete remove it.

Kept are all objects of the current manifest, of every manifest that was replaced within the grace period (readers may
be at work on them), and unnamed ones younger than that (a build may be about to commit them)."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from datetime import timedelta

from pipeline.words import count, printable, size
from shards.errors import UserError

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
LONGEST = timedelta(days=36500)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset")
    parser.add_argument("--grace", default="7d", metavar="TIME", help="for example 12h or 30d (default: 7d)")
    parser.add_argument("--delete", action="store_true", help="delete what is listed")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from shards.dataset import Dataset
    from shards.history import delete_garbage, find_garbage

    dataset = Dataset(args.dataset)
    found = find_garbage(dataset, _grace(args.grace))
    if args.delete:
        delete_garbage(dataset, found.old)
    if args.json:
        print(json.dumps({**asdict(found), "deleted": args.delete}, default=str))
        return 0
    for old in found.old:
        print(f"{size(old.size):>10}  {old.modified:%Y-%m-%d %H:%M}  {old.name}")
    for name in found.foreign:
        print(f"foreign, left alone: {printable(name)}")
    total = size(sum(old.size for old in found.old))
    done = "deleted" if args.delete else "to delete (add --delete)"
    more = len(found.kept) + len(found.young)
    print(f"{count(len(found.old), 'object')}, {total}, {done}; {more} more within --grace")
    return 0


def _grace(text: str) -> timedelta:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if not match:
        raise UserError(f"--grace {text!r}: expected a number and s, m, h or d, such as 12h")
    grace = timedelta(**{UNITS[match[2]]: int(match[1])})
    if grace > LONGEST:
        raise UserError(f"--grace {text}: at most {LONGEST.days}d")
    return grace
