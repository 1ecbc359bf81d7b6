"""Turn talking-face videos into training shards. Run it again to resume, complete or change a dataset: what is up to
date is kept. Without SOURCE the dataset's own source is used; without --config its own settings. With --json
the summary is one object on standard output, and what happens meanwhile are events on standard error, one object a
line."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from cli.options import (
    add_build_options,
    build_overrides,
    duration,
    selection,
)
from pipeline.words import count


def configure(parser: argparse.ArgumentParser) -> None:
    add_build_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, as `f2v plan` does")


def run(args: argparse.Namespace) -> int:
    if args.dry_run:
        from cli import plan

        return plan.run(args)
    from pipeline.build import build
    from pipeline.survey import Wanted

    wanted = Wanted(args.config, tuple(build_overrides(args)))
    summary = build(args.source, args.dataset, wanted, selection(args), args.drop_missing, events=args.json)
    if args.json:
        print(json.dumps(asdict(summary)))
        return 0
    for note in summary.notes:
        print(note)
    if not summary.tasks and not summary.packed and not summary.changed:
        print("nothing to do" if summary.left else "nothing to do: every column and shard is there already")
    else:
        ran, shards = count(summary.tasks, "stage shard"), count(summary.shards, "shard")
        print(f"ran {ran}, kept {summary.kept}; packed {summary.packed} of {shards}")
    total = sum(summary.quarantined.values())
    pending = f", {summary.pending} not built yet" if summary.pending else ""
    clips = f"{count(summary.clips, 'clip')} ({duration(summary.seconds)})"
    print(f"{clips} in {summary.dataset}, {total} in quarantine{pending}")
    for reason, clips_lost in sorted(summary.quarantined.items()):
        print(f"  {clips_lost:>6}  {reason}")
    return 0
