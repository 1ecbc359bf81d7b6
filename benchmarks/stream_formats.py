"""Contestants of `benchmarks.stream` with formats of their own: lhotse Shar, litdata, MosaicML streaming.

Each `write_*` puts the clips of the npy folder into the library's format beside it, with raw lips. Batches without end
come from what the library offers for that, so that none pays for starting an epoch every five batches; litdata has
nothing of the kind and keeps its workers from epoch to epoch.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.stream_data import BATCH, NAMES, SOUND, VIDEO, collate, cut, npy_clips, pick_start

Batches = Iterator[dict[str, Any]]


def random_cut(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """A random crop of a clip's whole fields."""
    return cut(values, pick_start(len(values["lips"]), np.random.default_rng()))


def collate_cuts(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of random crops from whole clips."""
    return collate([random_cut(values) for values in clips])


def write_shar(folder: Path) -> None:
    from lhotse import MonoCut
    from lhotse.shar import SharWriter

    target = folder / "shar"
    target.mkdir()
    with SharWriter(str(target), fields=dict.fromkeys(NAMES, "numpy"), shard_size=32) as writer:
        for key, values in npy_clips(folder):
            clip: Any = MonoCut(key, start=0, duration=len(values["lips"]) / 25, channel=0)
            for name in NAMES:
                shift = 0.04 if name in VIDEO else 0.02 if name in SOUND else None
                clip = clip.attach_tensor(name, values[name], frame_shift=shift, temporal_dim=0 if shift else None)
            writer.write(clip)


class SharBatches:
    """What lhotse calls a dataset: a batch of cuts -> a batch of tensors."""

    def __getitem__(self, cuts: Any) -> dict[str, Any]:
        return collate_cuts([{name: one.load_custom(name) for name in NAMES} for one in cuts])


@contextlib.contextmanager
def shar(folder: str, workers: int) -> Iterator[Batches]:
    from lhotse import CutSet
    from lhotse.dataset import DynamicCutSampler
    from lhotse.dataset.iterable_dataset import IterableDatasetWrapper

    cuts = CutSet.from_shar(in_dir=folder, shuffle_shards=True, split_for_dataloading=True, seed=0)
    sampler = DynamicCutSampler(cuts.repeat().shuffle(buffer_size=100), max_cuts=BATCH, world_size=1, rank=0)
    dataset = IterableDatasetWrapper(dataset=SharBatches(), sampler=sampler)
    yield iter(DataLoader(dataset, batch_size=None, num_workers=workers))


def write_litdata(folder: Path) -> None:
    import litdata

    keys = [key for key, _ in npy_clips(folder)]
    litdata.optimize(
        fn=LoadClip(folder),
        inputs=keys,
        output_dir=str(folder / "litdata"),
        chunk_bytes="64MB",
        num_workers=1,
        reorder_files=False,
    )


class LoadClip:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, key: str) -> dict[str, Any]:
        return {name: np.load(self._folder / "npy" / key / f"{name}.npy") for name in NAMES}


@contextlib.contextmanager
def litdata(folder: str, workers: int) -> Iterator[Batches]:
    import litdata as library

    dataset = library.StreamingDataset(folder, shuffle=True)
    loader = library.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=workers, collate_fn=collate_cuts, persistent_workers=workers > 0
    )
    yield itertools.chain.from_iterable(itertools.repeat(loader))


def write_mds(folder: Path) -> None:
    from streaming import MDSWriter

    columns = {}
    for _, values in itertools.islice(npy_clips(folder), 1):
        columns = {name: f"ndarray:{values[name].dtype.name}" for name in NAMES}
    with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for _, values in npy_clips(folder):
            writer.write(values)


@contextlib.contextmanager
def mds(folder: str, workers: int) -> Iterator[Batches]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=folder, shuffle=True, batch_size=BATCH, epoch_size=1 << 17)
    yield iter(DataLoader(dataset, BATCH, num_workers=workers, collate_fn=collate_cuts))
