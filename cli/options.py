"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.selection import Selection


def add_config_options(parser: argparse.ArgumentParser, example: str) -> None:
    """`--config FILE` and repeated `--set key=value`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file; keys it leaves out keep their defaults")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override one key, e.g. {example}; repeatable",
    )


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """What `build` and `plan` have in common."""
    parser.add_argument(
        "source", nargs="?", help="folder of videos, LRS3 or LRS2 tree, or CSV/Parquet table; path, s3:// or gs://"
    )
    parser.add_argument("dataset", help="where the dataset lies or will lie; path, s3:// or gs://")
    parser.add_argument(
        "--profile", choices=["offline", "paper"], help="which networks the stages run (default: offline)"
    )
    parser.add_argument("--weights", metavar="DIR", help="folder with the paper profile's checkpoints")
    parser.add_argument("--layout", choices=["auto", "folder", "lrs3", "lrs2", "table"], help="how to read the source")
    parser.add_argument(
        "--segment", action="store_true", help="cut recordings into clips at shot changes and where faces come and go"
    )
    parser.add_argument("--ray-address", metavar="ADDRESS", help="use this Ray cluster instead of starting Ray here")
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", help="run this stage alone; repeatable")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="STAGE",
        help="run this stage and all that follow from it; with --only, what both have in common",
    )
    parser.add_argument("--shards", metavar="RANGE", help="work on these shards alone: 3-7,9 or train:3-7,test:0")
    parser.add_argument("--force", action="store_true", help="run the chosen stages even where they are up to date")
    parser.add_argument(
        "--requeue", action="append", default=[], metavar="REASON", help="try clips in quarantine again; repeatable"
    )
    parser.add_argument("--drop-missing", action="store_true", help="take out clips that the source no longer has")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    add_config_options(parser, "pitch.fmax=500")


def build_overrides(args: argparse.Namespace) -> list[str]:
    """`--set` and the options that stand for a key."""
    named = (
        ("profile", args.profile),
        ("run.weights", args.weights),
        ("source.layout", args.layout),
        ("segment.enabled", "true" if args.segment else None),
        ("run.ray_address", args.ray_address),
    )
    return [*args.set, *(f"{key}={value}" for key, value in named if value is not None)]


def selection(args: argparse.Namespace) -> Selection:
    """What `--only` and its like pick. Raises UserError: no such stage or reason."""
    from pipeline.selection import Selection

    return Selection(tuple(args.only), args.start, args.shards, args.force, tuple(args.requeue))


def duration(seconds: float) -> str:
    """`12.3 s`, `4.5 min` or `6.7 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def money(cost: float) -> str:
    """`12.34`, or `0.0123` of less than one."""
    return f"{cost:.2f}" if cost >= 1 else f"{cost:.4f}"


def check_page(path: Path) -> None:
    """Raises UserError: a page cannot be written there."""
    from shards.errors import UserError

    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path}: the page must end in .html")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder")
