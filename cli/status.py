"""Show what a dataset holds: clips, hours and bytes per split, and quarantine by reason."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cli.options import size


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset")
    parser.add_argument("--clips", action="store_true", help="list the quarantined clips with their messages")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from pipeline.status import status
    from shards.dataset import Dataset

    found = status(args.dataset)
    if args.json:
        tree = found.as_dict()
        if args.clips:
            tree["quarantine"] = [asdict(row) for row in Dataset(args.dataset).quarantine()]
        print(json.dumps(tree))
        return 0
    print(f"{found.dataset}: profile {found.profile}")
    print(f"  {'split':<10}{'clips':>8}{'hours':>9}{'shards':>8}{'size':>11}")
    for split, row in found.splits.items():
        print(f"  {split:<10}{row.clips:>8}{row.hours:>9.3f}{row.shards:>8}{size(row.bytes):>11}")
    print(f"  quarantine: {sum(found.quarantined.values())}")
    for reason, count in found.quarantined.items():
        print(f"  {count:>10}  {reason}")
    if args.clips:
        for refused in Dataset(args.dataset).quarantine():
            print(f"  {refused.key}: {refused.stage}: {refused.reason}: {refused.message}")
    return 0
