"""The training stream: order, crops and padding depend on seed and step alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.augment import AugmentConfig, augmented, draw, generator
from shards.errors import UserError
from shards.stream import StreamConfig, TrainingStream
from tests.toy import toy_dataset

SHARDS = [[30, 14, 20], [25, 13], [40, 16, 18, 22]]


def stream(folder: Path, rank: int = 0, world: int = 1, **settings: object) -> TrainingStream:
    config = StreamConfig.model_validate({"batch": 4, "crop_frames": 20, "workers": 0, **settings})
    return TrainingStream(str(folder), config, seed=3, rank=rank, world=world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy")
    toy_dataset(path, SHARDS)
    return path


def take(source: TrainingStream, start: int, count: int) -> list[dict[str, object]]:
    batches = source.batches(start)
    return [next(batches) for _ in range(count)]


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return all(torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_and_workers_change_nothing(folder: Path, workers: int) -> None:
    whole = take(stream(folder), 0, 7)  # beyond an epoch: 9 clips, 4 a step
    later = take(stream(folder, workers=workers), 3, 4)
    assert all(same(a, b) for a, b in zip(whole[3:], later, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_the_global_batch(folder: Path, world: int) -> None:
    whole = take(stream(folder), 0, 4)
    parts = [take(stream(folder, rank, world), 0, 4) for rank in range(world)]
    for step, batch in enumerate(whole):
        for name in ("lips", "mel", "units", "pitch"):
            joined = torch.cat([part[step][name] for part in parts])  # type: ignore[misc]
            assert torch.equal(joined, batch[name])  # type: ignore[arg-type]


def test_crops_keep_one_to_two_and_pads_are_marked(folder: Path) -> None:
    quiet = {"augment": {"flip": 0, "erase": 0, "mask_frames": 0}}
    starts = set()
    for batch in take(stream(folder, **quiet), 0, 20):
        assert batch["lips"].shape == (4, 1, 20, 88, 88)
        assert batch["mel"].shape == (4, 80, 40)
        for row, frames in enumerate(batch["frames"].tolist()):
            counter = batch["mel"][row, 0, : 2 * frames]
            start = int(counter[0])
            assert start % 2 == 0
            np.testing.assert_array_equal(counter, np.arange(start, start + 2 * frames))
            np.testing.assert_array_equal(batch["energy"][row, : 2 * frames], counter)
            # The toy lips are 2 x the frame number in grey, stored as JPEG: off by a level at most.
            grey = (batch["lips"][row, 0, :frames].mean((1, 2)) * 0.165 + 0.421) * 255
            np.testing.assert_allclose(grey, 2 * (start / 2 + np.arange(frames)), atol=1.5)
            assert (batch["units"][row, 2 * frames :] == -100).all()
            assert not batch["lips"][row, 0, frames:].any()
            assert not batch["mel"][row, :, 2 * frames :].any()
            starts.add(start)
    assert len(starts) > 10


def test_pitch_is_standardised_over_the_whole_clip(folder: Path) -> None:
    batch = take(stream(folder), 0, 1)[0]
    number = int(batch["keys"][0][1]), int(batch["keys"][0][3])
    frames = SHARDS[number[0]][number[1]]
    steps = np.arange(2 * frames)
    hertz = np.where(steps % 3 == 0, 0, 100 + steps).astype(np.float64)
    expected = (hertz - hertz.mean()) / (hertz.std() + 1e-5)
    begin = int(batch["mel"][0, 0, 0])
    valid = 2 * int(batch["frames"][0])
    np.testing.assert_allclose(batch["pitch"][0, :valid], expected[begin : begin + valid], rtol=1e-4, atol=1e-5)


def test_clear_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split 'test'"):
        stream(folder, split="test")
    with pytest.raises(UserError, match="batch 4"):
        stream(folder, world=3)
    with pytest.raises(UserError, match="no dataset"):
        stream(tmp_path)


@given(st.integers(1, 80), st.integers(0, 1000))
@settings(max_examples=30)
def test_masked_runs_stay_inside_whole_seconds(frames: int, seed: int) -> None:
    lips = np.full((frames, 96, 96), 255, np.uint8)
    out = augmented(lips, draw(AugmentConfig(flip=0, erase=0, mask_frames=10), frames, generator(seed)))
    masked = ~out.any(axis=(1, 2))
    for second in range(frames // 25):
        block = masked[25 * second : 25 * second + 25]
        assert block.sum() <= 10
        assert np.count_nonzero(np.diff(block.astype(int))) <= 2  # one run
    assert not masked[25 * (frames // 25) :].any()


def test_erased_area_has_the_published_size() -> None:
    lips = np.full((1, 96, 96), 255, np.uint8)
    config = AugmentConfig(flip=0, erase=1, mask_frames=0)
    shares = [(augmented(lips, draw(config, 1, generator(seed))) == 0).mean() for seed in range(400)]
    assert min(shares) >= 0.015
    assert max(shares) <= 0.34
    # The mean of U(0.02, 0.33) is 0.175; rectangles that do not fit are drawn again, which leaves a little less.
    assert 0.15 < np.mean(shares) < 0.18


def test_flip_mirrors_the_whole_clip() -> None:
    lips = np.zeros((3, 96, 96), np.uint8)
    lips[:, :, :20] = 255
    out = augmented(lips, draw(AugmentConfig(flip=1, erase=0, mask_frames=0), 3, generator(0)))
    assert (out[:, :, -5:] > 0).all()
    assert (out[:, :, :5] < 0).all()
