"""Turn talking-face videos into training shards. Run it again to resume or complete a dataset."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cli.options import add_config_options, duration


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder of videos, LRS3 or LRS2 tree, or CSV/Parquet table")
    parser.add_argument("dataset", help="folder of the dataset; made if it is not there")
    parser.add_argument("--profile", choices=["offline"], help="which networks the stages run (default: offline)")
    parser.add_argument("--layout", choices=["auto", "folder", "lrs3", "lrs2", "table"], help="how to read the source")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="use this Ray cluster instead of starting Ray here")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_config_options(parser, "pitch.fmax=500")


def run(args: argparse.Namespace) -> int:
    from pipeline.build import build
    from pipeline.config import BuildConfig
    from shards.config import load_config

    overrides = list(args.set)
    for key, value in (
        ("profile", args.profile),
        ("source.layout", args.layout),
        ("run.ray_address", args.ray_address),
    ):
        if value is not None:
            overrides.append(f"{key}={value}")
    summary = build(args.source, args.dataset, load_config(BuildConfig, args.config, overrides))
    if args.json:
        print(json.dumps(asdict(summary)))
        return 0
    for note in summary.notes:
        print(note)
    if not summary.changed and not summary.tasks:
        print("nothing to do: every column and shard is there already")
    else:
        print(
            f"ran {summary.tasks} stage shards, kept {summary.kept}; packed {summary.packed} of {summary.shards} shards"
        )
    total = sum(summary.quarantined.values())
    print(f"{summary.clips} clips ({duration(summary.seconds)}) in {summary.dataset}, {total} in quarantine")
    for reason, count in sorted(summary.quarantined.items()):
        print(f"  {count:>6}  {reason}")
    return 0
