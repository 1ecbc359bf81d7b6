"""The training stream: batches of cropped, padded, augmented samples straight from packed shards.

The order is a pure function of (seed, sample number): a permutation of shards, a shuffle inside a window of shards, and
a counter-based generator per sample. It knows nothing of workers or ranks, so a run resumes from its step number alone
and gives the same global batches with any number of processes.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from shards.augment import AugmentConfig, centre_lips, generator, training_lips
from shards.codec import decode
from shards.config import Config
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import Index
from shards.pitch import PitchMode, standardise
from shards.schema import FIELDS, MEL_PER_FRAME, SchemaError
from shards.storage import is_remote

NEEDED = ("lips", "identity", "expression", "units", "timbre", "pitch", "energy", "mel")
IGNORE = -100
"""Unit index in padding: the loss skips it."""

Batch = dict[str, Any]


class StreamConfig(Config):
    """What a training job reads.

    Attributes:
        split: of the dataset.
        batch: samples per global step.
        crop_frames: video frames per sample; shorter clips are padded and masked.
        min_frames: shorter clips are left out.
        window: shards that are shuffled together.
        workers: processes that decode; 0 decodes in the training process.
        pitch: how pitch is standardised over each whole clip.
    """

    split: str = "train"
    batch: int = Field(64, ge=1)
    crop_frames: int = Field(96, ge=1)
    min_frames: int = Field(13, ge=1)
    window: int = Field(4, ge=1)
    workers: int = Field(2, ge=0)
    pitch: PitchMode = "zero"
    augment: AugmentConfig = AugmentConfig()


class Order:
    """Which clip is sample number `n` of the endless stream: epoch after epoch, each a permutation of all clips.

    Args:
        shard_clips: clips per shard.
        window: shards shuffled together.
        seed: of the run.
    """

    def __init__(self, shard_clips: Sequence[int], window: int, seed: int) -> None:
        self.shard_clips, self.window, self.seed = tuple(shard_clips), window, seed
        self.clips = sum(self.shard_clips)

    def __getitem__(self, number: int) -> tuple[int, int, int]:
        """(epoch, shard, clip in the shard) of sample `number`."""
        epoch, position = divmod(number, self.clips)
        shard, clip = self._epoch(epoch)[position]
        return epoch, int(shard), int(clip)

    @lru_cache(maxsize=2)  # noqa: B019 - lives and dies with the stream
    def _epoch(self, epoch: int) -> np.ndarray:
        random = generator(self.seed, "order", epoch)
        shards = random.permutation(len(self.shard_clips))
        parts = []
        for begin in range(0, len(shards), self.window):
            pairs = [
                (shard, clip)
                for shard in shards[begin : begin + self.window]
                for clip in range(self.shard_clips[shard])
            ]
            parts.append(random.permutation(np.array(pairs, np.int64).reshape(-1, 2)))
        return np.concatenate(parts)


class Samples(TorchDataset[dict[str, Any] | UserError]):
    """Sample number -> cropped and augmented sample, read by byte offset from the packed shards, or what is wrong."""

    def __init__(self, dataset: Dataset, index: Index, config: StreamConfig, seed: int) -> None:
        missing = [name for name in NEEDED if name not in index.fields]
        if missing:
            raise UserError(f"{dataset.uri}: training needs the fields {missing}; build with them in pack.fields")
        self._dataset, self._config, self._seed = dataset, config, seed
        self._shards = [
            (shard.name, [clip for clip in shard.clips if clip.frames >= config.min_frames])
            for shard in index.shards
            if shard.split == config.split
        ]
        self.order = Order([len(clips) for _, clips in self._shards], config.window, seed)
        if not self.order.clips:
            raise UserError(f"{dataset.uri}: no clips of {config.min_frames} frames or more in split {config.split!r}")

    def __getitem__(self, number: int) -> dict[str, Any] | UserError:
        try:
            return self._sample(number)
        except UserError as error:
            return error

    def _sample(self, number: int) -> dict[str, Any]:
        epoch, shard, position = self.order[number]
        name, clips = self._shards[shard]
        clip = clips[position]
        random = generator(self._seed, "sample", epoch, clip.key)
        length = min(clip.frames, self._config.crop_frames)
        start = int(random.integers(0, clip.frames - length + 1))
        values = {}
        try:
            data = self._dataset.store.read_ranges(name, [clip.members[field] for field in NEEDED])
            for field, raw in zip(NEEDED, data, strict=True):
                stop = start + length if field == "lips" else None
                values[field] = decode(FIELDS[field], raw, clip.frames, start if stop else 0, stop)
        except SchemaError as error:
            raise UserError(f"{self._dataset.uri}/{name}: {clip.key}: {error}; run `f2v verify`") from None
        except OSError as error:
            raise UserError(f"{self._dataset.uri}/{name}: {error.strerror or 'missing'}; run `f2v verify`") from None
        return make_sample(clip.key, values, start, length, self._config, random)


def make_sample(
    key: str,
    values: dict[str, np.ndarray],
    start: int,
    length: int,
    config: StreamConfig,
    random: np.random.Generator | None,
) -> dict[str, Any]:
    """One sample from a clip's decoded fields.

    Args:
        values: whole fields, but `lips` already cut to [length, 96, 96].
        start, length: crop in video frames; the acoustic crop is exactly twice that.
        random: augments the lips; None takes the centre crop.
    """
    video, sound = (
        slice(start, start + length),
        slice(MEL_PER_FRAME * start, MEL_PER_FRAME * (start + length)),
    )
    lips = centre_lips(values["lips"]) if random is None else training_lips(values["lips"], config.augment, random)
    return {
        "key": key,
        "frames": length,
        "lips": lips,
        "identity": values["identity"][video].astype(np.float32),
        "expression": values["expression"][video].astype(np.float32),
        "units": values["units"][sound].astype(np.int64),
        "timbre": values["timbre"].astype(np.float32),
        # Statistics of the whole clip, taken before the crop.
        "pitch": standardise(values["pitch"], config.pitch)[sound],
        "energy": values["energy"][sound],
        "mel": values["mel"][sound],
    }


def collate(samples: Sequence[dict[str, Any]], frames: int) -> Batch:
    """Stack samples, zero-padded at the end to `frames` video frames (unit index -100 in padding).

    Returns:
        lips float32 [B, 1, F, 88, 88], identity and expression float32 [B, F, D], units int64 [B, 2F], timbre float32
        [B, D], pitch and energy float32 [B, 2F], mel float32 [B, 80, 2F], frames int64 [B], keys (list of str).
    """
    batch: Batch = {"keys": [sample["key"] for sample in samples]}
    batch["frames"] = torch.tensor([sample["frames"] for sample in samples])
    batch["timbre"] = torch.from_numpy(np.stack([sample["timbre"] for sample in samples]))
    for name in ("lips", "identity", "expression", "units", "pitch", "energy", "mel"):
        first = samples[0][name]
        total = frames if name in ("lips", "identity", "expression") else MEL_PER_FRAME * frames
        out = np.full((len(samples), total, *first.shape[1:]), IGNORE if name == "units" else 0, first.dtype)
        for row, sample in zip(out, samples, strict=True):
            row[: len(sample[name])] = sample[name]
        batch[name] = torch.from_numpy(out)
    batch["lips"] = batch["lips"].unsqueeze(1)
    batch["mel"] = batch["mel"].transpose(1, 2).contiguous()
    return batch


class TrainingStream:
    """Batches of global steps `start`, `start + 1`, ... without end.

    Args:
        seed: of the run.
        rank, world: this process's place; every rank gets its slice of the same global batch.
    """

    def __init__(self, uri: str, config: StreamConfig, seed: int, rank: int = 0, world: int = 1) -> None:
        if config.batch % world:
            raise UserError(f"data.batch {config.batch} cannot be split over {world} processes")
        self.config, self.rank, self.world = config, rank, world
        self._uri = uri
        dataset = Dataset(uri)
        self.index = dataset.index()
        self.samples = Samples(dataset, self.index, config, seed)

    @property
    def clips(self) -> int:
        """Clips in an epoch."""
        return self.samples.order.clips

    def epoch(self, step: int) -> int:
        """Epoch in which a global step begins."""
        return step * self.config.batch // self.clips

    def numbers(self, step: int) -> list[int]:
        """Sample numbers of this rank at a global step."""
        share = self.config.batch // self.world
        begin = step * self.config.batch + self.rank * share
        return list(range(begin, begin + share))

    def batches(self, start: int) -> Iterator[Batch]:
        """Yield this rank's batches from global step `start` on."""
        loader = DataLoader(
            self.samples,
            batch_sampler=_Steps(self, start),
            num_workers=self.config.workers,
            collate_fn=_Collate(self.config.crop_frames),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_parent,
            # A bucket's client does not survive a fork.
            multiprocessing_context="forkserver" if self.config.workers and is_remote(self._uri) else None,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach every process; the training loop alone decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Steps:
    """Endless batch sampler."""

    def __init__(self, stream: TrainingStream, start: int) -> None:
        self._stream, self._start = stream, start

    def __iter__(self) -> Iterator[list[int]]:
        return (self._stream.numbers(step) for step in itertools.count(self._start))


class _Collate:
    def __init__(self, frames: int) -> None:
        self._frames = frames

    def __call__(self, samples: Sequence[dict[str, Any] | UserError]) -> Batch | UserError:
        # A worker's exception would arrive wrapped in its traceback; as a value it arrives as it is.
        good: list[dict[str, Any]] = []
        for sample in samples:
            if isinstance(sample, UserError):
                return sample
            good.append(sample)
        return collate(good, self._frames)
