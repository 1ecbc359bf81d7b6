"""Options that the evaluation commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.options import add_config_options

if TYPE_CHECKING:
    from model.evaluation.config import EvaluationConfig
    from model.evaluation.evaluate import Evaluation
    from model.synthesis import Sampling


def add_measuring_options(parser: argparse.ArgumentParser, settings: bool = True) -> None:
    """What is measured, on how many clips and by how many processes.

    Args:
        settings: whether `--config` and `--set` are for the metrics; a command that trains has them for training.
    """
    parser.add_argument("--clips", type=int, metavar="N", help="so many clips, always the same ones (default: all)")
    parser.add_argument(
        "--metrics", metavar="LIST", help="these alone, e.g. dnsmos,mos,pitch,energy,words,speaker,length"
    )
    parser.add_argument("--whisper", metavar="MODEL", help="for words: a CTranslate2 folder or name (default: tiny.en)")
    parser.add_argument("--utmos", type=Path, metavar="FILE", help="UTMOS weights (default: DistillMOS in its place)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: as many as cores; 1 with a GPU)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="known scores (default: in the user's cache)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    if settings:
        add_config_options(parser, "whisper=medium")
    else:
        parser.add_argument(
            "--measure", action="append", default=[], metavar="KEY=VALUE", help="override one key of the metrics"
        )


def add_sampling_options(parser: argparse.ArgumentParser, swept: bool = False) -> None:
    """How a checkpoint speaks.

    Args:
        swept: leave out steps and guidance, which the command goes through.
    """
    parser.add_argument("--vocoder", type=Path, help="run or file of a vocoder (default: Griffin-Lim)")
    if not swept:
        parser.add_argument("--steps", type=int, default=10, help="Euler steps (default: 10)")
        parser.add_argument("--guidance", type=float, default=0.7, help="classifier-free guidance scale (default: 0.7)")
    parser.add_argument("--temperature", type=float, default=1.0, help="scale of the first noise (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--lip-weights", type=Path, help="AV-HuBERT file (default: where training had it)")


def measuring(args: argparse.Namespace) -> EvaluationConfig:
    """Raises UserError: settings that cannot be."""
    from model.evaluation.config import EvaluationConfig
    from shards.config import load_config
    from shards.errors import UserError

    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: give a positive number")
    metrics = args.metrics.split(",") if args.metrics else None
    named: dict[str, Any] = {"metrics": metrics, "whisper": args.whisper, "utmos": args.utmos}
    if args.device != "auto":
        named["device"] = args.device
    base = {key: value for key, value in named.items() if value is not None}
    training = hasattr(args, "measure")
    path, overrides = (None, args.measure) if training else (args.config, args.set)
    return load_config(EvaluationConfig, path, overrides, base)


def sampling(args: argparse.Namespace) -> Sampling:
    """Raises UserError: a value out of range."""
    from model.synthesis import Sampling

    return Sampling(args.steps, args.guidance, args.temperature, args.seed)


def finish(evaluations: list[Evaluation]) -> int:
    """Exit status: 1 where a clip was not scored."""
    return int(any(evaluation.missing or evaluation.unreadable for evaluation in evaluations))
