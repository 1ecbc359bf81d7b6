"""Write a synthetic corpus of talking faces: portraits that speak GRID-like sentences with the voices of espeak-ng.

The same options give the same clips on any number of workers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where SPLIT/SPEAKER/SENTENCE.mp4 and .txt go")
    parser.add_argument("--clips", type=int, default=100, help="all clips together (default: 100)")
    parser.add_argument("--voices", type=int, default=4, help="speakers that all splits share (default: 4)")
    parser.add_argument(
        "--held-out-voices", type=int, default=0, metavar="N", help="further speakers, in test alone (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of texts, voices and looks (default: 0)")
    parser.add_argument("--size", type=int, default=192, help="width and height in pixels (default: 192)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")


def run(args: argparse.Namespace) -> int:
    from pipeline.synthetic.corpus import write_corpus
    from pipeline.words import count

    def progress(done: int, clips: int) -> None:
        if sys.stderr.isatty() or done == clips:
            print(f"\r{done}/{clips} clips", end="\n" if done == clips else "", file=sys.stderr, flush=True)

    paths = write_corpus(
        args.folder, args.clips, args.voices, args.seed, args.size, args.workers, progress, args.held_out_voices
    )
    print(f"{count(len(paths), 'clip')} in {args.folder}")
    return 0
