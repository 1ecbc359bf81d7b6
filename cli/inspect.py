"""Look at one clip of a dataset: where it is, why it was refused, and what is stored of it.

Fields that are in no packed shard are read from the columns of the stages. KEY is one of clips.parquet. Exit status 1
where fields could not be read.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.words import printable, size

if TYPE_CHECKING:
    from pipeline.report.inspect import Inspection

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 72
"""Characters of a curve at most."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="path, s3:// or gs://")
    parser.add_argument("key", help="of the clip")
    parser.add_argument("-o", "--output", type=Path, metavar="PAGE", help="page of the clip to write (.html)")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from cli.options import check_page

    if args.output is not None:
        check_page(args.output)

    from pipeline.report.inspect import inspect
    from pipeline.report.page import clip_page, filterbank, write_page
    from pipeline.report.shelf import Shelf
    from shards.dataset import Dataset

    shelf = Shelf(Dataset(args.dataset))
    found = inspect(shelf, args.key)
    if args.output is not None:
        write_page(args.output, clip_page(found.view, shelf.dataset.uri, filterbank(shelf)))
    print(json.dumps(found.as_dict()) if args.json else _text(found))
    return int(bool(found.faults))


def _text(found: Inspection) -> str:
    from pipeline.report.figures import FIGURES
    from shards.schema import VIDEO_RATE

    row, refused = found.view.row, found.view.refused
    where = found.view.tar or f"shard {row.shard}"
    part = "" if row.start is None and row.end is None else f", {row.start or 0:g} s to {_end(row.end)}"
    lines = [
        printable(f"{row.key}: {row.state}, {where}"),
        printable(f"  source   {row.uri}{part}, {size(row.bytes)}"),
        printable(f"  split    {row.split}" + (f", speaker {row.speaker}" if row.speaker else "")),
    ]
    if row.text:
        lines.append(printable(f"  text     {row.text}"))
    if row.frames:
        lines.append(f"  length   {row.frames} frames, {row.frames / VIDEO_RATE:g} s")
    if refused is not None:
        again = ", retriable" if refused.retriable else ""
        lines.append(printable(f"  refused  by {refused.stage}: {refused.reason}{again}: {refused.message}"))
        lines += [f"    {printable(line)}" for line in refused.traceback.splitlines()]
    lines += [printable(f"  note     {note}") for note in found.view.notes]
    if found.fields:
        lines.append(f"  {'field':<11}{'dtype':<9}{'shape':<18}{'min':>10}{'mean':>10}{'max':>10}{'bytes':>11}")
    for name, stored in found.fields.items():
        shape = "x".join(map(str, stored.shape)) or "-"
        span = "".join(f"{_number(value):>10}" for value in (stored.low, stored.mean, stored.high))
        column = "  column" if stored.tar.startswith("columns/") else ""
        lines.append(f"  {name:<11}{stored.dtype:<9}{shape:<18}{span}{size(stored.bytes):>11}{column}")
    for name, value in found.figures.items():
        lines.append(f"  {FIGURES[name].label.lower():<28}{value:.4g} {FIGURES[name].unit}".rstrip())
    for name in ("pitch", "energy"):
        if name in found.view.values:
            lines.append(f"  {name:<8}{_spark(found.view.values[name].tolist())}")
    return "\n".join(lines)


def _spark(values: list[float]) -> str:
    """A curve as blocks, a blank where no value is: each character the mean of its stretch."""
    stretch = max(1, math.ceil(len(values) / WIDTH))
    means = [_mean(values[start : start + stretch]) for start in range(0, len(values), stretch)]
    there = [mean for mean in means if mean is not None]
    if not there:
        return "no value"
    low, high = min(there), max(there)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    marks = "".join(" " if mean is None else BLOCKS[round((mean - low) * scale)] for mean in means)
    return f"{marks}  {low:.4g} to {high:.4g}"


def _mean(values: Iterable[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _end(end: float | None) -> str:
    return "its end" if end is None else f"{end:g} s"
