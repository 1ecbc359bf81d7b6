"""Streams that read some fields alone: nothing else is touched, and sound lies where its mel does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model.train_config import train_config
from shards.errors import UserError
from shards.layout import NEEDED, layout
from shards.mel import log_mel
from shards.stream_config import StreamConfig
from shards.whole_clips import WholeClips
from tests import toy
from tests.streams import SHARDS, run, same, stream, take
from tests.toy import toy_dataset, toy_values

SOUND = ("wav", "mel")


def test_a_stream_of_sound_has_the_clips_and_crops_of_the_whole(toy_folder: Path) -> None:
    whole = take(stream(toy_folder), 0, 7)
    sound = take(stream(toy_folder, fields=SOUND), 0, 7)
    for all_of_it, part in zip(whole, sound, strict=True):
        assert set(part) == {"wave", "mel", "frames", "keys"}
        assert same({name: part[name] for name in ("mel", "frames", "keys")}, all_of_it)


def test_the_wave_is_cut_in_step_with_the_mel(toy_folder: Path) -> None:
    padded = False
    for batch in take(stream(toy_folder, fields=SOUND), 0, 5):
        assert batch["wave"].shape == (4, 1, 640 * 20)
        assert batch["wave"].dtype == torch.float32
        for row, key in enumerate(batch["keys"]):
            frames = int(batch["frames"][row])
            begin = int(batch["mel"][row, 0, 0])  # this bin of the made-up mel counts acoustic frames
            clip = toy_values(key, SHARDS[int(key[1])][int(key[3])])["wav"]
            cut = clip[320 * begin : 320 * begin + 640 * frames] / 32768
            np.testing.assert_array_equal(batch["wave"][row, 0, : 640 * frames], cut.astype(np.float32))
            assert not batch["wave"][row, 0, 640 * frames :].any()
            padded |= frames < 20
    assert padded


def test_the_mel_of_a_cut_is_that_of_its_wave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoken(key: str, frames: int, split: str = "train") -> dict[str, Any]:
        values = toy_values(key, frames, split)
        return {**values, "mel": log_mel(values["wav"] / 32768)}

    monkeypatch.setattr(toy, "toy_values", spoken)
    toy_dataset(tmp_path, [[40, 50], [45]])
    for batch in take(stream(tmp_path, fields=SOUND), 0, 3):
        for row in range(4):
            found = log_mel(batch["wave"][row, 0].numpy())
            # A frame's window reaches 1.5 frames beyond it.
            np.testing.assert_allclose(found[2:-2], batch["mel"][row].T[2:-2], atol=1e-5)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1)])
def test_processes_and_resuming_change_no_bit_of_sound(toy_folder: Path, world: int, workers: int) -> None:
    fields = ("wav", "mel", "units", "timbre")
    whole = take(stream(toy_folder, fields=fields), 0, 6)
    later = run(toy_folder, world, workers, 2, 4, fields=fields)
    assert all(same(a, b) for a, b in zip(whole[2:], later, strict=True))


def test_what_is_not_wanted_need_not_be_there(tmp_path: Path) -> None:
    toy_dataset(tmp_path, SHARDS, fields=(*SOUND, "energy"))
    [batch] = take(stream(tmp_path, fields=SOUND), 0, 1)
    assert batch["wave"].abs().max() > 0
    with pytest.raises(UserError, match=r"training needs the fields \['lips'.*pack\.fields"):
        stream(tmp_path)


def test_other_fields_are_not_read(toy_folder: Path, tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path, SHARDS)
    [before] = take(stream(toy_folder, fields=SOUND), 0, 1)
    for shard in dataset.index().shards:
        path = tmp_path / shard.name
        data = bytearray(path.read_bytes())
        for clip in shard.clips:
            for name in set(clip.members) - set(SOUND):
                offset, size = clip.members[name]
                data[offset : offset + size] = bytes(size)
        path.write_bytes(data)
    [after] = take(stream(tmp_path, fields=SOUND, verify=False), 0, 1)
    assert same(before, after)


def test_batches_take_no_memory_for_other_fields() -> None:
    widths = tuple(toy.WIDTHS.items())
    sound = layout(16, 14, widths, False, SOUND).bytes
    assert 16 * 14 * (640 * 2 + 2 * 80 * 4) <= sound < 16 * 14 * (640 * 2 + 2 * 80 * 4) + 1000
    assert layout(16, 14, widths, False, NEEDED).bytes > 5 * sound


def test_a_wav_of_another_length_is_damage(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path, [[30]])
    [shard] = dataset.index().shards
    path = tmp_path / shard.name
    data = bytearray(path.read_bytes())
    offset, _ = shard.clips[0].members["wav"]
    data[offset + 40] ^= 1  # size of its data
    path.write_bytes(data)
    with pytest.raises(UserError, match="s0c0: wav: not the wav of 19200 samples that the index says"):
        take(stream(tmp_path, fields=SOUND, verify=False), 0, 1)


def test_whole_clips_have_their_sound(toy_folder: Path) -> None:
    config = StreamConfig(workers=0, fields=("wav",))
    for batch in WholeClips(str(toy_folder), config, 60).batches():
        for row, key in enumerate(batch["keys"]):
            clip = toy_values(key, SHARDS[int(key[1])][int(key[3])])["wav"].astype(np.float32) / 32768
            np.testing.assert_array_equal(batch["wave"][row, 0, : len(clip)], clip)
            assert not batch["wave"][row, 0, len(clip) :].any()


def test_fields_are_checked() -> None:
    for fields in ((), ("mel", "mel")):
        with pytest.raises(ValidationError, match="at least one field"):
            StreamConfig(fields=fields)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data\.fields\.1: choose from lips, identity, .*wav"):
        train_config(None, ["data.fields=[mel, sound]"])
    with pytest.raises(UserError, match=r"data: fields: this network needs lips, identity, expression"):
        train_config(None, ["data.fields=[units, timbre, pitch, energy, mel]"])
