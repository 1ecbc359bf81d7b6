"""The training stream: order, crops and padding depend on seed and step alone."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.augment import AugmentConfig, augmented, draw, generator
from shards.errors import UserError
from shards.layout import NEEDED
from shards.stream import StreamConfig, TrainingStream
from tests.streams import SHARDS, run, same, stream, take
from tests.toy import toy_dataset


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_processes_and_resuming_change_no_bit(toy_folder: Path, world: int, workers: int) -> None:
    whole = take(stream(toy_folder), 0, 7)  # beyond three epochs: 9 clips, 4 a step
    later = run(toy_folder, world, workers, 3, 4)
    assert all(same(a, b) for a, b in zip(whole[3:], later, strict=True))


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    window=st.integers(1, 3),
    batch=st.sampled_from([4, 8]),
    seed=st.integers(0, 99),
    lives=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 0, 0, 1]), st.integers(1, 3)), min_size=1, max_size=4
    ),
)
@settings(max_examples=12, deadline=None)
def test_a_run_that_is_killed_and_comes_back_otherwise_sees_the_same(
    sizes: list[int], window: int, batch: int, seed: int, lives: list[tuple[int, int, int]]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        random = np.random.default_rng(seed)
        toy_dataset(name, [random.integers(13, 40, size).tolist() for size in sizes], fields=NEEDED)
        common = {"batch": batch, "window": window}
        steps = sum(count for _, _, count in lives)
        with stream(Path(name), **common) as source:
            whole = list(itertools.islice(source.batches(0), steps))
            digests = [source.digest(step) for step in range(steps)]
        at = 0
        for world, workers, count in lives:
            pieces = run(Path(name), world, workers, at, count, **common)
            assert all(same(a, b) for a, b in zip(whole[at : at + count], pieces, strict=True))
            at += count
            with stream(Path(name), 0, world, **common) as source:
                assert source.digest(at - 1) == digests[at - 1]
        # Every clip once an epoch, whatever the sizes of shards.
        keys = [key for part in whole for key in part["keys"]]
        for begin in range(0, len(keys) - sum(sizes) + 1, sum(sizes)):
            assert len(set(keys[begin : begin + sum(sizes)])) == sum(sizes)


def test_digests_tell_runs_apart(toy_folder: Path) -> None:
    with stream(toy_folder) as one, stream(toy_folder, batch=2) as other:
        assert len({one.digest(step) for step in range(12)}) == 12
        assert one.digest(5) != other.digest(5)


def test_the_digest_is_a_chain_over_the_keys_of_an_epochs_steps(toy_folder: Path) -> None:
    with stream(toy_folder, mix=[{"uri": str(toy_folder)}], batch=8) as source:
        value, epoch = "", 0
        for step in range(8):
            if step * 8 // 18 != epoch:
                value, epoch = "", step * 8 // 18
            keys = "\n".join(
                f"{dataset}/{source.tables[0].keys[clip]}" for dataset, clip, _ in source.global_clips(step)
            )
            value = hashlib.sha256(f"{value}\n{keys}".encode()).hexdigest()[:16]
            assert source.digest(step) == value


@pytest.mark.parametrize("raw", [False, True])
def test_the_worker_augments_as_the_device_does(tmp_path: Path, raw: bool) -> None:
    toy_dataset(tmp_path, SHARDS, raw=raw)
    here = take(stream(tmp_path, augment_on="device"), 0, 12)
    there = take(stream(tmp_path, augment_on="worker", workers=1), 0, 12)
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_raw_lips_are_the_same_pixels(toy_folder: Path, tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS, raw=True)
    pairs = zip(take(stream(toy_folder), 0, 6), take(stream(tmp_path), 0, 6), strict=True)
    assert all(same(a, b) for a, b in pairs)


def test_fewer_clips_than_a_batch_and_fewer_shards_than_ranks(tmp_path: Path) -> None:
    toy_dataset(tmp_path, [[30, 25, 14]])
    whole = take(stream(tmp_path, batch=8), 0, 3)
    assert all(same(a, b) for a, b in zip(whole, run(tmp_path, 4, 0, 0, 3, batch=8), strict=True))
    keys = [key for batch in whole for key in batch["keys"]]
    assert all(len(set(keys[begin : begin + 3])) == 3 for begin in range(0, 24, 3))


def test_a_clip_much_longer_than_a_window_of_shards(tmp_path: Path) -> None:
    toy_dataset(tmp_path, [[30], [2500], [28]], raw=True, fields=NEEDED)
    starts = set()
    for batch in take(stream(tmp_path, window=1), 0, 12):
        for row, key in enumerate(batch["keys"]):
            if key == "s1c0":
                start = int(batch["mel"][row, 0, 0])
                np.testing.assert_array_equal(batch["mel"][row, 0], np.arange(start, start + 40))
                starts.add(start)
    assert max(starts) > 1000


def test_seeds_and_epochs_change_the_crop_of_a_clip(tmp_path: Path) -> None:
    toy_dataset(tmp_path, [[500]], fields=NEEDED, raw=True)
    starts = []
    for seed in (1, 2):
        with TrainingStream(str(tmp_path), StreamConfig(batch=1, crop_frames=20, workers=0), seed) as source:
            starts.append([int(batch["start"]) for batch in itertools.islice(source.host_batches(0), 5)])
    assert len({*starts[0], *starts[1]}) > 7


def test_crops_keep_one_to_two_and_pads_are_marked(toy_folder: Path) -> None:
    quiet = {"augment": {"flip": 0, "erase": 0, "mask_frames": 0}}
    starts = set()
    for batch in take(stream(toy_folder, **quiet), 0, 20):
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


def test_pitch_is_standardised_over_the_whole_clip(toy_folder: Path) -> None:
    batch = take(stream(toy_folder), 0, 1)[0]
    number = int(batch["keys"][0][1]), int(batch["keys"][0][3])
    frames = SHARDS[number[0]][number[1]]
    steps = np.arange(2 * frames)
    hertz = np.where(steps % 3 == 0, 0, 100 + steps).astype(np.float64)
    expected = (hertz - hertz.mean()) / (hertz.std() + 1e-5)
    begin = int(batch["mel"][0, 0, 0])
    valid = 2 * int(batch["frames"][0])
    np.testing.assert_allclose(batch["pitch"][0, :valid], expected[begin : begin + valid], rtol=1e-4, atol=1e-5)


def test_clear_errors(toy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split 'test'"):
        stream(toy_folder, split="test")
    with pytest.raises(UserError, match="batch 4"):
        stream(toy_folder, world=3)
    with pytest.raises(UserError, match="ranks are 0 to 3"):
        stream(toy_folder, rank=4, world=4)
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
