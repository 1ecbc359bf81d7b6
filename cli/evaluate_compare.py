"""Compare systems on the same clips: one table, paired differences, and a page to listen and look at.

`f2v evaluate compare gt=DIR svts=DIR ours=DIR -o OUT` scores svts and ours against gt, marks what is surely the best
and holds every system against the last one. OUT gets index.html (open it in any browser, no server), table.md,
clips.csv and comparison.json. Clips that a system lacks or that cannot be read are left out of all and listed; exit
status is 1 then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cli.evaluation_options import add_measuring_options, measuring
from pipeline.words import printable


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("systems", nargs="+", metavar="NAME=DIR", help="a system and the folder of its speech")
    parser.add_argument("--reference", metavar="NAME", default="gt", help="the original sound (default: gt)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for page and tables")
    parser.add_argument("--texts", type=Path, metavar="CSV", help="columns key and text (default: KEY.txt, or Whisper)")
    parser.add_argument(
        "--show", type=int, default=12, metavar="N", help="clips on the page: worst, best and random (12)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random clips on the page")
    parser.add_argument("--json", action="store_true", help="print comparison.json")
    add_measuring_options(parser)


def run(args: argparse.Namespace) -> int:
    from model.evaluation.contestants import parse_systems
    from shards.errors import UserError

    systems = parse_systems(args.systems)
    if args.show < 1:
        raise UserError(f"--show {args.show}: give a positive number")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"{args.output}: is a file; name a folder")
    config = measuring(args)

    from model.evaluation.compare import compare, left_out, record, write
    from model.evaluation.page import write_page
    from model.evaluation.tables import differences, json_text

    found = compare(systems, args.reference, config, args.workers, args.cache, args.texts, args.clips)
    args.output.mkdir(parents=True, exist_ok=True)
    write(found, args.output)
    write_page(found, args.output, config, args.show, args.seed)
    if args.json:
        print(json_text(record(found)), end="")
    else:
        print(found.table())
        if found.differences:
            print(differences(found.differences, f"less {found.last}"))
        print(f"{args.output}: index.html, table.md, clips.csv, comparison.json; {len(found.keys)} clips")
    lost = left_out(found)
    for line in lost:
        print(f"f2v evaluate compare: left out: {printable(line)}", file=sys.stderr)
    return int(bool(lost))
