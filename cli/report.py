"""Look at a dataset: one HTML page with counts, quarantine, distributions, and clips to see and hear.

The page holds all it shows and opens from disk. Of a large dataset a sample is read, by byte ranges: of each clip in it
some tens of kilobytes, of the clips that are shown everything. Exit status 1 where clips could not be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

NAMED = 10
"""Faults that are named."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="path, s3:// or gs://")
    parser.add_argument("-o", "--output", type=Path, metavar="PAGE", help="page to write (.html)")
    parser.add_argument("--split", help="look at this split alone")
    parser.add_argument("--clips", type=int, default=12, metavar="N", help="clips on the page: worst and random (12)")
    parser.add_argument("--sample", type=int, default=1000, metavar="N", help="clips that figures are taken of (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (0)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(args: argparse.Namespace) -> int:
    from cli.options import check_page
    from pipeline.words import count, printable, size
    from shards.errors import UserError

    if args.output is None and not args.json:
        raise UserError("name the page to write, -o report.html, or ask for the numbers alone, --json")
    if args.output is not None:
        check_page(args.output)
    if not 0 <= args.clips <= 40:
        raise UserError(f"--clips {args.clips}: give a number from 0 to 40; a page of more is too large to open")
    if args.sample < 1:
        raise UserError(f"--sample {args.sample}: give a positive number")

    from pipeline.report.look import look
    from pipeline.report.page import report_page, write_page
    from pipeline.report.shelf import Shelf
    from shards.dataset import Dataset

    shelf = Shelf(Dataset(args.dataset))
    found = look(shelf, args.split, args.sample, args.clips, args.seed)
    faults = found.faults
    if args.output is not None:
        page, faults = report_page(shelf, found)
        write_page(args.output, page)
    if args.json:
        print(json.dumps({**found.numbers(), "faults": faults}))
    elif args.output is not None:
        seen = f"{found.sampled} of {count(found.clips, 'packed clip')} looked at, {len(found.chosen)} shown"
        print(f"{args.output}: {seen}; {size(args.output.stat().st_size)}")
    reasons = list(dict.fromkeys(faults.values()))
    for why in reasons[:NAMED]:
        print(f"f2v report: left out: {printable(why)}", file=sys.stderr)
    if len(reasons) > NAMED:
        print(f"f2v report: and {len(reasons) - NAMED} more; `f2v verify` lists all damage", file=sys.stderr)
    return int(bool(faults))
