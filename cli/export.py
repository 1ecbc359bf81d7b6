"""Write plain WebDataset tars with chosen fields, for others."""

from __future__ import annotations

import argparse

from pipeline.words import count, size


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset")
    parser.add_argument("target", help="new or empty place; path, s3:// or gs://")
    parser.add_argument("--fields", required=True, help="comma-separated, e.g. meta,lips,wav")
    parser.add_argument("--split", action="append", default=[], help="only this split; repeatable")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from shards.export import export

    listing = export(
        args.dataset, args.target, [name.strip() for name in args.fields.split(",") if name.strip()], args.split
    )
    if args.json:
        print(listing.model_dump_json())
        return 0
    tars, clips = count(len(listing.shards), "tar"), count(sum(shard.clips for shard in listing.shards), "clip")
    total = size(sum(shard.bytes for shard in listing.shards))
    print(f"{args.target}: {tars}, {clips}, {total}; fields {', '.join(listing.fields)}")
    return 0
