"""Our system beside SVTS, Intelligible and a V2SFlow-style one, each trained on the same synthetic corpus.

    python -m benchmarks.systems FOLDER
    python -m benchmarks.systems FOLDER --dataset DATASET --systems svts ours

Parts: corpus and dataset, `f2v vocoder train`, `f2v train` for every system of the YAML file, `f2v evaluate
--checkpoint` for each with Griffin-Lim and for the last one with the vocoder as well, the true mels spoken by both, and
then all of them on the same clips with `f2v evaluate compare`. A part whose result is there already is skipped; delete
the result to have it made again. Whisper is told 25 other sentences of the corpus' grammar (see
`benchmarks.learning_words`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning import f2v, make_dataset, train_run
from benchmarks.learning_words import prompt
from model.evaluation.split_clips import SplitClips
from model.synthesize import write_wav
from model.vocoder.load import load_vocoder
from shards.config import merge
from shards.errors import UserError

CONFIG = Path(__file__).with_name("systems.yaml")
SPLIT = "test"


def copy_synthesis(dataset: str, vocoder: Path | None, out: Path, count: int | None) -> None:
    """The true mels of the split spoken by a vocoder (None: Griffin-Lim), as OUT/KEY.wav."""
    clips = SplitClips(dataset, SPLIT, count)
    speak = load_vocoder(vocoder, clips.recipes["mel"].settings["filterbank"])
    for key in clips.keys:
        path = out / f"{key}.wav"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            clip = clips.read(key)
            write_wav(path, speak({name: clip[name] for name in speak.needs}))


def measure(folder: Path, dataset: str, names: list[str], vocoder: Path, count: int | None) -> None:
    """Figures of every system by itself, in `evaluated/NAME`, and of all together, in `compared`."""
    settings = folder / "measure.yaml"
    settings.write_text(yaml.safe_dump({"whisper_prompt": prompt()}), encoding="utf-8")
    done = folder / "evaluated"
    log = folder / "evaluation.log"
    shared = ["--config", settings, "--cache", folder / "cache"]
    speak: dict[str, tuple[str, Path | None]] = {name: (name, None) for name in names[:-1]}
    speak[f"{names[-1]}-hifi-gan"] = names[-1], vocoder
    speak[names[-1]] = names[-1], None
    for name, (run, place) in speak.items():
        speech = ["--checkpoint", folder / run, "--dataset", dataset, "--split", SPLIT]
        speech += ["--clips", count] if count else []
        speech += ["--vocoder", place] if place else []
        f2v(["evaluate", *speech, "-o", done / name, "--name", name, *shared], log)
    copies = {"griffin-lim-copy": None, "hifi-gan-copy": vocoder}
    for name, place in copies.items():
        copy_synthesis(dataset, place, done / name / "speech", count)
    systems = [f"{name}={done / name / 'speech'}" for name in (*copies, *speak)]
    compare = ["evaluate", "compare", f"gt={done / names[-1] / 'reference'}", *systems, "-o", folder / "compared"]
    f2v([*compare, *shared], log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML file (default: systems.yaml beside this)")
    parser.add_argument("--dataset", type=Path, help="a dataset that is there already, in place of corpus and build")
    parser.add_argument("--systems", nargs="+", help="these alone")
    parser.add_argument("--vocoder", type=Path, help="a trained vocoder, in place of one of its own")
    parser.add_argument("--clips", type=int, help="so many of the test split, always the same ones (default: all)")
    parser.add_argument("--side-by-side", type=int, default=os.cpu_count() or 1, help="trainings at the same time")
    args = parser.parse_args()
    plan: dict[str, Any] = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    names = args.systems or list(plan["runs"])
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        dataset = args.dataset or make_dataset(args.folder, plan)
        vocoder = args.vocoder or args.folder / "vocoder"

        def train(name: str) -> None:
            if name in plan["runs"]:
                train_run(args.folder, name, dataset, merge(plan["train"], plan["runs"][name]))
            elif not args.vocoder and not (args.folder / "vocoder.train.json").exists():
                config = args.folder / "vocoder.yaml"
                config.write_text(yaml.safe_dump(plan["vocoder"]), encoding="utf-8")
                command = ["vocoder", "train", dataset, vocoder, "--config", config]
                seconds = f2v(command, args.folder / "vocoder.log")
                (args.folder / "vocoder.train.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")

        with ThreadPoolExecutor(args.side_by_side) as pool:
            list(pool.map(train, ["vocoder", *names]))
        measure(args.folder, str(dataset), names, vocoder, args.clips)
    except (UserError, subprocess.SubprocessError) as error:
        print(f"systems: {error}", file=sys.stderr)
        return 2
    print((args.folder / "compared" / "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
