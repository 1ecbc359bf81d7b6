"""Train on a dataset's packed shards. Run it again with the same folder to go on after a stop.

On several GPUs: torchrun --nproc-per-node N --no-python f2v train ..."""

from __future__ import annotations

import argparse
import os

from cli.options import add_config_options


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset")
    parser.add_argument("run", help="folder for checkpoints and TensorBoard events, or a bucket's (s3://bucket/prefix)")
    parser.add_argument("--size", choices=["paper", "tiny"], help="network size (default: paper)")
    parser.add_argument("--steps", type=int, help="optimiser steps in all")
    add_config_options(parser, "optimiser.lr=2e-4")


def run(args: argparse.Namespace) -> int:
    from model.train import train
    from model.train_config import train_config

    overrides = list(args.set)
    for key in ("size", "steps"):
        if getattr(args, key) is not None:
            overrides.append(f"{key}={getattr(args, key)}")
    result = train(args.dataset, args.run, train_config(args.config, overrides))
    if os.environ.get("RANK", "0") == "0":  # one process of a run speaks for all
        print(*result.lines(), sep="\n")
    return 0
