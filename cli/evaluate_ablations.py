"""Train the model without each of its parts, evaluate all on the same clips: the paper's Table 4 as one command.

Runs that are in OUT already are taken as they are; those that were stopped go on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cli.evaluation_options import add_measuring_options, add_sampling_options, finish, measuring, sampling
from cli.options import add_config_options


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset")
    parser.add_argument("output", type=Path, metavar="OUT", help="a folder per run, its log, and the tables")
    parser.add_argument("--only", metavar="LIST", help="beside full, e.g. hier,timbre,prosody,face_id,fe,ws,mp")
    parser.add_argument("--split", default="test", help="to evaluate on (default: test)")
    parser.add_argument("--no-train", action="store_true", help="evaluate the runs that are in OUT, train none")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="trainings at the same time (default: 1)")
    parser.add_argument("--size", choices=["paper", "tiny"], help="of the network (default: paper)")
    parser.add_argument("--train-steps", type=int, metavar="N", help="optimiser steps of each run")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    add_config_options(parser, "optimiser.lr=2e-4")
    add_measuring_options(parser, settings=False)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    from model.evaluation.quoted import LABELS, TABLE_4
    from model.evaluation.split_clips import SplitClips
    from model.evaluation.spoken import REFERENCE, evaluate_checkpoint
    from model.evaluation.sweeps import EVALUATED, ablation_runs, check_runs, has_run, report, train_runs
    from model.evaluation.tables import json_text, write
    from model.synthesis import Synthesizer
    from model.train_config import train_config
    from shards.errors import UserError

    names = ablation_runs(args.only.split(",") if args.only else ())
    config, how = measuring(args), sampling(args)
    clips = SplitClips(args.dataset, args.split, args.clips)
    if args.no_train:
        absent = [name for name in names if not has_run(args.output, name)]
        if "full" in absent:
            raise UserError(f"{args.output / 'full'}: no checkpoint, and --no-train; the others are held against it")
        if absent and args.only:
            raise UserError(f"{args.output / absent[0]}: no checkpoint, and --no-train; leave it out of --only")
        names = [name for name in names if name not in absent]
    else:
        options = [*args.set, *([f"size={args.size}"] if args.size else [])]
        options += [f"steps={args.train_steps}"] if args.train_steps is not None else []
        trained = train_config(args.config, options)
        if args.parallel < 1:
            raise UserError(f"--parallel {args.parallel}: give a positive number")
        fixed = [name for name in LABELS if trained.model.get(name, True) is not True]
        if fixed:
            raise UserError(f"model.{fixed[0]}: is set; leave it out, for the runs differ in it")
        train = [sys.executable, "-m", "cli.main", "train", args.dataset]
        train += ["--config", str(args.config)] if args.config else []
        train += [word for option in options for word in ("--set", option)]
        commands = {
            name: [*train, str(args.output / name), *(["--set", f"model.{name}=false"] if name != "full" else [])]
            for name in names
        }
        train_runs(commands, args.output, trained.steps, trained.minutes is not None, args.parallel)
    notes = check_runs(args.output, names)
    evaluations = []
    for name in names:
        synthesizer = Synthesizer(args.output / name, args.vocoder, args.lip_weights, args.device, how)
        folder = args.output / EVALUATED / name
        evaluation = evaluate_checkpoint(
            synthesizer,
            clips,
            config,
            folder,
            LABELS[name],
            args.workers,
            args.cache,
            args.output / REFERENCE,
        )
        write(evaluation, folder)
        evaluations.append(evaluation)
    text, tree = report(evaluations, args.output, TABLE_4, "model", LABELS["full"], notes)
    print(json_text(tree) if args.json else f"{text}\n{args.output}: table.md, sweep.json")
    return finish(evaluations)
