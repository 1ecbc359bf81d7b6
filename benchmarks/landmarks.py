"""FAN against the usual code, and what fewer stacks, no mirror and key frames cost in time and in landmarks.

    python benchmarks/landmarks.py --clips ../shared/clips --json landmarks.json

The usual code is face-alignment's: float32, one crop at a time, heat maps read one by one, each crop mirrored as well.
Weights are random, which changes no time. Runs are interleaved on one thread; printed is the median processor time.
Key frames are compared, with dlib's predictor, to landmarks of every frame, as a share of the distance between the
outer eye corners.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from pipeline.media import decode_video
from pipeline.networks.fan import CHECKPOINTS, Fan, FanNetwork
from pipeline.stage import Clip, Fields, Item, Reject
from pipeline.stages.faces import Faces, FacesConfig
from pipeline.stages.landmarks import Landmarks, LandmarksConfig, key_frames, move_along

ROWS: dict[str, dict[str, Any]] = {
    "float32, mirrored": {},
    "bfloat16, mirrored": {"precision": "bfloat16"},
    "bfloat16, mirrored, 2 stacks": {"precision": "bfloat16", "stacks": 2},
    "bfloat16, not mirrored": {"precision": "bfloat16", "flip": False},
    "bfloat16, not mirrored, 2 stacks": {"precision": "bfloat16", "flip": False, "stacks": 2},
}


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median processor time of each call, the calls taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                taken[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def usual_points(network: torch.nn.Module, frame: np.ndarray, box: list[float]) -> np.ndarray:
    """Points of one face with face-alignment's own functions."""
    from face_alignment import utils

    x0, y0, x1, y1 = box
    center, scale = np.array([(x0 + x1) / 2, (y0 + y1) / 2 - 0.12 * (y1 - y0)]), (x1 - x0 + y1 - y0) / 165
    crop = utils.crop(frame, center, scale).transpose(2, 0, 1)[None].astype(np.float32) / 255
    with torch.no_grad():
        x = torch.from_numpy(crop).to(next(network.parameters()).device)
        maps = network(x)[-1] + utils.flip(network(utils.flip(x))[-1], is_label=True)
    points: np.ndarray = utils.get_preds_fromhm(maps.cpu().numpy(), center, scale)[1][0]
    return points


def speed(path: Path, tracks: Fields, rounds: int, frames: int = 5) -> dict[str, dict[str, float]]:
    """Per row: milliseconds a frame, how often the usual code's speed, and how much of the bare network's speed."""
    from face_alignment.models import FAN

    torch.manual_seed(0)
    usual = FAN(4).eval()
    end = frames / 25
    fields = {name: value[:frames] for name, value in tracks.items()}
    pictures = list(decode_video(str(path), 0, end))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, CHECKPOINTS["fan4"][0].file)
        torch.save(usual.state_dict(), file)
        calls: dict[str, Callable[[], object]] = {
            "face-alignment": lambda: [
                usual_points(usual, picture, box.tolist())
                for picture, box in zip(pictures, fields["boxes"], strict=True)
            ]
        }
        for name, settings in ROWS.items():
            fan = Fan(file, "fan4", **settings)
            stage = Landmarks(LandmarksConfig(network="fan4", **settings))
            stage._points = lambda shown, boxes, _, fan=fan: fan.points(shown, boxes)  # type: ignore[misc]
            item = Item(Clip("clip", str(path), "", start=0, end=end), fields)
            calls[name] = lambda stage=stage, item=item: stage.run(item)  # type: ignore[misc]
            x = torch.rand(2 if fan.flip else 1, 3, 256, 256).to(fan.dtype, memory_format=torch.channels_last)
            calls["bare " + name] = lambda fan=fan, x=x: [bare(fan.network, x, fan.stacks) for _ in range(frames)]  # type: ignore[misc]
        taken = milliseconds(calls, rounds)
    base = taken["face-alignment"] / frames
    table = {"face-alignment": {"ms": base, "times": 1.0}}
    for name in ROWS:
        ms = taken[name] / frames
        table[name] = {"ms": ms, "times": base / ms, "of_bare": taken["bare " + name] / taken[name]}
    return table


@torch.inference_mode()
def bare(network: FanNetwork, x: torch.Tensor, stacks: int | None) -> torch.Tensor:
    """The network alone."""
    maps: torch.Tensor = network(x, stacks)
    return maps


def key_frame_errors(tracks: dict[str, Fields], every: int) -> dict[str, float]:
    """Mean errors in percent of the eye distance over all frames: of all points, and of the mouth's."""
    whole, mouth = [], []
    for fields in tracks.values():
        points, five = fields["landmarks"], fields["points5"]
        keys = key_frames(len(points), every)
        off = np.linalg.norm(move_along(points[keys], keys, five) - points, axis=2)
        off = 100 * off / np.linalg.norm(points[:, 36] - points[:, 45], axis=1)[:, None]
        whole.append(off.mean())
        mouth.append(off[:, 48:].mean())
    return {"all": float(np.mean(whole)), "mouth": float(np.mean(mouth))}


def find_tracks(folder: Path) -> dict[Path, Fields]:
    """Boxes, five points and dlib's landmarks of the clips in a folder that hold one usable face."""
    faces, landmarks = Faces(FacesConfig()), Landmarks(LandmarksConfig())
    faces.setup()
    landmarks.setup()
    tracks = {}
    for path in sorted(folder.iterdir()):
        clip = Clip(path.stem, str(path), "")
        try:
            fields = faces.run(Item(clip))
            tracks[path] = {**fields, **landmarks.run(Item(clip, fields))}
        except Reject as reject:
            print(f"left out {path.name}: {reject.reason.value}")
    return tracks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=Path("../shared/clips"), help="folder of talking faces")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the tables here as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    tracks = find_tracks(options.clips)
    errors = {
        every: key_frame_errors({path.name: track for path, track in tracks.items()}, every) for every in (2, 3, 5)
    }
    print(f"{'every':>5} {'all, %':>8} {'mouth, %':>9}   ({len(tracks)} clips)")
    for every, error in errors.items():
        print(f"{every:>5} {error['all']:>8.2f} {error['mouth']:>9.2f}")
    path = next(iter(tracks))
    table = speed(path, tracks[path], options.rounds)
    print(f"{'fan4':<34}{'ms/frame':>9} {'faster':>7} {'of bare':>8}")
    for name, row in table.items():
        share = f"{row['of_bare']:8.0%}" if "of_bare" in row else ""
        print(f"{name:<34}{row['ms']:>9.0f} {row['times']:>6.1f}x {share}")
    if options.json:
        options.json.write_text(json.dumps({"speed": table, "key_frames": errors}, indent=1))


if __name__ == "__main__":
    main()
