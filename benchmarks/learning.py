"""Does the model learn to speak? Corpus, dataset, training runs, evaluation and report in one go.

    python -m benchmarks.learning FOLDER
    python -m benchmarks.learning FOLDER --config benchmarks/learning.yaml --minutes 40

Parts: `f2v corpus`, `f2v build`, words of the corpus itself (`floors.json`), then for every run of the YAML file `f2v
train` and `benchmarks.learning_eval`, and last `report.md` with `curves.png`. A part whose result is there already is
skipped; delete the result to have it made again. A run that was stopped goes on, with the minutes that were left to it.
All runs have the same budget.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from model import checkpoint
from shards.config import merge
from shards.errors import UserError

CONFIG = Path(__file__).with_name("learning.yaml")
CURVES = ("loss", "unit_accuracy", "content", "pitch", "energy", "timbre", "cfm", "prior")
"""Scalars that are drawn, where a run logged them."""
GROUPS = ("known voices", "held-out voices")
ROWS = {
    "unit accuracy": ("unit_accuracy", "constant", "speaker"),
    "pitch, standardised, MAE": ("pitch_mae", "constant", "clip"),
    "pitch of the speech, Hz, RMSE": ("pitch_rmse_hz", "constant", "clip"),
    "voicing error": ("voicing_error",),
    "energy MAE": ("energy_mae", "constant", "clip"),
    "timbre MAE": ("timbre_mae", "constant"),
    "timbre, cosine without the mean": ("timbre_centred_cosine",),
    "log-mel L1": ("mel_l1", "constant", "clip"),
}
"""Row of the report -> figure of the evaluation, then the baselines that belong to it."""


def f2v(arguments: Sequence[object], log: Path) -> float:
    """Run one command of ours with its output in `log`; returns the seconds it took.

    Raises:
        UserError: it failed.
    """
    return _execute([sys.executable, "-m", "cli.main", *map(str, arguments)], log)


def _execute(command: list[str], log: Path) -> float:
    begin = time.monotonic()
    with open(log, "a", encoding="utf-8") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise UserError(f"{' '.join(command[2:4])} ended with status {code}; see {log}")
    return time.monotonic() - begin


def make_dataset(folder: Path, plan: dict[str, Any]) -> Path:
    """The corpus and its shards; returns the dataset."""
    corpus, dataset = folder / "corpus", folder / "ds"
    if not _done(folder / "corpus.json"):
        options = [f"--{name.replace('_', '-')}={value}" for name, value in plan["corpus"].items()]
        seconds = f2v(["corpus", corpus, *options, f"--workers={os.cpu_count() or 1}"], folder / "corpus.log")
        _write(folder / "corpus.json", {"seconds": seconds, **plan["corpus"]})
    if not _done(folder / "build.json"):
        (folder / "build.yaml").write_text(yaml.safe_dump(plan["build"]), encoding="utf-8")
        seconds = f2v(["build", corpus, dataset, "--config", folder / "build.yaml"], folder / "build.log")
        _write(folder / "build.json", {"seconds": seconds})
    return dataset


def train_run(folder: Path, name: str, dataset: Path, settings: dict[str, Any]) -> None:
    """Train one run within its minutes, those of earlier attempts included."""
    if _done(folder / f"{name}.train.json"):
        return
    spent_file = folder / f"{name}.spent.json"
    spent = float(json.loads(spent_file.read_text())["seconds"]) if spent_file.exists() else 0.0
    if settings.get("minutes"):
        settings = settings | {"minutes": max(0.1, settings["minutes"] - spent / 60)}
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    begin = time.monotonic()
    try:
        f2v(["train", dataset, folder / name, "--config", config], folder / f"{name}.log")
    except BaseException:
        _write(spent_file, {"seconds": spent + time.monotonic() - begin})
        raise
    seconds = spent + time.monotonic() - begin
    if not settings.get("minutes") and checkpoint.load(folder / name).step < settings["steps"]:
        _write(spent_file, {"seconds": seconds})
        raise UserError(f"{name}: stopped before its last step; run this again to go on")
    _write(folder / f"{name}.train.json", {"seconds": seconds})


def evaluate(folder: Path, dataset: Path, out: Path, run: Path | None, synthesis: dict[str, Any], threads: int) -> None:
    """`benchmarks.learning_eval` in a process of its own."""
    if _done(out):
        return
    options = [f"--{name}={value}" for name, value in synthesis.items()] + [f"--threads={threads}"]
    options += [f"--run={run}"] if run else []
    command = [sys.executable, "-m", "benchmarks.learning_eval", str(dataset), f"--out={out}", *options]
    _execute(command, folder / "evaluation.log")


def read_curves(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Tag -> steps and values of every scalar in a run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        scalars = events.Scalars(tag)
        found[tag] = [scalar.step for scalar in scalars], [scalar.value for scalar in scalars]
    return found


def draw_curves(runs: dict[str, Path], out: Path) -> None:
    """One panel per scalar, a colour per run; training lines thin, validation with dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {name: read_curves(run) for name, run in runs.items()}
    drawn = [name for name in CURVES if any(f"train/{name}" in tags for tags in curves.values())]
    figure, axes = pyplot.subplots(-(-len(drawn) // 4), 4, figsize=(16, 3.2 * -(-len(drawn) // 4)), squeeze=False)
    for panel, scalar in zip(axes.flat, drawn, strict=False):
        for colour, (name, tags) in enumerate(curves.items()):
            for part, style in (("train", "-"), ("valid", "o--")):
                if f"{part}/{scalar}" in tags:
                    steps, values = tags[f"{part}/{scalar}"]
                    panel.plot(steps, values, style, color=f"C{colour}", label=f"{name} {part}", lw=1, ms=3)
        panel.set_title(scalar)
        panel.set_xlabel("step")
        panel.legend(fontsize=7)
    for panel in axes.flat[len(drawn) :]:
        panel.axis("off")
    figure.tight_layout()
    figure.savefig(out, dpi=90)
    pyplot.close(figure)


def report(floors: dict[str, Any], runs: dict[str, dict[str, Any]], training: dict[str, dict[str, Any]]) -> str:
    """Markdown tables: runs beside each other, baselines, and words."""
    lines = ["| run | steps | minutes |", "|---|---|---|"]
    lines += [f"| {name} | {found['step']} | {training[name]['seconds'] / 60:.1f} |" for name, found in runs.items()]
    for group in GROUPS:
        figures = {name: found["groups"].get(group, {}) for name, found in runs.items()}
        first = next(iter(figures.values()))
        if not first:
            continue
        clips = first["unit_accuracy"]["clips"]
        lines += ["", f"### {group.capitalize()}, {clips} clips", ""]
        lines += [f"| figure | {' | '.join(runs)} | constant of the corpus | of the speaker | of the clip |"]
        lines += ["|---|" + "---|" * (len(runs) + 3)]
        for row, (name, *baselines) in ROWS.items():
            cells = [_cell(of.get(name)) for of in figures.values()]
            cells += [_cell(first.get(f"{name}_{kind}") if kind in baselines else None) for kind in _BASELINES]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        own = floors["groups"][group]
        lines += ["", f"| words | original sound | Griffin-Lim of the true mel | {' | '.join(runs)} |"]
        lines += ["|---|" + "---|" * (len(runs) + 2)]
        for decoding in ("prompt", "closed", "plain"):
            for kind in ("wer", "wer_without_letter", "cer"):
                cells = [_cell(own.get(f"{kind}_{source}_{decoding}")) for source in ("original", "resynthesis")]
                cells += [_cell(of.get(f"{kind}_speech_{decoding}")) for of in figures.values()]
                lines.append(f"| {kind.replace('_', ' ')}, {decoding} | {' | '.join(cells)} |")
    lines += ["", "Word error rate against the sentences of other clips, so by chance (decoding with prompt): "]
    chances = {"original sound": floors["chance"].get("wer_original_prompt")}
    chances |= {name: found["chance"].get("wer_speech_prompt") for name, found in runs.items()}
    lines[-1] += ", ".join(f"{name} {value:.2f}" for name, value in chances.items() if value is not None) + "."
    return "\n".join(lines) + "\n"


_BASELINES = ("constant", "speaker", "clip")


def _cell(figure: dict[str, float] | None) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" if figure else ""


def _done(path: Path) -> bool:
    print(f"{'have' if path.exists() else 'make'} {path}", flush=True)
    return path.exists()


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML file (default: learning.yaml beside this)")
    parser.add_argument("--minutes", type=float, help="of training, each run")
    parser.add_argument("--steps", type=int, help="optimiser steps, each run")
    parser.add_argument("--dataset", type=Path, help="a dataset that is there already, in place of corpus and build")
    parser.add_argument("--runs", nargs="+", help="these runs alone")
    parser.add_argument("--threads", type=int, default=1, help="of an evaluation")
    parser.add_argument("--side-by-side", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    args = parser.parse_args()
    plan = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    budget = {key: getattr(args, key) for key in ("minutes", "steps") if getattr(args, key) is not None}
    names = args.runs or list(plan["runs"])
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        dataset = args.dataset or make_dataset(args.folder, plan)

        def run(name: str) -> None:
            train_run(args.folder, name, dataset, merge(plan["train"], plan["runs"][name]) | budget)
            out = args.folder / f"{name}.json"
            evaluate(args.folder, dataset, out, args.folder / name, plan["synthesis"], args.threads)

        with ThreadPoolExecutor(args.side_by_side) as pool:
            list(pool.map(run, names))
        floors = args.folder / "floors.json"
        evaluate(args.folder, dataset, floors, None, {}, args.threads)
    except UserError as error:
        print(f"learning: {error}", file=sys.stderr)
        return 2
    draw_curves({name: args.folder / name for name in names}, args.folder / "curves.png")
    found = {name: json.loads((args.folder / f"{name}.json").read_text()) for name in names}
    training = {name: json.loads((args.folder / f"{name}.train.json").read_text()) for name in names}
    text = report(json.loads(floors.read_text()), found, training)
    (args.folder / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
