"""Figures of real clips against themselves and of their Griffin-Lim copies, and what each family of figures costs.

    python -m benchmarks.metrics CLIPS

CLIPS is a folder with MANIFEST.csv (file, transcript); files that cannot be read are named and passed over.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch

from model.evaluation.config import FAMILIES, EvaluationConfig
from model.evaluation.figures import FIGURES, Sums
from model.evaluation.metrics import Metrics
from model.evaluation.sound import Sound, load_sound
from model.griffinlim import playable
from shards.errors import UserError
from shards.mel import log_mel
from shards.schema import SAMPLE_RATE, SAMPLES_PER_FRAME

NAMED = ("|", ":")
"""What a transcript holds that also says when and where it is spoken; such clips have no words to compare."""


def copied(sound: Sound) -> Sound:
    """The sound as Griffin-Lim makes it of its mel."""
    whole = sound.samples[: len(sound.samples) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME]
    wave = playable(log_mel(whole))
    return Sound(wave, len(wave) / SAMPLE_RATE, None, float(np.abs(wave).max()))


def add(total: dict[str, list[float]], sums: Sums, without: tuple[str, ...]) -> None:
    """Add a clip's sums to those of a corpus: [sum, count, clips]; figures in `without` are left out."""
    for key, (amount, count) in sums.items():
        if key in without:
            continue
        row = total.setdefault(key, [0.0, 0.0, 0])
        row[0], row[1], row[2] = row[0] + amount, row[1] + count, row[2] + 1


def quality(folder: Path) -> Sound | None:
    """Print a table of the clips' own figures and of their copies'; the first clip that can be read comes back."""
    first = None
    judge = Metrics(EvaluationConfig())
    totals: dict[str, dict[str, list[float]]] = {"original": {}, "copy": {}}
    with open(folder / "MANIFEST.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        try:
            original = load_sound(folder / row["file"])
        except UserError as error:
            print(f"passed over: {error}")
            continue
        first = first or original
        text = row["transcript"]
        plain = bool(text) and not any(mark in text for mark in NAMED)
        for name, sound in (("original", original), ("copy", copied(original))):
            scores = judge.score(sound, original, text)
            add(totals[name], scores.sums, () if plain else ("wer", "cer"))
            print(f"{row['file']}, {name}: {scores.heard!r} {'; '.join(scores.notes)}")
    print("\n| figure | " + " | ".join(totals) + " | clips |\n|---|---|---|---|")
    for key, figure in FIGURES.items():
        found = [total[key] for total in totals.values() if key in total]
        if found:
            values = " | ".join(f"{figure.value(amount, count):.3f}" for amount, count, _ in found)
            print(f"| {figure.label} | {values} | {found[-1][2]} |")
    return first


def cost(clip: Sound, rounds: int = 5) -> None:
    """Print processor time per family for 3 s of a clip."""
    sound = Sound(np.resize(clip.samples, 3 * SAMPLE_RATE), 3.0, None, clip.peak)
    print("\n| family | ms |\n|---|---|")
    for family in FAMILIES:
        judge = Metrics(EvaluationConfig(metrics=(family,)))
        judge.score(sound, sound, "one two three")
        times = []
        for _ in range(rounds):
            begin = time.process_time()
            judge.score(sound, sound, "one two three")
            times.append(time.process_time() - begin)
        print(f"| {family} | {1000 * min(times):.0f} |")


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder with MANIFEST.csv")
    folder = parser.parse_args().clips
    torch.set_num_threads(1)
    clip = quality(folder)
    if clip is not None:
        cost(clip)


if __name__ == "__main__":
    main()
