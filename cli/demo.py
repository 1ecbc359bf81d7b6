"""The whole job on synthetic talking faces: build, verify, train a little, speak for a held-out clip."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from cli.options import duration


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    parser.add_argument("--source", type=Path, help="use these talking-face clips instead of the synthetic corpus")
    parser.add_argument("--clips", type=int, default=96, help="size of the synthetic corpus (default: 96)")
    parser.add_argument("--minutes", type=float, default=4.0, help="minutes of training (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus and of the speech (default: 0)")


def run(args: argparse.Namespace) -> int:
    from model.demo import demo

    begin = time.monotonic()
    tour = demo(args.folder, args.source, args.clips, args.minutes, args.seed)
    kind = "held-out clip" if tour.held_out else "clip (the source has no test split, so training has seen it)"
    rows = [
        ("source", tour.source),
        ("shards", f"{tour.dataset}/train"),
        ("training", f"{tour.training.folder} (step {tour.training.step}, TensorBoard events and checkpoints)"),
        ("loss", f"{tour.training.first:.3f} -> {tour.training.last:.3f}"),
        ("speech", f"{tour.speech.wav} and {tour.speech.video}: {kind}, {tour.text!r}, {tour.speech.vocoder}"),
        ("picture", f"{tour.picture}"),
    ]
    print(f"\ndone in {duration(time.monotonic() - begin)}")
    for name, text in rows:
        print(f"  {name:<10}{text}")
    return 0
