"""Check a dataset: every object of the manifest, the tables, conservation, and with --full (the default) every byte."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from pipeline.words import count, printable, size


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="names, sizes and counts alone")
    depth.add_argument("--full", action="store_true", help="checksums and contents too, by reading all (the default)")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from shards.verify import verify

    verdict = verify(args.dataset, full=not args.quick)
    if args.json:
        print(json.dumps(asdict(verdict)))
    else:
        for line in (*verdict.notes, *verdict.problems):
            print(printable(line))
        state = f"{count(len(verdict.problems), 'problem')}" if verdict.problems else "all right"
        held = f"{count(verdict.shards, 'shard')}, {count(verdict.clips, 'clip')}, {size(verdict.bytes)}"
        print(f"{args.dataset}: {held}: {state}")
    return 1 if verdict.problems else 0
