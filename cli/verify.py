"""Read every packed shard and check it: members, dtypes, shapes, lengths, finiteness, checksums and counts."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cli.options import size


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from shards.verify import verify

    verdict = verify(args.dataset)
    if args.json:
        print(json.dumps(asdict(verdict)))
    else:
        for problem in verdict.problems:
            print(problem)
        state = f"{len(verdict.problems)} problems" if verdict.problems else "all right"
        print(f"{args.dataset}: {verdict.shards} shards, {verdict.clips} clips, {size(verdict.bytes)}: {state}")
    return 1 if verdict.problems else 0
