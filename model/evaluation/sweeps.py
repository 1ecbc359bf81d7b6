"""Many evaluations on the same clips in one table: guidance scales and step counts (the paper's Table 5), and what each
part of the model is worth (its Table 4)."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model import checkpoint
from model.config import ModelConfig
from model.evaluation.bootstrap import paired
from model.evaluation.config import EvaluationConfig
from model.evaluation.evaluate import Evaluation
from model.evaluation.quoted import LABELS, PaperTable
from model.evaluation.scoring import Make
from model.evaluation.split_clips import SplitClips
from model.evaluation.spoken import REFERENCE, evaluate_checkpoint
from model.evaluation.tables import cell, details, differences, json_text, summary_json, table, write
from shards.config import load_config
from shards.errors import UserError, warn
from shards.progress import Progress
from shards.storage import open_store

if TYPE_CHECKING:
    from model.synthesis import Synthesizer

EVALUATED = "evaluated"
"""Folder below the one of a sweep that holds the single evaluations."""
TICK = 0.5


def sweep_guidance(
    synthesizer: Synthesizer,
    clips: SplitClips,
    config: EvaluationConfig,
    out: Path,
    scales: Sequence[float],
    steps: Sequence[int],
    workers: int | None = None,
    cache: Path | None = None,
    make: Make | None = None,
) -> list[Evaluation]:
    """An evaluation for every pair of step count and guidance scale, each with a folder of its own below `out`.

    Args:
        synthesizer: its sampling gives temperature and seed.
        others: see `evaluate_checkpoint`.
    """
    found = []
    for count in steps:
        for scale in scales:
            synthesizer.sampling = replace(synthesizer.sampling, steps=count, guidance=scale)
            name = f"guidance {scale:g}" + (f", {count} steps" if len(steps) > 1 else "")
            folder = out / EVALUATED / f"guidance-{scale:g}-steps-{count}"
            evaluation = evaluate_checkpoint(
                synthesizer, clips, config, folder, name, workers, cache, out / REFERENCE, make
            )
            write(evaluation, folder)
            found.append(evaluation)
    return found


def ablation_runs(only: Sequence[str] = ()) -> list[str]:
    """Names of the runs: `full`, then the switches of `ModelConfig` that the paper turns off, or those of `only`.

    Raises:
        UserError: no such switch.
    """
    unknown = [name for name in only if name not in LABELS]
    if unknown:
        raise UserError(f"no ablation {unknown[0]!r}; there are {', '.join(name for name in LABELS if name != 'full')}")
    return [name for name in LABELS if name == "full" or not only or name in only]


def check_switches(config: ModelConfig, name: str, where: str | Path) -> None:
    """A run is what its name says: of the switches that the paper turns off, its own is off, and no other.

    Args:
        name: of the run, as `ablation_runs` has it.
        where: for the message.

    Raises:
        UserError: it is another one.
    """
    off = [switch for switch in LABELS if switch != "full" and not getattr(config, switch)]
    if off != [name] * (name != "full"):
        said = f"has {', '.join(off)} off" if off else "has every part"
        should = "every part on" if name == "full" else f"{name} off and nothing else"
        raise UserError(f"{where}: the network {said}, and {name!r} means {should}; name the folder as it was trained")


def check_runs(out: Path, names: Sequence[str]) -> list[str]:
    """Look into the newest checkpoint of every run before any of them speaks.

    Returns:
        What sets a run apart from the first beside its switch, a line each: steps, dataset, network.

    Raises:
        UserError: a run that is another one than its folder's name says, or see `checkpoint.load`.
    """
    seen: dict[str, dict[str, Any]] = {}
    for name in names:
        state = checkpoint.load(out / name)
        config = load_config(ModelConfig, base=state.shape)
        check_switches(config, name, out / name)
        shape = {key: value for key, value in config.model_dump(mode="json").items() if key not in LABELS}
        seen[name] = {"steps": state.step, "dataset": state.dataset, "network": shape}
    first = seen[names[0]]
    steps = {facts["steps"] for facts in seen.values()}
    notes = [f"{name}: trained for {facts['steps']} steps" for name, facts in seen.items() if len(steps) > 1]
    for name, facts in seen.items():
        for key in ("dataset", "network"):
            apart = [part for part in {**first[key], **facts[key]} if first[key].get(part) != facts[key].get(part)]
            notes += [f"{name}: another {key} than {names[0]} ({', '.join(apart)})"] * bool(apart)
    if notes:
        warn(f"{out}: the runs differ by more than the part that is left out: {'; '.join(notes)}")
    return notes


def train_runs(commands: Mapping[str, Sequence[str]], out: Path, steps: int, minutes: bool, parallel: int) -> None:
    """Train the runs that are not finished, so many at a time, each as a process with its output in `out/NAME.log`.

    A run is finished at its last step, or, where it has a time limit, once it ended by itself, with as many steps to
    do: `out/NAME.trained` says how many these were.

    Args:
        commands: run -> the command that trains it in `out/NAME`, and goes on where that was stopped.
        steps: optimiser steps of each.
        minutes: whether the runs have a time limit.

    Raises:
        UserError: one failed or was stopped; those that ran beside it were asked to save and stop.
    """
    out.mkdir(parents=True, exist_ok=True)
    todo = [name for name in commands if not _finished(out, name, steps)][::-1]
    running: dict[str, subprocess.Popen[bytes]] = {}
    with Progress("train", len(commands), "runs") as progress, _ended(running):
        progress.advance(len(commands) - len(todo))
        while todo or running:
            while todo and len(running) < parallel:
                name = todo.pop()
                progress.note(f"training {name}; see {out / name}.log")
                with open(out / f"{name}.log", "ab") as log:
                    running[name] = subprocess.Popen(commands[name], stdout=log, stderr=subprocess.STDOUT)
            time.sleep(TICK)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                status = running.pop(name).returncode
                if status:
                    raise UserError(f"training {name} ended with status {status}; see {out / name}.log")
                if minutes:
                    open_store(str(out)).write(f"{name}.trained", str(steps).encode())
                if not _finished(out, name, steps):
                    raise UserError(f"training {name} was stopped before its last step; the same command goes on")
                progress.advance()


def report(
    evaluations: Sequence[Evaluation],
    out: Path,
    paper: PaperTable,
    title: str,
    baseline: str,
    notes: Sequence[str] = (),
) -> tuple[str, dict[str, Any]]:
    """Write `table.md` and `sweep.json`: all evaluations beside the paper's rows, and how far each is from `baseline`.

    Args:
        title: of the first column.
        baseline: name of an evaluation.
        notes: what a reader of the table must know, a line each.

    Returns:
        Markdown of the table and of the differences, and the tree of the JSON file.
    """
    base = next(evaluation for evaluation in evaluations if evaluation.name == baseline)
    systems = {evaluation.name: evaluation.summary() for evaluation in evaluations}
    apart = {
        evaluation.name: paired(evaluation.sums(), base.sums()) for evaluation in evaluations if evaluation is not base
    }
    text = table(systems, {one.name: len(one.clips) for one in evaluations}, paper, title)
    if notes:
        text += "\nNot alike:\n\n" + "".join(f"* {cell(line)}\n" for line in notes)
    if apart:
        text += f"\nDifference from {cell(baseline)}:\n\n" + differences(apart, title)
    tree = {
        "evaluations": [summary_json(evaluation) for evaluation in evaluations],
        "baseline": baseline,
        "notes": list(notes),
        "differences": {name: {key: asdict(value) for key, value in found.items()} for name, found in apart.items()},
    }
    lost = [f"* {cell(evaluation.name)}: {cell(line)}" for evaluation in evaluations for line in evaluation.unreadable]
    more = ["", "Not scored:", "", *lost, ""] if lost else []
    store = open_store(str(out))
    page = "\n".join([text, details(systems), *more])
    store.write("table.md", page.encode(errors="backslashreplace"))
    store.write("sweep.json", json_text(tree).encode())
    return text, tree


def has_run(out: Path, name: str) -> bool:
    """Whether there is a checkpoint of a run."""
    return (out / name).is_dir() and bool(checkpoint.found(out / name))


def _finished(out: Path, name: str, steps: int) -> bool:
    if not has_run(out, name):
        return False
    newest = checkpoint.found(out / name)[-1]
    done = int(newest.removeprefix(checkpoint.PREFIX).removesuffix(checkpoint.SUFFIX))
    if done >= steps:
        return True
    try:
        return int((out / f"{name}.trained").read_text()) >= steps
    except (OSError, ValueError):
        return False


@contextmanager
def _ended(running: dict[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    """Ask what still runs at the end to stop, and wait until it has."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
