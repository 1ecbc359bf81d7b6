"""Speak for silent videos: one, a folder of them, or a list. Writes speech as wav, or the video with it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    from model.synthesize import Job


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="video, folder of videos, CSV/Parquet table (uri, key, start, end), or .txt with a path a line"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="for one video out.mp4 (and out.wav beside it) or out.wav; for many a folder",
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint file, or a training run's folder")
    parser.add_argument("--vocoder", help="vocoder's training run, checkpoint or public file (default: Griffin-Lim)")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps (default: 10)")
    parser.add_argument("--guidance", type=float, default=0.7, help="classifier-free guidance scale (default: 0.7)")
    parser.add_argument("--temperature", type=float, default=1.0, help="scale of the first noise (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, together with the clip (default: 0)")
    parser.add_argument("--track", type=int, metavar="N", help="the face that speaks, 1 for the leftmost")
    parser.add_argument(
        "--save", metavar="NAMES", help="write units,pitch,energy,timbre,mel (or some) to a .npz beside"
    )
    parser.add_argument("--lip-weights", type=Path, help="AV-HuBERT file (default: where training had it)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N, of the model (default: auto)")
    parser.add_argument("--threads", type=int, default=1, help="of each process; may change last digits (default: 1)")
    many = parser.add_argument_group("many videos")
    many.add_argument("--format", choices=["wav", "mp4"], help="what to write (default: wav)")
    many.add_argument("--force", action="store_true", help="make anew what is there already")
    many.add_argument("--workers", type=int, metavar="N", help="processes on Ray (default: this process alone)")
    many.add_argument("--gpus", type=float, metavar="SHARE", help="of a GPU for each worker (default: 0)")
    many.add_argument("--ray-address", metavar="ADDRESS", help="use this Ray cluster instead of starting Ray here")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from model.synthesis import Sampling
    from model.synthesize import Job

    job = Job(
        args.checkpoint,
        Sampling(args.steps, args.guidance, args.temperature, args.seed),
        args.vocoder,
        args.lip_weights,
        args.device,
        args.threads,
        args.track,
        tuple(name.strip() for name in args.save.split(",")) if args.save else (),
    )
    from model.speech_list import is_many

    return _many(args, job) if is_many(args.source) else _one(args, job)


def _one(args: argparse.Namespace, job: Job) -> int:
    from model.synthesize import synthesize

    names = ("format", "force", "workers", "gpus", "ray_address")
    odd = [name for name in names if getattr(args, name) not in (None, False)]
    if odd:
        raise UserError(f"--{odd[0].replace('_', '-')}: is for a folder or a list, and {args.source} is one video")
    spoken = synthesize(args.source, args.output, job)
    if args.json:
        print(json.dumps(asdict(spoken), default=str))
        return 0
    written = " and ".join(str(path) for path in (spoken.video, spoken.wav, spoken.predictions) if path)
    print(f"{written}: {spoken.seconds:.2f} s of speech (step {spoken.step}, {spoken.vocoder})")
    return 0


def _many(args: argparse.Namespace, job: Job) -> int:
    from model.speech_record import FAILED
    from model.synthesize import synthesize_many

    report = synthesize_many(
        args.source,
        args.output,
        job,
        args.format or "wav",
        args.force,
        args.workers or 0,
        args.gpus or 0.0,
        args.ray_address,
    )
    if args.json:
        print(json.dumps(asdict(report) | {"reasons": report.reasons}, default=str))
    else:
        seconds = sum(speech.seconds for speech in report.made)
        how = f" (step {report.made[0].step}, {report.made[0].vocoder})" if report.made else ""
        print(f"{report.output}: {len(report.made)} clips, {seconds:.2f} s of speech{how}; {report.kept} kept")
        if report.failed:
            reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
            print(f"{len(report.failed)} failed: {reasons}; see {report.output / FAILED}")
    return 1 if report.failed else 0
