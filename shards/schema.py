"""The single definition of every stored field: name, file ending, dtype, shape, unit and the stage that writes it.

Lengths hang on one number per clip: F video frames at 25 Hz, T = 2F acoustic frames at 50 Hz, N = 640F samples at
16 kHz. Writer, verifier, loader and the docs table all read `FIELDS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

SCHEMA_VERSION = 3

VIDEO_RATE = 25
"""Video frames per second after resampling."""
MEL_RATE = 50
"""Acoustic frames per second: mel, pitch, energy, units."""
SAMPLE_RATE = 16_000
"""Audio samples per second."""
MEL_PER_FRAME = MEL_RATE // VIDEO_RATE
HOP = SAMPLE_RATE // MEL_RATE
SAMPLES_PER_FRAME = SAMPLE_RATE // VIDEO_RATE
MEL_BINS = 80
LIP_SIZE = 96
FACE_SIZE = 112

Encoding = Literal["npy", "jpg", "wav", "json"]


class SchemaError(ValueError):
    """A value does not have the dtype, shape or range that the schema states for its field."""


@dataclass(frozen=True)
class Field:
    """One stored field of a clip.

    Attributes:
        name: key in a sample.
        encoding: how it is stored: `npy`, `jpg` (strip of frames), `wav` (16-bit PCM) or `json`.
        dtype: numpy dtype in memory (`object` for json).
        shape: one entry per axis: an int, `F`, `2F`, `640F`, or a name such as `D_identity` for a width that the
            profile's network sets and that is equal throughout a dataset.
        unit: physical unit or range.
        stage: the stage that writes it.
        about: what it is, in a line.
        nan: whether NaN carries meaning (unvoiced pitch).
        optional: stored only where the stage's settings ask for it.
    """

    name: str
    encoding: Encoding
    dtype: str
    shape: tuple[int | str, ...]
    unit: str
    stage: str
    about: str
    nan: bool = False
    optional: bool = False

    @property
    def suffix(self) -> str:
        """Ending of the tar member, after the clip's key and a dot; `meta` is plain `json`, `wav` plain `wav`."""
        return self.encoding if self.name in ("meta", "wav") else f"{self.name}.{self.encoding}"


FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field("meta", "json", "object", (), "-", "pack", "key, split, speaker, text, frames, source digest"),
        Field(
            "boxes",
            "npy",
            "float32",
            ("F", 4),
            "px",
            "faces",
            "face track x0, y0, x1, y1 in the upright source frame",
        ),
        Field(
            "points5",
            "npy",
            "float32",
            ("F", 5, 2),
            "px",
            "faces",
            "eye centres, nose tip, mouth corners of the track",
        ),
        Field(
            "face",
            "jpg",
            "uint8",
            ("F", FACE_SIZE, FACE_SIZE, 3),
            "RGB 0-255",
            "faces",
            "face aligned to the 112 px template",
        ),
        Field("track", "json", "object", (), "-", "faces", "how the face was chosen among several"),
        Field(
            "landmarks",
            "npy",
            "float32",
            ("F", 68, 2),
            "px",
            "landmarks",
            "68 iBUG points in the upright source frame",
        ),
        Field(
            "lips",
            "jpg",
            "uint8",
            ("F", LIP_SIZE, LIP_SIZE),
            "grey 0-255",
            "lips",
            "mouth region, similarity-aligned",
        ),
        Field(
            "identity",
            "npy",
            "float16",
            ("F", "D_identity"),
            "-",
            "identity",
            "face identity embedding, unit length",
        ),
        Field(
            "expression",
            "npy",
            "float16",
            ("F", "D_expression"),
            "-",
            "expression",
            "facial expression feature",
        ),
        Field("wav", "wav", "int16", ("640F",), "PCM", "audio", "mono 16 kHz sound, cut to the video"),
        Field("sync", "json", "object", (), "-", "sync", "offset of the sound in ms, and its confidence"),
        Field(
            "mel",
            "npy",
            "float32",
            ("2F", MEL_BINS),
            "ln amplitude",
            "mel",
            "log-mel spectrogram, hop 320, window 1280",
        ),
        Field(
            "pitch",
            "npy",
            "float32",
            ("2F",),
            "Hz",
            "pitch",
            "pYIN fundamental, NaN where unvoiced",
            nan=True,
        ),
        Field("energy", "npy", "float32", ("2F",), "ln amplitude", "energy", "norm over mel bins of each frame"),
        Field("units", "npy", "int16", ("2F",), "index", "speech", "k-means index of the speech feature"),
        Field("timbre", "npy", "float32", ("D_timbre",), "-", "speech", "time mean of the first speech layer"),
        Field(
            "features",
            "npy",
            "float16",
            ("2F", "D_features"),
            "-",
            "speech",
            "speech feature that the units were read from",
            optional=True,
        ),
    )
}


def stored(name: str, raw: Collection[str]) -> Field:
    """The field `name` as a packed shard holds it; `raw` names those stored as `npy` there where the schema says `jpg`.

    Raises:
        KeyError: no such field.
    """
    field = FIELDS[name]
    return replace(field, encoding="npy") if name in raw and field.encoding == "jpg" else field


def frames_of(field: Field, value: Any) -> int | None:
    """F as this value's first axis states it, or None where the field has no time axis.

    Raises:
        SchemaError: the first axis is no whole number of video frames.
    """
    if not field.shape or field.shape[0] not in _PER_FRAME:
        return None
    per_frame = _PER_FRAME[field.shape[0]]
    length = value.shape[0]
    if length % per_frame:
        raise SchemaError(f"{field.name}: length {length} is no multiple of {per_frame}")
    return length // per_frame


_PER_FRAME: dict[int | str, int] = {"F": 1, "2F": MEL_PER_FRAME, "640F": SAMPLES_PER_FRAME}


def check_value(field: Field, value: Any, frames: int, widths: dict[str, int] | None = None) -> None:
    """Check one decoded value against its field for a clip of `frames` video frames.

    Args:
        widths: named widths (`D_identity` ...) seen so far; filled in place, so that one dataset has one width.

    Raises:
        SchemaError: wrong type, dtype, shape, or a value that is not finite (NaN is allowed where the field says so).
    """
    if field.encoding == "json":
        if not isinstance(value, dict):
            raise SchemaError(f"{field.name}: expected an object, got {type(value).__name__}")
        return
    if not isinstance(value, np.ndarray):
        raise SchemaError(f"{field.name}: expected an array, got {type(value).__name__}")
    if value.dtype != np.dtype(field.dtype):
        raise SchemaError(f"{field.name}: dtype {value.dtype}, expected {field.dtype}")
    if value.ndim != len(field.shape):
        raise SchemaError(f"{field.name}: shape {value.shape}, expected {field.shape}")
    for have, want in zip(value.shape, field.shape, strict=True):
        if isinstance(want, str) and want in _PER_FRAME:
            expected = frames * _PER_FRAME[want]
        elif isinstance(want, str):
            expected = have if widths is None else widths.setdefault(want, have)
        else:
            expected = want
        if have != expected:
            raise SchemaError(
                f"{field.name}: shape {value.shape}, expected {field.shape} with F = {frames} ({want} = {expected})"
            )
    if value.dtype.kind == "f":
        bad = np.isinf(value) if field.nan else ~np.isfinite(value)
        if bad.any():
            raise SchemaError(f"{field.name}: {int(bad.sum())} values are not finite")


def check_sample(sample: Mapping[str, Any], frames: int, widths: dict[str, int] | None = None) -> None:
    """`check_value` for every field of a sample.

    Raises:
        SchemaError: an unknown field name, or any field that `check_value` refuses.
    """
    for name, value in sample.items():
        field = FIELDS.get(name)
        if field is None:
            raise SchemaError(f"{name}: no such field in schema version {SCHEMA_VERSION}")
        check_value(field, value, frames, widths)
