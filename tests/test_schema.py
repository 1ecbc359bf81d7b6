"""Length rules and value checks of the schema, and the codec behind them."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.codec import decode, encode
from shards.schema import FIELDS, SchemaError, check_sample, check_value, frames_of

LENGTHS = {"boxes": 1, "landmarks": 1, "lips": 1, "face": 1, "mel": 2, "pitch": 2, "energy": 2, "units": 2, "wav": 640}
"""Values per video frame: 25 Hz picture, 50 Hz features, 16 kHz sound."""


def value(name: str, frames: int, extra: int = 0) -> np.ndarray:
    field = FIELDS[name]
    shape = (frames * LENGTHS[name] + extra, *field.shape[1:])
    random = np.random.default_rng(frames)
    return (random.random(shape) * 100).astype(field.dtype)


@pytest.mark.parametrize("name", sorted(LENGTHS))
@given(frames=st.integers(1, 8), off=st.sampled_from([-1, 0, 1]))
@settings(max_examples=12)
def test_only_the_exact_length_passes(name: str, frames: int, off: int) -> None:
    array = value(name, frames, off)
    if off == 0:
        check_value(FIELDS[name], array, frames)
        assert frames_of(FIELDS[name], array) == frames
    else:
        with pytest.raises(SchemaError, match=name):
            check_value(FIELDS[name], array, frames)


def test_wrong_dtype_shape_and_numbers_are_refused() -> None:
    good = value("mel", 3)
    for bad in (
        good.astype(np.float64),
        good[:, :79],
        good[:, :, None],
        np.full_like(good, np.nan),
        np.full_like(good, np.inf),
    ):
        with pytest.raises(SchemaError):
            check_value(FIELDS["mel"], bad, 3)
    check_value(FIELDS["pitch"], np.full(6, np.nan, np.float32), 3)  # NaN says unvoiced
    with pytest.raises(SchemaError):
        check_value(FIELDS["pitch"], np.full(6, np.inf, np.float32), 3)
    with pytest.raises(SchemaError, match="no such field"):
        check_sample({"melody": good}, 3)


def test_one_dataset_has_one_width() -> None:
    widths: dict[str, int] = {}
    check_value(FIELDS["timbre"], np.zeros(384, np.float32), 1, widths)
    with pytest.raises(SchemaError):
        check_value(FIELDS["timbre"], np.zeros(1024, np.float32), 1, widths)


@pytest.mark.parametrize("name", ["boxes", "mel", "pitch", "units", "wav"])
def test_values_survive_storage(name: str) -> None:
    array = value(name, 4)
    back = decode(FIELDS[name], encode(FIELDS[name], array), 4)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_plain_libraries_read_the_bytes() -> None:
    mel, sound = value("mel", 2), value("wav", 2)
    np.testing.assert_array_equal(np.load(io.BytesIO(encode(FIELDS["mel"], mel)), allow_pickle=False), mel)
    with wave.open(io.BytesIO(encode(FIELDS["wav"], sound))) as reader:
        assert (reader.getframerate(), reader.getnchannels(), reader.getsampwidth()) == (16000, 1, 2)
        np.testing.assert_array_equal(np.frombuffer(reader.readframes(9999), "<i2"), sound)


def test_hostile_bytes_give_schema_errors() -> None:
    import pickle

    stream = io.BytesIO()
    np.save(stream, np.array([{"x": 1}], dtype=object), allow_pickle=True)
    pickled = stream.getvalue()
    whole = encode(FIELDS["mel"], value("mel", 2))
    # A header that promises a terabyte must not allocate it.
    assert b"(4, 80), }          " in whole[:128]
    huge = whole.replace(b"(4, 80), }          ", b"(4000000000, 80), } ")
    broken = whole[:20] + b"(" + whole[21:]
    for data in (broken, pickled, whole[:-1], whole + b"x", b"", b"\x93NUMPY", pickle.dumps(1), huge):
        with pytest.raises(SchemaError):
            decode(FIELDS["mel"], data, 2)
    for data in (b"RIFF", b"", encode(FIELDS["wav"], value("wav", 1))[:-3]):
        with pytest.raises(SchemaError):
            decode(FIELDS["wav"], data, 1)
    with pytest.raises(SchemaError):
        decode(FIELDS["meta"], b"{", 1)
