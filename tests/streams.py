"""Streams over a small dataset, and how their batches are compared."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.stream import StreamConfig, TrainingStream
from tests.toy import toy_dataset

SHARDS = [[30, 14, 20], [25, 13], [40, 16, 18, 22]]


def stream(folder: Path, rank: int = 0, world: int = 1, **settings: object) -> TrainingStream:
    config = StreamConfig.model_validate({"batch": 4, "crop_frames": 20, "workers": 0, **settings})
    return TrainingStream(str(folder), config, seed=3, rank=rank, world=world)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy")
    toy_dataset(path, SHARDS)
    return path


def take(source: TrainingStream, start: int, count: int) -> list[dict[str, Any]]:
    with source:
        return list(itertools.islice(source.batches(start), count))


def run(folder: Path, world: int, workers: int, start: int, count: int, **settings: object) -> list[dict[str, Any]]:
    """Global batches of some steps, put together from the parts of all ranks."""
    parts = [take(stream(folder, rank, world, workers=workers, **settings), start, count) for rank in range(world)]
    return [joined([part[step] for part in parts]) for step in range(count)]


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: list(itertools.chain.from_iterable(part[name] for part in parts))
        if name == "keys"
        else torch.cat([part[name] for part in parts])
        for name in parts[0]
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a)
