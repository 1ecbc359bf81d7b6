"""The contestants of `benchmarks.stream`: each opens as batches without end, with or without worker processes.

All give batches of `BATCH` random crops of `CROP` frames as torch tensors in this process, with the dtypes of
`stream_data.empty_batch`. What is here of other libraries is written the way their users write it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset

from benchmarks.stream_data import BATCH, CROP, NAMES, SOUND, VIDEO, collate, cut, empty_batch, pick_start
from shards.dataset import Dataset
from shards.manifest import Index
from shards.schema import LIP_SIZE

Batches = Iterator[dict[str, Any]]


def tars(uri: str) -> tuple[list[str], Index]:
    """URIs of a dataset's packed shards, and its index."""
    index = Dataset(uri).index()
    return [f"{uri}/{shard.name}" for shard in index.shards], index


@contextlib.contextmanager
def ours(uri: str, workers: int, cache: Path | None = None) -> Iterator[Batches]:
    """Our stream; `cache` is where it keeps shards of a bucket."""
    from shards.stream import StreamConfig, TrainingStream

    config = StreamConfig(batch=BATCH, crop_frames=CROP, workers=workers, window=4, cache=cache)
    with TrainingStream(uri, config, seed=0) as stream:
        yield stream.host_batches(start=0)


@contextlib.contextmanager
def webdataset(uri: str, workers: int) -> Iterator[Batches]:
    import webdataset as wds
    from webdataset.gopen import gopen_schemes

    urls, _ = tars(uri)
    # webdataset has no handler for s3:// of its own.
    gopen_schemes["s3"] = open_object
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls))
        .repeat()
        .shuffle(100)
        .decode("l8")
        .map(crop_sample)
        .batched(BATCH, collation_fn=collate, partial=False)
    )
    yield iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


@contextlib.contextmanager
def webdataset_padded(uri: str, workers: int) -> Iterator[Batches]:
    """The other usual way: samples padded one by one, and batches made by the DataLoader."""
    import webdataset as wds

    urls, _ = tars(uri)
    dataset = wds.WebDataset(urls, shardshuffle=len(urls)).repeat().shuffle(100).decode("l8").map(padded_sample)
    yield iter(wds.WebLoader(dataset, batch_size=BATCH, num_workers=workers))


def padded_sample(sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """A random crop, padded with zeros."""
    crop = crop_sample(sample)
    padded = {name: array[0] for name, array in empty_batch(1, np.zeros).items()}
    for name, array in padded.items():
        array[: len(crop[name])] = crop[name]
    return padded


def open_object(url: str, mode: str = "rb", bufsize: int = 8192) -> Any:
    """An object of a bucket as a stream of bytes."""
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"]


def crop_sample(sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """A random crop of a sample that webdataset has decoded; lips are an array or the whole strip as one picture."""
    values = {name: sample[f"{name}.npy"] for name in NAMES if name != "lips"}
    if "lips.npy" in sample:
        values["lips"] = sample["lips.npy"]
    else:
        values["lips"] = sample["lips.jpg"].reshape(-1, LIP_SIZE, LIP_SIZE)
    return cut(values, pick_start(len(values["lips"]), np.random.default_rng()))


@contextlib.contextmanager
def npy_files(uri: str, workers: int) -> Iterator[Batches]:
    clips = NpyClips(Path(uri))
    sampler = RandomSampler(clips, replacement=True, num_samples=1 << 30)
    yield iter(DataLoader(clips, BATCH, sampler=sampler, num_workers=workers, collate_fn=collate))


class NpyClips(TorchDataset[dict[str, np.ndarray]]):
    """A folder per clip and a file per field, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self._clips = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        values = {name: np.load(self._clips[number] / f"{name}.npy", mmap_mode="r") for name in NAMES}
        return cut(values, pick_start(len(values["lips"]), np.random.default_rng()))


@contextlib.contextmanager
def read_and_copy(uri: str, workers: int) -> Iterator[Batches]:
    """What any reader of whole tars must do: read them into memory, copy the crops' bytes to a batch. One process."""
    urls, index = tars(uri)
    random = np.random.default_rng(0)
    buffer = bytearray(max(shard.bytes for shard in index.shards))
    raw = np.frombuffer(buffer, np.uint8)
    batch = empty_batch(BATCH, np.zeros)
    batch["units"] = np.zeros(batch["units"].shape, np.int16)  # Bytes are copied, and it is stored in 16 bits.
    rows = {name: array.view(np.uint8).reshape(BATCH, -1) for name, array in batch.items()}
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}

    def batches() -> Batches:
        row = 0
        while True:
            for place in random.permutation(len(urls)):
                with open(urls[place], "rb", buffering=0) as file:
                    file.readinto(buffer)
                for clip in index.shards[place].clips:
                    start = pick_start(clip.frames, random)
                    for name, target in rows.items():
                        offset, size = clip.members[name]
                        begin, length = crop_bytes(name, size - NPY_HEADER, clip.frames, start)
                        begin += offset + NPY_HEADER
                        target[row, :length] = raw[begin : begin + length]
                        target[row, length:] = 0
                    row += 1
                    if row == BATCH:
                        yield tensors
                        row = 0

    yield batches()


NPY_HEADER = 128
"""Bytes before the values of the npy files that numpy writes for arrays of few axes."""


def crop_bytes(name: str, size: int, frames: int, start: int) -> tuple[int, int]:
    """Offset and length of a crop in the `size` bytes of a whole field's values."""
    if name not in (*VIDEO, *SOUND):
        return 0, size
    frame = size // frames
    return start * frame, min(CROP, frames) * frame
