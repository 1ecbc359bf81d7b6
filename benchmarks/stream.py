"""The training stream against plain webdataset and others: samples per second, on the same tars and the same crops.

    python -m benchmarks.stream --json stream.json
    python -m benchmarks.stream --peers --s3 s3://bucket/prefix

A sample is a crop of 96 frames of every field that training reads; a batch has 64. All yield torch tensors in this
process: lips uint8, augmentation is left to the device. Runs take turns, each in a process of its own; the median of
several counts. From the page cache unless it says cold. `--peers` adds lhotse Shar, litdata, MosaicML streaming (each
in its own format, written first) and a map-style dataset over npy files; what does not import is left out and said.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import stream_formats as formats
from benchmarks import stream_peers as peers
from benchmarks.stream_checks import decoding, disagreements
from benchmarks.stream_data import BATCH, write_all
from benchmarks.stream_run import Entry, first_epoch, in_child, peak_memory, steady
from shards.signals import Stopped, catch_signals
from shards.storage import open_store

FOREIGN = {
    "lhotse_shar": ("lhotse", formats.write_shar, formats.shar, "shar"),
    "litdata": ("litdata", formats.write_litdata, formats.litdata, "litdata"),
    "mosaicml_mds": ("streaming", formats.write_mds, formats.mds, "mds"),
}
"""Name -> module, writer, contestant, folder."""


def entries(folder: Path) -> dict[str, Entry]:
    """The contestants that always run."""
    raw, jpeg = str(folder / "raw"), str(folder / "jpeg")
    found = {f"ours_{workers}_workers": Entry(peers.ours, raw, workers) for workers in (0, 1, 2)}
    found |= {f"webdataset_{workers}_workers": Entry(peers.webdataset, raw, workers) for workers in (0, 2)}
    found["limit_read_memcpy"] = Entry(peers.read_and_copy, raw, 0)
    for workers in (0, 2):
        found[f"jpeg_ours_{workers}_workers"] = Entry(peers.ours, jpeg, workers)
        found[f"jpeg_webdataset_{workers}_workers"] = Entry(peers.webdataset, jpeg, workers)
    return found


def foreign(folder: Path, skipped: dict[str, str]) -> dict[str, Entry]:
    """The contestants of `--peers` that import, their data written."""
    found = {}
    for workers in (0, 2):
        found[f"npy_files_{workers}_workers"] = Entry(peers.npy_files, str(folder / "npy"), workers)
        found[f"webdataset_padded_{workers}_workers"] = Entry(peers.webdataset_padded, str(folder / "raw"), workers)
    for name, (module, write, open_it, data) in FOREIGN.items():
        try:
            in_child(_imports, module)
            if not (folder / data).exists():
                in_child(write, folder)
        except RuntimeError as error:
            leave_out(skipped, name, error)
            continue
        found |= {f"{name}_{workers}_workers": Entry(open_it, str(folder / data), workers) for workers in (0, 2)}
    return found


def _imports(module: str) -> None:
    importlib.import_module(module)


def rounds_of(runs: dict[str, Entry], rounds: int, seconds: float, skipped: dict[str, str]) -> dict[str, list[Any]]:
    """Results of each contestant, a round of all after the other; one that fails is left out from then on."""
    results: dict[str, list[Any]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, entry in runs.items():
            if name in skipped:
                continue
            try:
                results[name].append(in_child(steady, entry, seconds))
            except RuntimeError as error:
                leave_out(skipped, name, error)
        print(f"round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return {name: several for name, several in results.items() if several}


def leave_out(skipped: dict[str, str], name: str, error: Exception) -> None:
    """Note why something was not measured, and say it at once."""
    skipped[name] = str(error)
    print(f"left out: {name}: {error}", file=sys.stderr)


def cold_runs(folder: Path, clips: int, rounds: int, skipped: dict[str, str]) -> dict[str, dict[str, float]]:
    """Samples per second of the first epoch, start included, with and without the tars in the page cache."""
    count = max(1, clips // BATCH)
    paths = [str(path) for path in sorted((folder / "raw" / "train").glob("*.tar"))]
    runs = {name: entry for name, entry in entries(folder).items() if name in FIRST}
    seconds: dict[str, dict[str, list[float]]] = {name: {"warm": [], "cold": []} for name in runs}
    for _ in range(rounds):
        for name, entry in runs.items():
            if f"{name}, first epoch" in skipped:
                continue
            try:
                seconds[name]["cold"].append(in_child(first_epoch, entry, count, paths))
                seconds[name]["warm"].append(in_child(first_epoch, entry, count, []))
            except RuntimeError as error:
                leave_out(skipped, f"{name}, first epoch", error)
    return {
        name: {kind: BATCH * count / median(several) for kind, several in both.items()}
        for name, both in seconds.items()
        if both["warm"]
    }


def memory_runs(runs: dict[str, Entry], seconds: float, skipped: dict[str, str]) -> dict[str, dict[str, float]]:
    """Memory at its peak."""
    found = {}
    for name in ("ours_0_workers", "ours_2_workers", "webdataset_0_workers", "webdataset_2_workers"):
        try:
            found[name] = peak_memory(runs[name], seconds)
        except RuntimeError as error:
            leave_out(skipped, f"{name}, memory", error)
    return found


FIRST = ("ours_0_workers", "ours_2_workers", "webdataset_0_workers", "webdataset_2_workers", "limit_read_memcpy")


def bucket_runs(folder: Path, uri: str, clips: int, rounds: int, seconds: float) -> dict[str, Any]:
    """The raw tars from a bucket: the first epoch with an empty cache, and the steady state; 2 workers."""
    in_child(_upload, folder / "raw", uri)
    count = -(-clips // BATCH)
    stored = sum(path.stat().st_size for path in (folder / "raw" / "train").glob("*.tar"))
    first: dict[str, list[float]] = {"ours": [], "webdataset": []}
    later: dict[str, list[float]] = {"ours": [], "webdataset": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            runs = {
                "ours": Entry(partial(peers.ours, cache=Path(cache)), uri, 2),
                "webdataset": Entry(peers.webdataset, uri, 2),
            }
            for name, entry in runs.items():
                first[name].append(in_child(first_epoch, entry, count, []))
                later[name].append(in_child(steady, entry, seconds)["per_s"])
    return {
        name: {
            "first_epoch_per_s": BATCH * count / median(first[name]),
            "first_epoch_mb_per_s": stored / 1e6 / median(first[name]),
            "later_per_s": median(later[name]),
        }
        for name in first
    }


def _upload(folder: Path, uri: str) -> None:
    store = open_store(uri)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not store.exists(name):
            store.write(name, path.read_bytes())


RATIOS = (
    ("2_workers", "ours_2_workers", "webdataset_2_workers"),
    ("0_workers", "ours_0_workers", "webdataset_0_workers"),
    ("of_limit", "ours_2_workers", "limit_read_memcpy"),
    ("of_limit_0_workers", "ours_0_workers", "limit_read_memcpy"),
    ("jpeg_2_workers", "jpeg_ours_2_workers", "jpeg_webdataset_2_workers"),
    ("jpeg_0_workers", "jpeg_ours_0_workers", "jpeg_webdataset_0_workers"),
)
"""Name, and which contestant by which; null where one of them was left out."""


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All facts, samples per second by contestant at the top level."""
    if (folder / "facts.json").exists():
        data = json.loads((folder / "facts.json").read_text())
    else:
        data = in_child(write_all, folder, args.clips, args.shard_clips)
        data["clips"] = args.clips
        (folder / "facts.json").write_text(json.dumps(data))
    clips = data["clips"]
    skipped: dict[str, str] = {}
    wrong = in_child(disagreements, folder)
    runs = entries(folder) | (foreign(folder, skipped) if args.peers else {})
    results = rounds_of(runs, args.rounds, args.seconds, skipped)
    facts: dict[str, Any] = {name: median(one["per_s"] for one in several) for name, several in results.items()}
    facts["least_and_most"] = {
        name: [min(one["per_s"] for one in several), max(one["per_s"] for one in several)]
        for name, several in results.items()
    }
    per_cpu = {name: median(one["per_cpu_s"] for one in several) for name, several in results.items()}
    facts["per_cpu_second"] = per_cpu
    facts["ratios"] = {
        name: facts[one] / facts[two] if {one, two} <= facts.keys() else None for name, one, two in RATIOS
    }
    decode = in_child(decoding, folder, args.rounds)
    facts["decoding"] = decode | {
        f"share_{name}": decode[f"{name}_us"] / 1e6 * per_cpu[run]
        if (run := f"jpeg_{name}_0_workers") in per_cpu
        else None
        for name in ("ours", "webdataset")
    }
    facts["first_epoch"] = cold_runs(folder, clips, args.rounds, skipped)
    facts["memory_mb"] = memory_runs(runs, args.seconds, skipped)
    if args.s3:
        try:
            facts["s3"] = bucket_runs(folder, args.s3, clips, args.rounds, args.seconds)
        except RuntimeError as error:
            leave_out(skipped, "s3", error)
    setting = {"rounds": args.rounds, "seconds": args.seconds, "batch": BATCH, "cpus": os.cpu_count()}
    return facts | {"data": data, "setting": setting, "disagreements": wrong, "skipped": skipped}


def show(facts: dict[str, Any]) -> Iterator[str]:
    """The table, line by line."""
    data = facts["data"]
    yield (
        f"{data['clips']} clips, {data['frames'] / 25:.0f} s; raw lips {data['raw_bytes'] / 1e6:.0f} MB, JPEG lips "
        f"{data['jpeg_bytes'] / 1e6:.0f} MB with {data['jpeg_bytes_per_frame']:.0f} bytes per frame"
    )
    yield f"{'':<28}{'samples/s':>10}{'least':>8}{'most':>8}{'per CPU s':>11}"
    for name, (least, most) in facts["least_and_most"].items():
        yield f"{name:<28}{facts[name]:>10,.0f}{least:>8,.0f}{most:>8,.0f}{facts['per_cpu_second'][name]:>11,.0f}"
    times = {name: "-" if ratio is None else f"{ratio:.1f}x" for name, ratio in facts["ratios"].items()}
    yield (
        f"against webdataset: raw {times['2_workers']} with 2 workers, {times['0_workers']} with none; "
        f"JPEG {times['jpeg_2_workers']}, {times['jpeg_0_workers']}"
    )
    decode = facts["decoding"]
    share = {
        name: "-" if value is None else f"{value:.0%}" for name, value in (*facts["ratios"].items(), *decode.items())
    }
    yield f"of the limit: {share['of_limit']} with 2 workers, {share['of_limit_0_workers']} with none"
    yield (
        f"decoding lips: ours {decode['ours_us']:.0f} us per crop, {share['share_ours']} of a sample's time; "
        f"whole strips {decode['webdataset_us']:.0f} us, {share['share_webdataset']}"
    )
    yield f"{'first epoch, with the start':<28}{'warm':>10}{'cold':>8}"
    for name, both in facts["first_epoch"].items():
        yield f"{name:<28}{both['warm']:>10,.0f}{both['cold']:>8,.0f}"
    for name, one in facts.get("s3", {}).items():
        yield (
            f"bucket, {name}: first epoch {one['first_epoch_per_s']:,.0f} samples/s ({one['first_epoch_mb_per_s']:.0f} "
            f"MB/s), later {one['later_per_s']:,.0f}"
        )
    yield f"{'memory at its peak, MB':<28}{'all':>10}{'own':>8}{'file pages':>11}"
    for name, one in facts["memory_mb"].items():
        own = one["anonymous_and_shared"]
        yield f"{name:<28}{one['all']:>10,.0f}{own:>8,.0f}{one['file_pages']:>11,.0f}"
    for name, why in facts["skipped"].items():
        yield f"left out: {name}: {why}"
    for what in facts["disagreements"]:
        yield f"NOT THE SAME CROP: {what}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--shard-clips", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4, help="of which the median counts (default 4)")
    parser.add_argument("--seconds", type=float, default=2.5, help="of each run, after its warm-up (default 2.5)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="keep the made-up clips here, or take those there")
    parser.add_argument("--peers", action="store_true", help="also other libraries and a map-style dataset")
    parser.add_argument("--s3", metavar="URI", help="also from this prefix of a bucket; the tars are copied there")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE, or alone on standard output"
    )
    args = parser.parse_args()
    if args.rounds < 1 or args.clips < BATCH:
        parser.error(f"--rounds must be at least 1, and --clips at least {BATCH}")
    torch.set_num_threads(1)
    catch_signals()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.data or Path(temporary)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            facts = measure(args, folder)
    except Stopped as stop:
        print("stopped", file=sys.stderr)
        return 128 + stop.number
    if args.json != "-":
        print("\n".join(show(facts)))
    if args.json:
        text = json.dumps(facts, indent=1)
        print(text) if args.json == "-" else Path(args.json).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
