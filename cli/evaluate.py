"""Score generated speech beside its reference: two folders (or files), or a checkpoint on a dataset's split.

Exit status 1: clips without a partner, or that cannot be read; the others are scored. Also: f2v evaluate compare,
ablations, guidance, listen."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cli.evaluation_options import add_measuring_options, add_sampling_options, finish, measuring, sampling
from pipeline.words import printable

if TYPE_CHECKING:
    from model.evaluation.evaluate import Evaluation


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("generated", nargs="?", type=Path, help="folder of sound or video, or a file")
    parser.add_argument("reference", nargs="?", type=Path, help="the same paths below another folder, or a file")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint file, or a training run's folder")
    parser.add_argument("--dataset", help="whose clips the checkpoint speaks for; path, s3:// or gs://")
    parser.add_argument("--split", default="test", help="of the dataset (default: test)")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="folder for clips.csv, summary.json, table.md")
    parser.add_argument("--name", default="", help="of the system, in tables")
    parser.add_argument("--texts", type=Path, metavar="CSV", help="columns key and text (default: KEY.txt, or Whisper)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_measuring_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    from model.evaluation.tables import json_text, summary_json, table, terminal, write

    evaluation = _evaluate(args)
    evaluation.facts["command"] = shlex.join(sys.argv)
    if args.output:
        write(evaluation, args.output)
    if args.json:
        print(json_text(summary_json(evaluation)), end="")
    else:
        name = evaluation.name
        shown = table({name: evaluation.summary()}, {name: len(evaluation.clips)})
        print(*map(printable, terminal(evaluation)), "", shown, sep="\n")
    if args.output and not args.json:
        print(f"{args.output}: table.md, clips.csv, summary.json")
    return finish([evaluation])


def _evaluate(args: argparse.Namespace) -> Evaluation:
    from shards.errors import UserError

    folders, trained = (args.generated, args.reference), (args.checkpoint, args.dataset)
    if all(folders) == all(trained) or (any(folders) and any(trained)):
        raise UserError("give GENERATED and REFERENCE, or --checkpoint and --dataset")
    config = measuring(args)
    if all(folders):
        from model.evaluation.evaluate import evaluate_folders

        return evaluate_folders(*folders, config, args.name, args.workers, args.cache, args.texts, args.clips)
    if not args.output:
        raise UserError("-o OUT is missing: the folder that the speech goes to, too")
    if args.texts:
        raise UserError("--texts: the texts of a dataset are in its shards; leave it out")
    from model.evaluation.split_clips import SplitClips
    from model.evaluation.spoken import evaluate_checkpoint
    from model.synthesis import Synthesizer

    how = sampling(args)
    clips = SplitClips(args.dataset, args.split, args.clips)
    synthesizer = Synthesizer(args.checkpoint, args.vocoder, args.lip_weights, args.device, how)
    evaluation = evaluate_checkpoint(synthesizer, clips, config, args.output, args.name, args.workers, args.cache)
    evaluation.facts["checkpoint"] = str(args.checkpoint)
    return evaluation
