"""Training-step time: eager float32 against bfloat16 autocast and compiled parts, beside the matrix-product peak.

    python -m benchmarks.step --json step.json
    python -m benchmarks.step --size paper --batch 2 --frames 96 --profile

A step is forward, backward, clipping and AdamW on a batch of random numbers made once, so no data is waited for. Each
variant runs in a process of its own, variants take turns, and the median of all rounds' steps counts. Its share of the
peak is FLOPs per second over the measured speed of a square matrix product in the precision that the variant uses. The
lip encoder of `paper` is frozen and random. With `--profile` also the operators that take the time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from model.compiling import compile_parts
from model.config import ModelConfig
from model.encoder import MEL_BINS
from model.faces2voices import FacesToVoices
from model.flops import count_flops, matmul_peak
from model.optimiser import adamw
from model.rehearsal import rehearsal
from model.train_config import OptimiserConfig

SHAPES = {"tiny": (8, 50), "paper": (2, 96)}
"""Clips and frames of a batch, by size."""
VARIANTS = {
    "eager_float32": (False, False),
    "eager_bfloat16": (False, True),
    "compiled_float32": (True, False),
    "compiled_bfloat16": (True, True),
}
"""Name -> compiled, bfloat16 autocast."""
WARM_UP = 3
TOP = 15
"""Operators that the profile names."""


@dataclass(frozen=True)
class Setting:
    """What all variants share."""

    size: str
    clips: int
    frames: int
    device: str
    threads: int
    steps: int
    profile: bool


def random_batch(config: ModelConfig, clips: int, frames: int, device: torch.device) -> dict[str, Tensor]:
    """What `FacesToVoices.losses` reads, all frames valid."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    acoustic = 2 * frames
    batch = {
        "lips": normal(clips, 1, frames, 88, 88),
        "identity": normal(clips, frames, config.identity_dim),
        "expression": normal(clips, frames, config.expression_dim),
        "frames": torch.full((clips,), frames),
        "units": torch.randint(config.units, (clips, acoustic), generator=generator),
        "timbre": normal(clips, config.timbre_dim),
        "pitch": normal(clips, acoustic),
        "energy": normal(clips, acoustic),
        "mel": normal(clips, MEL_BINS, acoustic),
    }
    return {name: value.to(device) for name, value in batch.items()}


def run(setting: Setting, variant: str) -> dict[str, Any]:
    """Seconds of each step of a variant, and what goes with them."""
    compiled, amp = VARIANTS[variant]
    device = torch.device(setting.device)
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    config = ModelConfig.preset(setting.size)
    network = FacesToVoices(config).to(device).train()
    batch = random_batch(config, setting.clips, setting.frames, device)
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    settings = OptimiserConfig()
    optimiser = adamw(network, settings)
    noise = torch.Generator(device).manual_seed(0)

    def forward_backward() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            losses = network.losses(batch, noise)
        losses["loss"].backward()

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        forward_backward()
        torch.nn.utils.clip_grad_norm_(learned, settings.clip_norm)
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    facts: dict[str, Any] = {}
    if not compiled:
        with rehearsal(network):
            facts["flops"] = count_flops(forward_backward)
        facts["peak"] = matmul_peak(device, torch.bfloat16 if amp else torch.float32)
    begin = time.perf_counter()
    said: list[str] = []
    if compiled and not compile_parts(network, said.append, forward_backward):
        return {"skipped": said[0]}
    facts["compile_s"] = time.perf_counter() - begin if compiled else 0.0
    for _ in range(WARM_UP):
        step()
    facts["steps"], facts["cpu_steps"] = [], []
    for _ in range(setting.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        facts["steps"].append(time.perf_counter() - wall)
        facts["cpu_steps"].append(time.process_time() - cpu)
    if device.type == "cuda":
        facts["memory"] = float(torch.cuda.max_memory_allocated(device))
    else:
        facts["memory"] = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if setting.profile:
        facts["profile"] = operators(step, device)
    return facts


def operators(step: Any, device: torch.device) -> dict[str, float]:
    """The operators that take most of a step, with their own shares of its time."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        step()
    times = {row.key: row.self_device_time_total if cuda else row.self_cpu_time_total for row in found.key_averages()}
    total = sum(times.values())
    return {name: times[name] / total for name in sorted(times, key=lambda name: -times[name])[:TOP]}


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    """All facts, variants at the top level."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    skipped: dict[str, str] = {}
    for number in range(rounds):
        for name in VARIANTS:
            if name in skipped:
                continue
            # spawn: a CUDA context does not survive a fork, and memory at its peak is the variant's own.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(run, setting, name).result()
            if "skipped" in found:
                skipped[name] = found["skipped"]
            else:
                results[name].append(found)
        print(f"round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    flops = results["eager_float32"][0]["flops"]
    peaks = {
        precision: max(one["peak"] for one in results[f"eager_{precision}"]) for precision in ("float32", "bfloat16")
    }
    facts: dict[str, Any] = {"flops": flops, "matmul_peak": peaks, "setting": vars(setting), "skipped": skipped}
    facts["load"], facts["cpus"] = os.getloadavg()[0], os.cpu_count()
    for name, several in results.items():
        if several:
            facts[name] = row(several, setting, flops, peaks[name.partition("_")[2]])
    base = facts["eager_float32"]
    facts["ratios"] = {name: base["s"] / facts[name]["s"] for name in VARIANTS if name in facts}
    facts["cpu_ratios"] = {name: base["cpu_s"] / facts[name]["cpu_s"] for name in VARIANTS if name in facts}
    return facts


def row(several: list[dict[str, Any]], setting: Setting, flops: float, peak: float) -> dict[str, Any]:
    """A variant's rounds together; seconds per step are the median of all, processor seconds the least."""
    times = [seconds for one in several for seconds in one["steps"]]
    seconds = median(times)
    found = {
        "s": seconds,
        "least_s": min(times),
        "most_s": max(times),
        "cpu_s": min(seconds for one in several for seconds in one["cpu_steps"]),
        "clips_per_s": setting.clips / seconds,
        "of_peak": flops / seconds / peak,
        "memory_mb": max(one["memory"] for one in several) / 1e6,
        # Later rounds find compiled code in the cache.
        "compile_s": several[0]["compile_s"],
        "compile_again_s": several[-1]["compile_s"],
    }
    return found | ({"profile": several[-1]["profile"]} if setting.profile else {})


def show(facts: dict[str, Any]) -> Iterator[str]:
    """The table, line by line."""
    setting, peaks = facts["setting"], facts["matmul_peak"]
    yield (
        f"{setting['size']}, {setting['clips']} clips of {setting['frames']} frames, {setting['device']}, "
        f"{setting['threads']} threads, load {facts['load']:.1f}; {facts['flops'] / 1e9:,.1f} GFLOP per step; matrix "
        f"product {peaks['float32'] / 1e9:,.0f} GFLOP/s in float32, {peaks['bfloat16'] / 1e9:,.0f} in bfloat16"
    )
    heads = ("s/step", "CPU s", "clips/s", "faster", "of peak", "MB", "compile s", "again s")
    yield f"{'':<20}" + "".join(f"{head:>10}" for head in heads)
    for name in VARIANTS:
        if name in facts:
            one = facts[name]
            yield (
                f"{name:<20}{one['s']:>10.3f}{one['cpu_s']:>10.3f}{one['clips_per_s']:>10.1f}"
                f"{facts['ratios'][name]:>9.2f}x{one['of_peak']:>10.1%}{one['memory_mb']:>10,.0f}"
                f"{one['compile_s']:>10.1f}{one['compile_again_s']:>10.1f}"
            )
    for name, why in facts["skipped"].items():
        yield f"left out: {name}: {why}"
    for name in VARIANTS:
        for operator, share in facts.get(name, {}).get("profile", {}).items():
            yield f"{name:<20}{share:>7.1%}  {operator[:80]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--batch", type=int, help="clips of a batch (default 8 of tiny, 2 of paper)")
    parser.add_argument("--frames", type=int, help="video frames of a clip (default 50 of tiny, 96 of paper)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="of each run, after its warm-up (default 10)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--profile", action="store_true", help="also the operators that take the time")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE, or alone on standard output"
    )
    args = parser.parse_args()
    clips, frames = args.batch or SHAPES[args.size][0], args.frames or SHAPES[args.size][1]
    if min(args.rounds, args.steps, args.threads, clips, frames) < 1:
        parser.error("--rounds, --steps, --threads, --batch and --frames must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU here")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    setting = Setting(args.size, clips, frames, device, args.threads, args.steps, args.profile)
    facts = measure(setting, args.rounds)
    if args.json != "-":
        print("\n".join(show(facts)))
    if args.json:
        text = json.dumps(facts, indent=1)
        print(text) if args.json == "-" else Path(args.json).write_text(text)


if __name__ == "__main__":
    main()
