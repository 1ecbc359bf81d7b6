"""Field values to bytes and back. No pickle; every length is checked against the bytes at hand."""

from __future__ import annotations

import io
import json
import tokenize
import wave
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.schema import FIELDS, SAMPLE_RATE, Field, SchemaError
from shards.strips import decode_strip, encode_strip


def encode(field: Field, value: Any) -> bytes:
    """Bytes of one value, the same on every machine for the same value.

    `npy` is numpy format 1.0 in C order, `jpg` a strip of quality 95, `wav` 16-bit PCM mono 16 kHz, `json` has sorted
    keys and plain ASCII.
    """
    if field.encoding == "json":
        return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()
    if field.encoding == "jpg":
        return encode_strip(value)
    buffer = io.BytesIO()
    if field.encoding == "wav":
        with wave.open(buffer, "wb") as writer:
            writer.setnchannels(1)
            writer.setsampwidth(2)
            writer.setframerate(SAMPLE_RATE)
            writer.writeframes(value.astype("<i2", copy=False).tobytes())
    else:
        np.lib.format.write_array(buffer, np.ascontiguousarray(value), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def encode_sound(samples: NDArray[np.floating[Any]]) -> bytes:
    """A wav file, 16-bit PCM mono 16 kHz, of samples [N] within -1..1."""
    return encode(FIELDS["wav"], np.round(samples * 32767).astype(np.int16))


def decode(field: Field, data: bytes, frames: int, start: int = 0, stop: int | None = None) -> Any:
    """Value of one member.

    Args:
        frames: F of the clip; needed for the geometry of `jpg` strips.
        start, stop: video frames to give of a field with one entry per video frame, default all; of a `jpg` strip, no
            others are decoded. Other fields ignore them.

    Raises:
        SchemaError: the bytes are damaged or of another kind than the field's encoding.
    """
    try:
        if field.encoding == "json":
            return json.loads(data)
        if field.encoding == "wav":
            return _read_wav(field, data)
        if field.encoding == "npy":
            value = _read_npy(field, data)
            return value[start:stop] if field.shape[0] == "F" else value
    except (ValueError, EOFError, RuntimeError, wave.Error, tokenize.TokenError) as error:
        raise SchemaError(f"{field.name}: damaged {field.encoding} ({error})") from None
    _, height, width = field.shape[:3]
    assert isinstance(height, int)
    assert isinstance(width, int)
    return decode_strip(data, frames, height, width, start, stop)


def _read_npy(field: Field, data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise SchemaError(f"{field.name}: npy format version is not 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or fortran:
        raise SchemaError(f"{field.name}: npy holds objects or Fortran order")
    body = data[stream.tell() :]
    # Sizes are compared before anything is allocated: the header comes from outside.
    count = 1
    for length in shape:
        count *= int(length)
    if count * dtype.itemsize != len(body):
        raise SchemaError(f"{field.name}: npy header says {shape} {dtype}, {len(body)} bytes follow")
    return np.frombuffer(body, dtype).reshape(shape)


def _read_wav(field: Field, data: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(data), "rb") as reader:
        if (reader.getnchannels(), reader.getsampwidth(), reader.getframerate()) != (1, 2, SAMPLE_RATE):
            raise SchemaError(f"{field.name}: not 16-bit mono {SAMPLE_RATE} Hz PCM")
        samples = np.frombuffer(reader.readframes(reader.getnframes()), "<i2")
        if len(samples) != reader.getnframes():
            raise SchemaError(f"{field.name}: wav header says {reader.getnframes()} samples, {len(samples)} follow")
        return samples.astype(np.int16, copy=False)
