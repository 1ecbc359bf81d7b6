"""Reduce a public checkpoint to the tensors that are used."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path

from pipeline.words import size
from shards.storage import is_remote


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="weights", required=True, metavar="convert")
    convert = commands.add_parser(
        "convert", help="video path of an AV-HuBERT checkpoint of fairseq as safetensors (runs nothing that is in it)"
    )
    convert.add_argument("source", type=Path, metavar="IN", help="e.g. large_vox_iter5.pt")
    convert.add_argument("output", metavar="OUT.safetensors", help="path, s3:// or gs://; replaced where it is there")
    convert.add_argument("--half", action="store_true", help="matrices in float16, half the size; vectors stay float32")
    convert.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from model.lip_weights import convert

    made = convert(args.source, args.output, args.half)
    if args.json:
        print(json.dumps(asdict(made)))
        return 0
    print(f"{args.source}: AV-HuBERT, video path, {made.layers} layers of {made.dim}; nothing in the file was run")
    print(f"{made.tensors} tensors, {made.parameters:,} parameters, {size(made.bytes)}")
    print(f"{made.output}, sha256 {made.sha256}")
    if is_remote(made.output):
        print("training reads it from a path: copy it there")
    else:
        print(f"use it: --set {shlex.quote(f'lip_weights={made.output}')}")
    return 0
