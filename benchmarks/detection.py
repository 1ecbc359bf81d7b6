"""What detection on every k-th frame changes: landmarks of real clips against those of detection on every frame.

python benchmarks/detection.py CLIP [CLIP ...] --every 2 3 5

Printed per k: normalised mean error of the 68 landmarks (mean distance over that of the outer eye corners), mean
over clips and largest frame, that of the five points, and the time of the faces stage relative to k = 1. Clips that the
faces stage refuses are left out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from pipeline.stage import Clip, Fields, Item, Rejection
from pipeline.stages.faces import Faces, FacesConfig
from pipeline.stages.landmarks import Landmarks, LandmarksConfig


def fields_of(clip: Clip, faces: Faces, landmarks: Landmarks) -> tuple[Fields, float] | None:
    """Fields of both stages and the seconds that the first took; None where it refuses the clip."""
    begin = time.process_time()
    found = faces.attempt(Item(clip))
    seconds = time.process_time() - begin
    if isinstance(found, Rejection):
        return None
    return found | landmarks.run(Item(clip, found)), seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("--every", nargs="+", type=int, default=[2, 3, 5])
    options = parser.parse_args()
    landmarks = Landmarks(LandmarksConfig())
    landmarks.setup()
    stages = {every: Faces(FacesConfig(every=every)) for every in (1, *options.every)}
    for stage in stages.values():
        stage.setup()
    errors: dict[int, list[np.ndarray]] = {every: [] for every in options.every}
    jumps: dict[int, list[np.ndarray]] = {every: [] for every in options.every}
    seconds = dict.fromkeys(stages, 0.0)
    for path in options.clips:
        clip = Clip(path.stem, str(path), "")
        found = {every: fields_of(clip, stage, landmarks) for every, stage in stages.items()}
        if any(each is None for each in found.values()):
            print(f"{path.name}: refused")
            continue
        whole, _ = found[1] or ({}, 0.0)
        size = np.linalg.norm(whole["landmarks"][:, 36] - whole["landmarks"][:, 45], axis=1)[:, None]
        for every, each in found.items():
            fields, took = each or ({}, 0.0)
            seconds[every] += took
            if every > 1:
                distance = np.linalg.norm(fields["landmarks"] - whole["landmarks"], axis=2) / size
                errors[every].append(distance.mean(axis=1))
                jumps[every].append((np.linalg.norm(fields["points5"] - whole["points5"], axis=2) / size).mean(axis=1))
    print("every  landmarks, mean  median  95 %  worst frame  five points, mean  time")
    for every in options.every:
        error, jump = np.concatenate(errors[every]), np.concatenate(jumps[every])
        values = (error.mean(), np.median(error), np.quantile(error, 0.95), error.max(), jump.mean())
        print(f"{every:5}  " + "  ".join(f"{100 * value:.2f} %" for value in values), end="")
        print(f"  {100 * seconds[every] / seconds[1]:.0f} %")


if __name__ == "__main__":
    main()
