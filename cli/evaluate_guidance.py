"""Evaluate a checkpoint at several guidance scales and step counts: the paper's Table 5 as one command."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.evaluation_options import add_measuring_options, add_sampling_options, finish, measuring

SCALES = "0,0.5,0.7,1,2,4"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint file, or a training run's folder")
    parser.add_argument("--dataset", required=True, help="whose clips it speaks for; path, s3:// or gs://")
    parser.add_argument("--split", default="valid", help="of the dataset (default: valid, as in the paper)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for everything")
    parser.add_argument("--scales", default=SCALES, help=f"guidance scales (default: {SCALES}, the paper's)")
    parser.add_argument("--steps", default="10", help="Euler step counts, e.g. 4,10,50 (default: 10)")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    add_measuring_options(parser)
    add_sampling_options(parser, swept=True)


def run(args: argparse.Namespace) -> int:
    from model.baselines.baseline import Regression
    from model.evaluation.quoted import TABLE_5
    from model.evaluation.split_clips import SplitClips
    from model.evaluation.sweeps import report, sweep_guidance
    from model.evaluation.tables import json_text
    from model.synthesis import Sampling, Synthesizer
    from shards.errors import UserError

    try:
        scales = [float(word) for word in args.scales.split(",")]
        steps = [int(word) for word in args.steps.split(",")]
    except ValueError:
        raise UserError(f"--scales {args.scales} --steps {args.steps}: write numbers with commas between") from None
    if len({*scales}) < len(scales) or len({*steps}) < len(steps):
        raise UserError(f"--scales {args.scales} --steps {args.steps}: a number stands there twice")
    config = measuring(args)
    ways = [Sampling(count, scale, args.temperature, args.seed) for count in steps for scale in scales]
    clips = SplitClips(args.dataset, args.split, args.clips)
    synthesizer = Synthesizer(args.checkpoint, args.vocoder, args.lip_weights, args.device, ways[0])
    if isinstance(synthesizer.network, Regression):
        system = synthesizer.network.config.system
        raise UserError(f"{args.checkpoint}: {system} has no flow, so neither guidance nor steps change what it says")
    evaluations = sweep_guidance(synthesizer, clips, config, args.output, scales, steps, args.workers, args.cache)
    # What is swept is held against the usual way to speak, where that is among them.
    usual = [number for number, way in enumerate(ways) if (way.steps, way.guidance) == (10, 0.7)]
    baseline = evaluations[usual[0] if usual else 0].name
    text, tree = report(evaluations, args.output, TABLE_5, "sampling", baseline)
    print(json_text(tree) if args.json else f"{text}\n{args.output}: table.md, sweep.json")
    return finish(evaluations)
