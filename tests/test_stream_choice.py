"""What the training stream reads: filters, mixtures, states of a dataset, damage."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import Recipe
from shards.stream import StreamConfig, TrainingStream
from tests.streams import SHARDS, run, same, stream, take
from tests.toy import RECIPES, toy_dataset


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
    words = r"no clips of 13 frames or more .* that meet speaker one_of \[ann\], frames at_least 31$"
    with pytest.raises(UserError, match=words):
        keys(speaker={"one_of": ["ann"]}, frames={"at_least": 31})
    with pytest.raises(UserError, match=r"data\.where\.speaker: no clip of .* has 'eve'; there are 12, ann, bob$"):
        keys(speaker={"none_of": ["eve"]})
    with pytest.raises(UserError, match="no clips of 13 frames or more"):
        # A clip without a value meets no condition.
        keys(start={"at_least": 0})
    with pytest.raises(UserError, match=rf"^no split 'trian' in {tmp_path}; splits are train$"):
        stream(tmp_path, split="trian")
    # Only what could be drawn is suggested.
    with pytest.raises(UserError, match=r"no clip of .* has 'eve'; there are 12, ann$"):
        stream(tmp_path, min_frames=28, where={"speaker": {"one_of": ["ann", "eve"]}})


def test_datasets_are_mixed_by_their_weights(toy_folder: Path, tmp_path: Path) -> None:
    toy_dataset(tmp_path / "b", [[21, 22], [23]])
    mix = [{"uri": str(tmp_path / "b"), "weight": 3}]
    whole = take(stream(toy_folder, mix=mix, batch=8), 0, 40)
    assert all(same(a, b) for a, b in zip(whole[35:], run(toy_folder, 2, 1, 35, 5, mix=mix, batch=8), strict=True))
    with stream(toy_folder, mix=mix, batch=8) as source:
        drawn = Counter(clip[0] for step in range(128) for clip in source.global_clips(step))
        assert drawn == {0: 256, 1: 768}
        assert source.clips == 12
    lengths = [int(frames) for batch in whole for frames in batch["frames"]]
    assert len(lengths) == 320


def test_filters_and_orders_of_a_mixture_are_each_datasets_own(toy_folder: Path, tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS, speakers=["ann", "bob", "12"])
    mix = [{"uri": str(tmp_path), "where": {"speaker": {"one_of": ["bob", 12]}}}]
    with stream(toy_folder, mix=mix) as source:
        assert len(source.tables[0].keys) == 9
        assert set(source.tables[1].keys) == {"s1c0", "s1c1", "s2c0", "s2c1", "s2c2", "s2c3"}
    with pytest.raises(UserError, match=r"^data\.mix\.0\.where\.speaker: no clip of .* has 'eve'"):
        stream(toy_folder, mix=[{"uri": str(tmp_path), "where": {"speaker": {"one_of": ["eve"]}}}])
    with stream(toy_folder, mix=[{"uri": str(toy_folder)}], window=3) as source:
        drawn = [clip for step in range(18) for clip in source.global_clips(step)]
    one, two = ([clip for dataset, clip, epoch in drawn if dataset == number and epoch == 0] for number in (0, 1))
    assert one[: min(len(one), len(two))] != two[: min(len(one), len(two))]


def test_a_mixture_goes_on_with_its_own_states(toy_folder: Path, tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS, speakers=["ann", "bob", "12"])
    settings = {"mix": [{"uri": str(tmp_path), "where": {"speaker": {"one_of": ["ann"]}}}]}
    first = stream(toy_folder, **settings)
    whole = take(first, 0, 6)
    toy_dataset(tmp_path, SHARDS, speakers=["eve", "ann", "12"])
    again = TrainingStream(str(toy_folder), first.config, seed=3, snapshots=first.snapshots)
    assert all(same(a, b) for a, b in zip(whole[2:], take(again, 2, 4), strict=True))
    with pytest.raises(UserError, match="began with 2 datasets, not 1"):
        TrainingStream(str(toy_folder), StreamConfig(), seed=3, snapshots=first.snapshots)


def test_skipping_gives_every_rank_its_part_of_one_batch(tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS)
    damage(tmp_path, 2, "cut")
    whole = take(stream(tmp_path, damaged="skip", batch=8), 0, 9)
    assert all(same(a, b) for a, b in zip(whole, run(tmp_path, 4, 0, 0, 9, damaged="skip", batch=8), strict=True))


def test_datasets_made_in_different_ways_are_not_mixed(toy_folder: Path, tmp_path: Path) -> None:
    changed = {**RECIPES, "mel": Recipe(version=1, settings={"filterbank": "slaney"}, weights="")}
    toy_dataset(tmp_path / "mel", SHARDS, recipes=changed)
    toy_dataset(tmp_path / "paper", SHARDS, profile="paper")
    with pytest.raises(UserError, match=r"stage mel differs .*filterbank htk -> slaney"):
        stream(toy_folder, mix=[{"uri": str(tmp_path / "mel")}])
    with pytest.raises(UserError, match="profile offline and profile paper"):
        stream(toy_folder, mix=[{"uri": str(tmp_path / "paper")}])
