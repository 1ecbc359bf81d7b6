"""Speak for a silent video: writes the video with sound, and the sound as wav beside it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="out.mp4 (and out.wav beside it), or out.wav")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint file, or a training run's folder")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps (default: 10)")
    parser.add_argument("--guidance", type=float, default=0.7, help="classifier-free guidance scale (default: 0.7)")
    parser.add_argument("--temperature", type=float, default=1.0, help="scale of the first noise (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lip-weights", type=Path, help="AV-HuBERT file (default: where training had it)")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from model.synthesize import synthesize

    spoken = synthesize(
        args.video,
        args.checkpoint,
        args.output,
        args.steps,
        args.guidance,
        args.temperature,
        args.seed,
        args.lip_weights,
    )
    if args.json:
        print(json.dumps(asdict(spoken), default=str))
        return 0
    names = " and ".join(str(path) for path in (spoken.video, spoken.wav) if path)
    print(f"{names}: {spoken.seconds:.2f} s of speech (step {spoken.step}, {spoken.vocoder})")
    return 0
