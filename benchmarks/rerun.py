"""What a narrow rerun costs: `energy` and `pitch` redone on a dataset of a few hundred clips, against its full build.

    python benchmarks/rerun.py --clips 300 --json rerun.json

All times are wall clock of the same command that a user runs, with Ray's start and stop, on one machine in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.synthetic.corpus import write_corpus
from shards.dataset import Dataset


def timed(*arguments: str) -> float:
    """Seconds that `f2v ARGUMENTS` takes."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "cli.main", *arguments], check=True, capture_output=True)
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--source", type=Path, help="use these clips instead of synthetic ones")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = args.source or Path(folder, "corpus")
        if not args.source:
            write_corpus(source, clips=args.clips, seed=1, workers=2)
        dataset = str(Path(folder, "dataset"))
        steps = {
            "full build": ["build", str(source), dataset, "--set", "pack.shard_clips=32"],
            "nothing to do": ["build", dataset],
            "energy again": ["build", dataset, "--only", "energy", "--set", "energy.kind=norm"],
            "pitch again": ["build", dataset, "--only", "pitch", "--set", "pitch.fmax=500"],
        }
        seconds = {name: timed(*command) for name, command in steps.items()}
        manifest = Dataset(dataset).manifest()
    packs = manifest.packs.values()
    facts = {
        "clips": sum(pack.clips for pack in packs),
        "hours": sum(pack.frames for pack in packs) / 25 / 3600,
        "packed_bytes": sum(pack.bytes for pack in packs),
        "cpus": os.cpu_count(),
        "seconds": seconds,
        "share": {name: value / seconds["full build"] for name, value in seconds.items()},
        "worker_seconds": {stage: sum(ref.seconds for ref in row.values()) for stage, row in manifest.columns.items()},
    }
    facts["worker_seconds"]["pack"] = sum(pack.seconds for pack in packs)
    print(f"{facts['clips']} clips, {facts['packed_bytes'] / 1e6:.0f} MB packed, {facts['cpus']} processors")
    for name, value in seconds.items():
        print(f"  {name:<14}{value:>8.1f} s{facts['share'][name]:>8.1%}")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
