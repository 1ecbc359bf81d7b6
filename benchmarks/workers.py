"""How a build gains from a second worker: the same clips with one and with two, as whole commands.

    python -m benchmarks.workers --clips 120 --json workers.json

Wall clock of `f2v build` into an empty folder, with Ray's start and stop and the fit of the centroids.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.rerun import timed
from pipeline.synthetic.corpus import write_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--source", type=Path, help="use these clips instead of synthetic ones")
    parser.add_argument("--set", action="append", default=[], help="as of `f2v build`")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    options = [word for pair in ("pack.shard_clips=8", *args.set) for word in ("--set", pair)]
    with tempfile.TemporaryDirectory() as folder:
        source = args.source or Path(folder, "corpus")
        if not args.source:
            write_corpus(source, clips=args.clips, seed=1, workers=2)
        # Compiled loops and files in the page cache are there for both.
        timed("build", str(source), str(Path(folder, "warm")), *options, "--shards", "0")
        seconds = {
            workers: timed(
                "build", str(source), str(Path(folder, f"by{workers}")), *options, "--set", f"run.cpus={workers}"
            )
            for workers in (1, 2)
        }
    gain = seconds[1] / seconds[2]
    print(f"one worker {seconds[1]:.1f} s, two workers {seconds[2]:.1f} s: {gain:.2f} times")
    if args.json:
        args.json.write_text(json.dumps({"seconds": seconds, "gain": gain, "clips": args.clips}, indent=1))


if __name__ == "__main__":
    main()
