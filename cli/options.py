"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


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


def duration(seconds: float) -> str:
    """`12.3 s`, `4.5 min` or `6.7 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
