"""Fit centroids of speech units on a folder of audio, or take them from a file of fairseq."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cli.options import add_config_options, duration
from pipeline.words import count, printable

if TYPE_CHECKING:
    from pipeline.fit_units import FitReport
    from pipeline.units import CodebookReport

LISTED = 20
"""Skipped files that are named."""


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="units", required=True, metavar="fit|import")
    fit = commands.add_parser("fit", help="mini-batch k-means on a folder of audio, e.g. LJ Speech")
    formats = "wav, flac, ogg, opus, mp3, aiff, au, w64, m4a, mp4, mov, webm, mkv or mka"
    fit.add_argument("source", type=Path, help=f"folder of audio ({formats} files), or LJ Speech's own layout")
    fit.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.npy")
    fit.add_argument("--profile", choices=["offline", "paper"], help="whose encoder, layer and number of clusters")
    fit.add_argument("--weights", type=Path, metavar="DIR", help="folder with the paper profile's checkpoints")
    fit.add_argument("--fraction", type=float, default=0.1, help="part of the recordings to use (default: 0.1)")
    fit.add_argument(
        "--frames", type=int, default=1_000_000, help="most frames (50 a second) to hold (default: 1,000,000)"
    )
    add_config_options(fit, "speech.clusters=1000")
    taken = commands.add_parser(
        "import", help="centroids of a k-means that joblib pickled (unpickles numbers; runs nothing that is in it)"
    )
    taken.add_argument("file", type=Path, help="e.g. km.bin, lj_speech.km")
    taken.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.npy")
    for command in (fit, taken):
        command.add_argument("--force", action="store_true", help="replace FILE.npy where it is there")
        command.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    return _fit(args) if args.units == "fit" else _import(args)


def _fit(args: argparse.Namespace) -> int:
    from pipeline.config import BuildConfig
    from pipeline.fit_units import fit_units
    from shards.config import load_config
    from shards.errors import UserError

    if not 0 < args.fraction <= 1:
        raise UserError(f"--fraction {args.fraction:g}: give a number above 0 and up to 1")
    if args.frames < 1:
        raise UserError(f"--frames {args.frames}: give a positive number")
    named = (("profile", args.profile), ("run.weights", args.weights))
    overrides = [*args.set, *(f"{key}={value}" for key, value in named if value is not None)]
    config = load_config(BuildConfig, args.config, overrides)
    report = fit_units(
        args.source, args.output, config.speech, config.run.weights, args.fraction, args.frames, args.force
    )
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        print(*_sound(report), _line(report), f"{args.output} (use it: {_use(args.output, report.clusters)})", sep="\n")
    return 0


def _sound(report: FitReport) -> list[str]:
    """What was taken and what was not."""
    drawn = f"{count(report.drawn, 'file')} of {report.found} drawn"
    lines = [f"{drawn}: {report.taken} taken ({duration(report.seconds)} of sound), {len(report.skipped)} skipped"]
    lines += [printable(f"  {name}: {why}") for name, why in list(report.skipped.items())[:LISTED]]
    more = len(report.skipped) - LISTED
    return [*lines, f"  and {more} more (--json lists all)"] if more > 0 else lines


def _line(report: CodebookReport) -> str:
    explained = 1 - report.inertia / report.variance if report.variance else 0.0
    return (
        f"{report.clusters} clusters on {report.frames} frames: inertia {report.inertia:.4g} a frame "
        f"({100 * explained:.0f} % of the variance explained), {report.dead} dead, "
        f"usage {report.perplexity:.0f} of {report.clusters} (perplexity)"
    )


def _import(args: argparse.Namespace) -> int:
    import hashlib

    from pipeline.joblib_file import read_kmeans
    from pipeline.units import check_output, write_codebook

    check_output(args.output, args.force)
    centroids = read_kmeans(args.file)
    write_codebook(args.output, centroids)
    digest = hashlib.sha256(args.output.read_bytes()).hexdigest()
    if args.json:
        tree = {"clusters": len(centroids), "width": centroids.shape[1], "sha256": digest, "output": str(args.output)}
        print(json.dumps(tree))
        return 0
    print(f"unpickled {args.file}: {len(centroids)} centroids of {centroids.shape[1]} numbers; nothing in it was run")
    print(f"{args.output}, sha256 {digest[:12]} (use it: {_use(args.output, len(centroids))})")
    return 0


def _use(output: Path, clusters: int) -> str:
    """The options of a build with these centroids, as a shell takes them."""
    return f"--set {shlex.quote(f'speech.centroids={output}')} --set speech.clusters={clusters}"
