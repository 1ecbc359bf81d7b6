"""Whether the contestants of `benchmarks.stream` give the same crops, and how long decoding lips takes."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.stream_data import CROP, NAMES, cut, npy_clips, pick_start
from benchmarks.stream_peers import ours, read_and_copy, webdataset
from shards.dataset import Dataset
from shards.layout import IGNORE
from shards.manifest import PackedClip
from shards.pitch import standardise
from shards.schema import LIP_SIZE, MEL_PER_FRAME
from shards.strips import decode_strip


def disagreements(folder: Path) -> list[str]:
    """What differs between the first batches of each and the npy files, cut where the batch itself says."""
    clips = {values["timbre"].tobytes(): (key, values) for key, values in npy_clips(folder)}
    strips = {clip.key: strip for clip, strip in lip_strips(folder)}
    found = []
    for kind, name, open_it in (
        ("raw", "ours", ours),
        ("raw", "webdataset", webdataset),
        ("raw", "read_and_copy", read_and_copy),
        ("jpeg", "ours", ours),
        ("jpeg", "webdataset", webdataset),
    ):
        with open_it(str(folder / kind), 0) as batches:
            batch = next(batches)
            for row in range(8):
                got = {field: np.array(batch[field][row]) for field in NAMES}
                key, values = clips[got["timbre"].tobytes()]
                if kind == "jpeg":
                    values = {**values, "lips": whole_strip(strips[key])}
                wrong = different(got, values, name == "ours")
                found += [f"{name}, {kind} lips, {key}: {field}" for field in wrong]
            del batch
    return found


def different(got: dict[str, NDArray[Any]], values: dict[str, Any], is_ours: bool) -> list[str]:
    """Fields of a sample that are not the crop of `values`, padded with zeros.

    Ours standardises pitch over the whole clip, which others leave to their user, and pads units with -100.
    """
    if is_ours:
        values = {**values, "pitch": standardise(values["pitch"], "zero")}
    expected = cut(values, int(got["energy"][0]) // MEL_PER_FRAME)
    wrong = []
    for field in NAMES:
        length = len(expected[field])
        fill = IGNORE if is_ours and field == "units" else 0
        same = np.array_equal(got[field][:length], expected[field], equal_nan=field == "pitch")
        if not same or (got[field][length:] != fill).any():
            wrong.append(field)
    return wrong


def lip_strips(folder: Path) -> Iterator[tuple[PackedClip, bytes]]:
    """The JPEG strip of every clip."""
    dataset = Dataset(str(folder / "jpeg"))
    for shard in dataset.index().shards:
        places = [clip.members["lips"] for clip in shard.clips]
        yield from zip(shard.clips, dataset.store.read_ranges(shard.name, places), strict=True)


def whole_strip(data: bytes) -> NDArray[np.uint8]:
    """All frames of a strip, as a picture library decodes it."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("L")).reshape(-1, LIP_SIZE, LIP_SIZE)


def decoding(folder: Path, rounds: int) -> dict[str, float]:
    """Microseconds of processor time to decode the lips of a sample: ours the frames of random crops, webdataset's
    users the whole strip; medians over `rounds` of all clips."""
    crops = []
    random = np.random.default_rng(0)
    for clip, data in lip_strips(folder):
        crops.append((data, clip.frames, pick_start(clip.frames, random)))

    def ours_all() -> None:
        for data, frames, start in crops:
            decode_strip(data, frames, LIP_SIZE, LIP_SIZE, start, min(frames, start + CROP))

    def whole_all() -> None:
        for data, _, _ in crops:
            whole_strip(data)

    calls = {"ours_us": ours_all, "webdataset_us": whole_all}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            times[name].append(1e6 * (time.process_time() - begin) / len(crops))
    return {name: median(several) for name, several in times.items()}
