"""The vocoder, which turns log-mels into sound.

`train` runs again with the same folder to go on after a stop. On several GPUs:
torchrun --nproc-per-node N --no-python f2v vocoder train ..."""

from __future__ import annotations

import argparse
import os

from cli.options import add_config_options


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="vocoder", required=True)
    train = commands.add_parser("train", help="train on the sound and mels of a dataset's packed shards")
    train.add_argument("dataset")
    train.add_argument("run", help="folder for checkpoints and TensorBoard events, or a bucket's (s3://bucket/prefix)")
    train.add_argument("--size", choices=["paper", "tiny"], help="network size (default: paper)")
    train.add_argument("--steps", type=int, help="optimiser steps in all")
    add_config_options(train, "optimiser.lr=1e-4")


def run(args: argparse.Namespace) -> int:
    from model.vocoder.train import train_vocoder
    from model.vocoder.train_config import vocoder_config

    named = (("size", args.size), ("steps", args.steps))
    overrides = [*args.set, *(f"{key}={value}" for key, value in named if value is not None)]
    result = train_vocoder(args.dataset, args.run, vocoder_config(args.config, overrides))
    if os.environ.get("RANK", "0") == "0":  # one process of a run speaks for all
        print(*result.lines(), sep="\n")
    return 0
