"""Offset of the sound: known shifts are found, and what has no speech says nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.media import decode_audio
from pipeline.stage import Clip, Fields, Item, Reason, Reject
from pipeline.stages.audio import to_pcm
from pipeline.stages.faces import Faces, FacesConfig
from pipeline.stages.sync import Sync, SyncConfig, find_offset
from shards.schema import FIELDS, check_value

TOLERANCE_MS = 90
"""A clip of three seconds may be off by two frames."""


@pytest.fixture(scope="module")
def recorded(clips: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Face and sound (float, 640F) of four sentences."""
    stage = Faces(FacesConfig(every=3))
    stage.setup()
    found = {}
    for name in ("01", "02", "13", "15"):
        path = next(clips.glob(f"{name}_*"))
        face = stage.run(Item(Clip(name, str(path), "")))["face"]
        found[name] = face, shifted(decode_audio(str(path)), 0, len(face))
    return found


def shifted(sound: np.ndarray, ms: int, frames: int) -> np.ndarray:
    """The sound `ms` later, cut or filled to the picture."""
    moved = np.pad(sound, (16 * ms, 0)) if ms > 0 else sound[-16 * ms :]
    return np.pad(moved[: 640 * frames], (0, max(0, 640 * frames - len(moved))))


def measure(face: np.ndarray, sound: np.ndarray, config: SyncConfig | None = None) -> Fields:
    item = Item(Clip("k", "k.mp4", ""), {"face": face, "wav": to_pcm(sound)})
    found = Sync(config or SyncConfig()).run(item)["sync"]
    check_value(FIELDS["sync"], found, len(face))
    return found


def test_known_shifts_are_found(recorded: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    errors = []
    for name in ("01", "02", "13"):
        face, sound = recorded[name]
        for ms in (-330, -120, 0, 50, 200, 400):
            found = measure(face, shifted(sound, ms, len(face)))
            errors.append(abs(found["offset_ms"] - ms))
            assert found["confidence"] > 0.5
    assert np.median(errors) < 25
    assert max(errors) < TOLERANCE_MS


def test_late_sound_is_measured_and_refused_where_asked(recorded: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    face, sound = recorded["15"]
    found = measure(face, sound)
    assert abs(found["offset_ms"] - 240) < TOLERANCE_MS
    with pytest.raises(Reject, match="ms late") as refused:
        measure(face, sound, SyncConfig(max_offset_ms=120))
    assert refused.value.reason is Reason.OUT_OF_SYNC
    assert measure(face, sound, SyncConfig(max_offset_ms=120, min_confidence=0.95)) == found
    assert measure(*recorded["01"], SyncConfig(max_offset_ms=120))["offset_ms"] is not None


def test_without_speech_nothing_is_told(recorded: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    face, sound = recorded["01"]
    nothing = {"offset_ms": None, "confidence": 0.0}
    assert measure(face, np.zeros_like(sound)) == nothing
    assert measure(face[:1].repeat(75, axis=0), sound[: 75 * 640]) == nothing
    noise = np.random.default_rng(0).normal(0, 0.1, len(sound)).astype(np.float32)
    assert measure(face, noise)["confidence"] < 0.1
    hum = 0.3 * np.sin(2 * np.pi * 100 * np.arange(len(sound)) / 16_000)
    assert measure(face, hum.astype(np.float32))["confidence"] < 0.1
    assert measure(face[:5], sound[:3200]) == nothing


def test_a_peak_between_two_frames_is_found() -> None:
    time = np.arange(100)

    def bumps(late: float) -> np.ndarray:
        places = np.array([[20], [31], [47], [70]]) + late
        return 20 * np.exp(-0.5 * ((time - places) / 3) ** 2).sum(axis=0)

    for late in (-6.5, -0.25, 0.0, 3.4):
        offset, confidence = find_offset(bumps(0), bumps(late))
        assert offset is not None
        assert abs(offset - 40 * late) < 4
        assert confidence > 0.9
    assert find_offset(bumps(0), -bumps(0))[1] < 0.5


def test_lengths_that_differ_are_refused(recorded: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    face, sound = recorded["01"]
    with pytest.raises(Reject) as refused:
        measure(face, sound[:-640])
    assert refused.value.reason is Reason.AUDIO_LENGTH
