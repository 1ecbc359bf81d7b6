"""The training stream: order, crops and padding depend on seed and step alone."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.augment import AugmentConfig, augmented, draw, generator
from shards.dataset import Dataset
from shards.errors import UserError
from shards.layout import NEEDED
from shards.manifest import Recipe
from shards.stream import StreamConfig, TrainingStream
from tests.toy import RECIPES, toy_dataset

SHARDS = [[30, 14, 20], [25, 13], [40, 16, 18, 22]]


def stream(folder: Path, rank: int = 0, world: int = 1, **settings: object) -> TrainingStream:
    config = StreamConfig.model_validate({"batch": 4, "crop_frames": 20, "workers": 0, **settings})
    return TrainingStream(str(folder), config, seed=3, rank=rank, world=world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_processes_and_resuming_change_no_bit(folder: Path, world: int, workers: int) -> None:
    whole = take(stream(folder), 0, 7)  # beyond three epochs: 9 clips, 4 a step
    later = run(folder, world, workers, 3, 4)
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


def test_digests_tell_runs_apart(folder: Path) -> None:
    with stream(folder) as one, stream(folder, batch=2) as other:
        assert len({one.digest(step) for step in range(12)}) == 12
        assert one.digest(5) != other.digest(5)


def test_a_killed_worker_costs_nothing(folder: Path) -> None:
    whole = take(stream(folder), 0, 30)
    killed = []
    with stream(folder, workers=2) as source:
        found = []
        for step, batch in enumerate(itertools.islice(source.batches(0), 30)):
            found.append({name: value.clone() if name != "keys" else value for name, value in batch.items()})
            if step in (3, 4, 15):
                for process in workers_of(os.getpid())[: 1 if step == 4 else 2]:
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
    assert len(set(killed)) >= 4
    assert all(same(a, b) for a, b in zip(whole, found, strict=True))


def test_workers_that_die_again_and_again_end_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"die again and again .* over the clips s\d"):
        take(stream(folder, workers=1), 0, 1)


def test_workers_end_with_their_parent(folder: Path) -> None:
    code = (
        "import itertools, sys, time\n"
        "from shards.stream import StreamConfig, TrainingStream\n"
        f"source = TrainingStream({str(folder)!r}, StreamConfig(batch=4, crop_frames=20, workers=2), 0)\n"
        "list(itertools.islice(source.batches(0), 2))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    children = workers_of(process.pid)
    assert len(children) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end, "workers outlive the process that they worked for"
        time.sleep(0.05)


def workers_of(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            status = Path(path.parent, "status").read_text()
            if any(b"shards.filler" in word for word in words) and f"PPid:\t{parent}\n" in status:
                found.append(int(path.parent.name))
    return found


def test_batches_that_are_kept_stay_as_they_are(folder: Path) -> None:
    with stream(folder, workers=1) as source:
        batches = source.host_batches(0)
        kept = list(itertools.islice(batches, 12))
        copies = [{name: value.clone() for name, value in part.items() if name != "keys"} for part in kept]
        list(itertools.islice(batches, 5))
        assert all(same(a, b) for a, b in zip(copies, kept, strict=True))


def test_memory_is_used_again(folder: Path) -> None:
    with stream(folder, workers=1) as source:
        places = {batch["lips"].data_ptr() for batch in itertools.islice(source.host_batches(0), 40)}
    assert len(places) <= 5


@pytest.mark.parametrize("raw", [False, True])
def test_the_worker_augments_as_the_device_does(tmp_path: Path, raw: bool) -> None:
    toy_dataset(tmp_path, SHARDS, raw=raw)
    here = take(stream(tmp_path, augment_on="device"), 0, 12)
    there = take(stream(tmp_path, augment_on="worker", workers=1), 0, 12)
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_raw_lips_are_the_same_pixels(folder: Path, tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS, raw=True)
    pairs = zip(take(stream(folder), 0, 6), take(stream(tmp_path), 0, 6), strict=True)
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


def test_a_run_goes_on_with_its_own_state_of_a_rebuilt_dataset(tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS)
    with stream(tmp_path, workers=1) as source:
        batches = source.batches(0)
        whole = [next(batches) for _ in range(2)]
        toy_dataset(tmp_path, [[20, 21], [33]])
        whole += [next(batches) for _ in range(3)]
        state = source.snapshots
    again = TrainingStream(str(tmp_path), source.config, seed=3, snapshots=state)
    assert all(same(a, b) for a, b in zip(whole[1:], take(again, 1, 4), strict=True))
    assert {key for batch in take(stream(tmp_path), 0, 3) for key in batch["keys"]} == {"s0c0", "s0c1", "s1c0"}
    Path(tmp_path, state[0].index).unlink()
    with pytest.raises(UserError, match="state that this run began with is not here"):
        TrainingStream(str(tmp_path), source.config, seed=3, snapshots=state)


def damage(folder: Path, shard: int, how: str) -> str:
    entry = Dataset(str(folder)).index().shards[shard]
    path = folder / entry.name
    data = bytearray(path.read_bytes())
    place = entry.clips[0].members["units"][0]
    data[place : place + 6] = b"XXXXXX"
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:5000] if how == "cut" else data)
    return entry.name


@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_shard_is_named_or_skipped_and_counted(tmp_path: Path, how: str, verify: bool) -> None:
    toy_dataset(tmp_path, SHARDS)
    name = damage(tmp_path, 1, how)
    with pytest.raises(UserError, match=name):
        take(stream(tmp_path, verify=verify), 0, 5)
    with stream(tmp_path, verify=verify, damaged="skip", workers=1) as source:
        found = list(itertools.islice(source.batches(0), 9))
        assert len(source.skipped) == 1
        assert name in source.skipped[0]
    keys = [key for batch in found for key in batch["keys"]]
    assert len(keys) == 36
    assert not any(key.startswith("s1") for key in keys)
    assert {key for key in keys if key.startswith("s0")} == {"s0c0", "s0c1", "s0c2"}
    whole = take(stream(tmp_path, verify=verify, damaged="skip"), 0, 9)
    assert all(same(a, b) for a, b in zip(whole, found, strict=True))


def test_when_every_shard_is_damaged_it_says_so(tmp_path: Path) -> None:
    toy_dataset(tmp_path, [[20], [30]])
    for shard in (0, 1):
        damage(tmp_path, shard, "cut")
    with pytest.raises(UserError, match="every shard of split 'train' is damaged"):
        take(stream(tmp_path, damaged="skip"), 0, 1)


def test_an_error_comes_at_its_step_not_before(tmp_path: Path) -> None:
    toy_dataset(tmp_path, [[20 + clip for clip in range(8)], [30 + clip for clip in range(8)]])
    with stream(tmp_path, window=1) as source:
        first = next(step for step in itertools.count() if any(clip[1] >= 8 for clip in source.global_clips(step)))
        other = next(step for step in itertools.count() if any(clip[1] < 8 for clip in source.global_clips(step)))
    damage(tmp_path, 1 if first > other else 0, "cut")
    with stream(tmp_path, window=1, workers=1, prefetch=4) as source:
        batches = source.batches(0)
        for _ in range(max(first, other)):
            next(batches)
        with pytest.raises(UserError, match=r"long, the index says"):
            next(batches)


def test_filters_choose_by_the_clip_table(tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS, speakers=["ann", "bob", "12"])

    def keys(**where: object) -> set[str]:
        with stream(tmp_path, where=where) as source:
            return set(source.tables[0].keys)

    assert keys(speaker={"one_of": ["ann"]}) == {"s0c0", "s0c1", "s0c2"}
    assert keys(speaker={"one_of": [12]}) == {"s2c0", "s2c1", "s2c2", "s2c3"}
    assert keys(speaker={"none_of": ["ann", "bob"]}) == {"s2c0", "s2c1", "s2c2", "s2c3"}
    assert keys(duration={"at_least": 1.0, "at_most": 1.2}) == {"s0c0", "s1c0"}
    assert keys(frames={"at_least": 26}, speaker={"one_of": ["bob", 12]}) == {"s2c0"}
    with pytest.raises(UserError, match=r"data\.where\.snr: .* no such column; there are .*speaker.*duration"):
        keys(snr={"at_least": 10})
    with pytest.raises(UserError, match="a text has no at_least"):
        keys(speaker={"at_least": 10})
    with pytest.raises(UserError, match=r"no clips of 13 frames or more .* that meet speaker"):
        keys(speaker={"one_of": ["eve"]})


def test_datasets_are_mixed_by_their_weights(folder: Path, tmp_path: Path) -> None:
    toy_dataset(tmp_path / "b", [[21, 22], [23]])
    mix = [{"uri": str(tmp_path / "b"), "weight": 3}]
    whole = take(stream(folder, mix=mix, batch=8), 0, 40)
    assert all(same(a, b) for a, b in zip(whole[35:], run(folder, 2, 1, 35, 5, mix=mix, batch=8), strict=True))
    with stream(folder, mix=mix, batch=8) as source:
        drawn = Counter(clip[0] for step in range(128) for clip in source.global_clips(step))
        assert drawn == {0: 256, 1: 768}
        assert source.clips == 12
    lengths = [int(frames) for batch in whole for frames in batch["frames"]]
    assert len(lengths) == 320


def test_filters_and_orders_of_a_mixture_are_each_datasets_own(folder: Path, tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS, speakers=["ann", "bob", "12"])
    mix = [{"uri": str(tmp_path), "where": {"speaker": {"one_of": ["bob", 12]}}}]
    with stream(folder, mix=mix) as source:
        assert len(source.tables[0].keys) == 9
        assert set(source.tables[1].keys) == {"s1c0", "s1c1", "s2c0", "s2c1", "s2c2", "s2c3"}
    with stream(folder, mix=[{"uri": str(folder)}], window=3) as source:
        drawn = [clip for step in range(18) for clip in source.global_clips(step)]
    one, two = ([clip for dataset, clip, epoch in drawn if dataset == number and epoch == 0] for number in (0, 1))
    assert one[: min(len(one), len(two))] != two[: min(len(one), len(two))]


def test_a_mixture_goes_on_with_its_own_states(folder: Path, tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS, speakers=["ann", "bob", "12"])
    settings = {"mix": [{"uri": str(tmp_path), "where": {"speaker": {"one_of": ["ann"]}}}]}
    first = stream(folder, **settings)
    whole = take(first, 0, 6)
    toy_dataset(tmp_path, SHARDS, speakers=["eve", "ann", "12"])
    again = TrainingStream(str(folder), first.config, seed=3, snapshots=first.snapshots)
    assert all(same(a, b) for a, b in zip(whole[2:], take(again, 2, 4), strict=True))
    with pytest.raises(UserError, match="began with 2 datasets, not 1"):
        TrainingStream(str(folder), StreamConfig(), seed=3, snapshots=first.snapshots)


def test_seeds_and_epochs_change_the_crop_of_a_clip(tmp_path: Path) -> None:
    toy_dataset(tmp_path, [[500]], fields=NEEDED, raw=True)
    starts = []
    for seed in (1, 2):
        with TrainingStream(str(tmp_path), StreamConfig(batch=1, crop_frames=20, workers=0), seed) as source:
            starts.append([int(batch["start"]) for batch in itertools.islice(source.host_batches(0), 5)])
    assert len({*starts[0], *starts[1]}) > 7


def test_skipping_gives_every_rank_its_part_of_one_batch(tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS)
    damage(tmp_path, 2, "cut")
    whole = take(stream(tmp_path, damaged="skip", batch=8), 0, 9)
    assert all(same(a, b) for a, b in zip(whole, run(tmp_path, 4, 0, 0, 9, damaged="skip", batch=8), strict=True))


def test_many_small_batches_ahead_do_not_block(folder: Path) -> None:
    with stream(folder, workers=1, prefetch=500) as source:
        assert len(list(itertools.islice(source.host_batches(0), 3))) == 3


def test_closing_does_not_wait_for_somebody_elses_child(folder: Path) -> None:
    with stream(folder, workers=1) as source:
        next(source.host_batches(0))
        child = os.fork()
        if not child:
            time.sleep(20)
            os._exit(0)
        begin = time.monotonic()
        source.close()
        taken = time.monotonic() - begin
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert taken < 5


def test_interrupting_ends_a_wait(folder: Path) -> None:
    with stream(folder, workers=1) as source:
        batches = source.batches(0)
        next(batches)
        for process in workers_of(os.getpid()):
            os.kill(process, signal.SIGSTOP)
        timer = threading.Timer(0.5, source.interrupt)
        timer.start()
        assert len(list(batches)) < 5
        for process in workers_of(os.getpid()):
            os.kill(process, signal.SIGCONT)


def test_a_module_of_the_working_folder_is_not_taken_for_ours(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shards.py").write_text("raise SystemExit('not this one')")
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')")
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert len(take(stream(folder, workers=1), 0, 2)) == 2
    finally:
        os.chdir(before)


def test_a_stream_that_is_dropped_ends_its_workers(folder: Path) -> None:
    source = stream(folder, workers=2)
    next(source.batches(0))
    assert len(workers_of(os.getpid())) == 2
    del source
    gc.collect()
    assert not workers_of(os.getpid())


def test_datasets_made_in_different_ways_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    changed = {**RECIPES, "mel": Recipe(version=1, settings={"filterbank": "slaney"}, weights="")}
    toy_dataset(tmp_path / "mel", SHARDS, recipes=changed)
    toy_dataset(tmp_path / "paper", SHARDS, profile="paper")
    with pytest.raises(UserError, match=r"stage mel differs .*filterbank htk -> slaney"):
        stream(folder, mix=[{"uri": str(tmp_path / "mel")}])
    with pytest.raises(UserError, match="profile offline and profile paper"):
        stream(folder, mix=[{"uri": str(tmp_path / "paper")}])


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
    with pytest.raises(UserError, match="ranks are 0 to 3"):
        stream(folder, rank=4, world=4)
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
