"""Whole clips for evaluation: each once, little padding, the same with any number of processes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.layout import NEEDED
from shards.stream_config import StreamConfig
from shards.whole_clips import WholeClips
from tests.streams import SHARDS, same
from tests.test_stream_choice import damage
from tests.toy import toy_dataset, toy_values


def clips(folder: Path | str, max_frames: int, rank: int = 0, world: int = 1, **settings: object) -> WholeClips:
    config = StreamConfig.model_validate({"workers": 0, **settings})
    return WholeClips(str(folder), config, max_frames, rank, world)


@given(
    st.lists(st.lists(st.integers(13, 60), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(20, 200),
)
@settings(max_examples=15, deadline=None)
def test_every_clip_comes_once_within_the_budget(shards: list[list[int]], window: int, budget: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        toy_dataset(folder, shards, fields=NEEDED)
        source = clips(folder, budget, window=window)
        found = list(source.batches())
    assert len(found) == len(source)
    keys = [key for batch in found for key in batch["keys"]]
    assert sorted(keys) == sorted(f"s{s}c{c}" for s, lengths in enumerate(shards) for c in range(len(lengths)))
    for batch in found:
        rows, _, frames = batch["lips"].shape[:3]
        assert frames == int(batch["frames"].max())
        assert rows == 1 or rows * frames <= budget


def test_clips_are_whole_and_not_augmented(tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS)
    for batch in clips(tmp_path, 100).batches():
        for row, key in enumerate(batch["keys"]):
            frames = SHARDS[int(key[1])][int(key[3])]
            values = toy_values(key, frames)
            assert int(batch["frames"][row]) == frames
            np.testing.assert_array_equal(batch["mel"][row, :, : 2 * frames].T, values["mel"])
            np.testing.assert_array_equal(batch["units"][row, : 2 * frames], values["units"])
            np.testing.assert_array_equal(batch["identity"][row, :frames], values["identity"].astype(np.float32))
            grey = (batch["lips"][row, 0, :frames].mean((1, 2)) * 0.165 + 0.421) * 255
            np.testing.assert_allclose(grey, 2 * np.arange(frames), atol=1.5)
            assert (batch["units"][row, 2 * frames :] == -100).all()
            assert not batch["lips"][row, 0, frames:].any()


def test_ranks_and_workers_change_nothing(tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS)
    whole = list(clips(tmp_path, 60).batches())
    for world, workers in ((1, 2), (2, 1)):
        parts = [list(clips(tmp_path, 60, rank, world, workers=workers).batches()) for rank in range(world)]
        for number, batch in enumerate(whole):
            assert same(batch, parts[number % world][number // world])


def test_little_is_padding(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    toy_dataset(tmp_path, [random.integers(13, 100, 60).tolist() for _ in range(2)], fields=NEEDED)
    found = list(clips(tmp_path, 600).batches())
    taken = sum(int(batch["lips"].shape[0] * batch["lips"].shape[2]) for batch in found)
    assert sum(int(batch["frames"].sum()) for batch in found) / taken > 0.9


def test_it_can_be_run_again(tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS)
    source = clips(tmp_path, 60)
    one, two = list(source.batches()), list(source.batches())
    assert all(same(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("verify", [True, False])
def test_damage_stops_or_is_left_out_and_said(tmp_path: Path, verify: bool) -> None:
    toy_dataset(tmp_path, SHARDS)
    whole = {key: row for batch in clips(tmp_path, 60).batches() for key, row in rows(batch)}
    name = damage(tmp_path, 1, "changed")
    with pytest.raises(UserError, match=name):
        list(clips(tmp_path, 60, verify=verify).batches())
    source = clips(tmp_path, 60, verify=verify, damaged="skip", workers=1)
    found = {key: row for batch in source.batches() for key, row in rows(batch)}
    assert set(whole) - set(found) >= {"s1c0"}
    assert not any(key.startswith("s1") for key in found) or not verify
    assert len(source.skipped) == 1
    assert name in source.skipped[0]
    assert all(torch.equal(whole[key], row) for key, row in found.items())


def rows(batch: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    lengths = (2 * batch["frames"]).tolist()
    return [(key, batch["mel"][row, :, : lengths[row]].clone()) for row, key in enumerate(batch["keys"])]
