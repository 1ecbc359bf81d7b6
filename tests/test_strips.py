"""JPEG strips: any range of frames decodes as it does in the whole, and damage is one clear error."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.schema import SchemaError
from shards.strips import decode_strip, encode_strip


def clip(frames: int, size: int, colour: bool, seed: int = 0) -> np.ndarray:
    """Smooth moving pictures with some noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    moving = np.stack([np.sin(6 * x + f / 3) * np.cos(5 * y - f / 4) for f in range(frames)])
    pictures = 127 + 90 * moving + random.normal(0, 3, moving.shape)
    grey = pictures.clip(0, 255).astype(np.uint8)
    return np.stack([grey, grey[..., ::-1], 255 - grey], -1) if colour else grey


@given(st.booleans(), st.integers(1, 30), st.data())
@settings(max_examples=40, deadline=None)
def test_a_range_equals_the_slice_of_the_whole(colour: bool, frames: int, data: st.DataObject) -> None:
    size = 112 if colour else 96
    strip = encode_strip(clip(frames, size, colour))
    start = data.draw(st.integers(0, frames - 1))
    stop = data.draw(st.integers(start + 1, frames))
    whole = decode_strip(strip, frames, size, size)
    np.testing.assert_array_equal(decode_strip(strip, frames, size, size, start, stop), whole[start:stop])
    # Any viewer sees the frames below each other.
    sheet = np.asarray(Image.open(io.BytesIO(strip)))
    np.testing.assert_array_equal(sheet.reshape(whole.shape), whole)


@pytest.mark.parametrize("colour", [False, True])
def test_little_is_lost(colour: bool) -> None:
    frames = clip(10, 96, colour)
    error = decode_strip(encode_strip(frames), 10, 96, 96).astype(float) - frames
    assert 10 * np.log10(255**2 / (error**2).mean()) > 38


def test_long_clips_take_more_columns() -> None:
    frames = np.repeat(np.arange(1500) % 256, 96 * 96).astype(np.uint8).reshape(1500, 96, 96)
    strip = encode_strip(frames)
    assert Image.open(io.BytesIO(strip)).size == (3 * 96, 500 * 96)
    for start, stop in ((0, 1500), (1499, 1500), (700, 796), (1, 2)):
        np.testing.assert_allclose(decode_strip(strip, 1500, 96, 96, start, stop), frames[start:stop], atol=1)


def test_damage_and_lies_are_schema_errors() -> None:
    strip = encode_strip(clip(6, 96, False))
    progressive = io.BytesIO()
    Image.fromarray(clip(6, 96, False).reshape(-1, 96)).save(progressive, "JPEG", progressive=True)
    at = strip.index(b"\xff\xc0") + 5
    giant = strip[:at] + b"\xff\xff\xff\xff" + strip[at + 4 :]
    for bad in (b"", b"GIF89a", strip[:100], strip[: len(strip) // 2], progressive.getvalue(), giant, strip[:-2]):
        with pytest.raises(SchemaError):
            decode_strip(bad, 6, 96, 96, 2, 4)
    for frames, height in ((5, 96), (7, 96), (6, 88)):
        with pytest.raises(SchemaError):
            decode_strip(strip, frames, height, 96)
    for start, stop in ((-1, 2), (0, 7), (3, 3)):
        with pytest.raises(SchemaError):
            decode_strip(strip, 6, 96, 96, start, stop)
