"""Blind listening test of several systems: writes the page that listeners open, or reads the ratings they saved.

`f2v evaluate listen gt=DIR svts=DIR ours=DIR -o listen.html` writes one page with all sounds in it, which needs neither
server nor network, and listen.key.json, which says what item is of what system; keep that file from the listeners.
`f2v evaluate listen --ratings *.csv --key listen.key.json` prints mean opinion scores with 95 % intervals, drawn over
listeners and clips.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("systems", nargs="*", metavar="NAME=DIR", help="a system and the folder of its speech")
    parser.add_argument("-o", "--output", type=Path, metavar="PAGE", help="page to write (.html)")
    parser.add_argument("--clips", type=int, default=40, help="clips to draw (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the clips and the numbers of items (default: 0)")
    parser.add_argument("--ratings", nargs="+", type=Path, metavar="CSV", help="files that listeners saved")
    parser.add_argument("--key", type=Path, metavar="JSON", help="what item is of what system")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from shards.errors import UserError

    if args.ratings is not None:
        if args.systems or args.output is not None or args.key is None:
            raise UserError("--ratings goes with --key alone: --ratings *.csv --key listen.key.json")
        return _score(args)
    if not args.systems or args.output is None or args.key is not None:
        raise UserError("name systems and the page, e.g. gt=DIR ours=DIR -o listen.html; or --ratings and --key")
    return _write(args)


def _write(args: argparse.Namespace) -> int:
    from model.evaluation.contestants import parse_systems
    from model.evaluation.listening import write_test
    from pipeline.words import printable

    written = write_test(parse_systems(args.systems, 1), args.output, args.clips, args.seed)
    if args.json:
        facts = {"page": str(written.page), "key": str(written.key), "clips": written.clips, "items": written.items}
        print(json.dumps({**facts, "lacking": written.lacking, "unreadable": written.unreadable}))
    else:
        print(f"{written.page}: {written.clips} clips, {written.items} items; {written.key} says what is what")
    for key, names in written.lacking.items():
        print(f"f2v evaluate listen: {printable(key)}: not in {', '.join(names)}; left out", file=sys.stderr)
    for why in written.unreadable.values():
        print(f"f2v evaluate listen: {printable(why)}; the clip is left out", file=sys.stderr)
    return 1 if written.lacking or written.unreadable else 0


def _score(args: argparse.Namespace) -> int:
    from model.evaluation.listening import opinion_table, opinions, read_key, read_ratings
    from pipeline.words import printable
    from shards.errors import UserError

    key = read_key(args.key)
    ratings, faults = read_ratings(args.ratings, key)
    for fault in faults:
        print(f"f2v evaluate listen: {printable(fault)}", file=sys.stderr)
    if not ratings:
        raise UserError("not one rating that counts")
    found = opinions(ratings, key)
    if args.json:
        from dataclasses import asdict

        print(json.dumps({"opinions": [asdict(one) for one in found], "faults": faults}))
    else:
        print(opinion_table(found), end="")
    return 1 if faults else 0
