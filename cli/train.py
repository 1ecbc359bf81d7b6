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
    if os.environ.get("RANK", "0") != "0":
        return 0  # one process of a run speaks for all
    if result.first != result.first and result.stopped:
        print(f"{result.folder}: stopped at step {result.step}, before a step was done")
        return 0
    if result.first != result.first:
        print(f"{result.folder}: at step {result.step} already; give more --steps to go on")
        return 0
    print(f"step {result.step}: loss {result.first:.3f} -> {result.last:.3f}; checkpoints in {result.folder}")
    if result.stopped:
        print("stopped early; the same command goes on from the last checkpoint")
    return 0
