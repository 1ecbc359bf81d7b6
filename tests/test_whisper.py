"""The speech encoder: its file, its framing, its states against two independent implementations, and the stage."""

from __future__ import annotations

import struct
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.networks.ctranslate2 import find_weights, read_ctranslate2
from pipeline.networks.whisper import EDGE, WhisperEncoder, load_encoder, whisper_mel, windows
from pipeline.stage import Clip, Item
from pipeline.stages.speech import Speech, SpeechConfig
from pipeline.units import save_codebook
from shards.errors import UserError


@pytest.fixture(scope="module")
def encoder() -> WhisperEncoder:
    return load_encoder()


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def pattern(frames: int) -> torch.Tensor:
    """A deterministic stand-in for a Whisper log-mel: [1, 80, 2 * frames]."""
    f, t = np.arange(80)[:, None], np.arange(2 * frames)[None]
    wave = 0.6 * np.sin(0.11 * t + 0.37 * f) * np.cos(0.023 * t * (1 + f / 80)) + 0.1 * np.sin(1.7 * f) - 0.2
    return torch.from_numpy(wave.astype(np.float32))[None]


# What CTranslate2 4.8.5 (its own reader and kernels, float32) returns for pattern(T): channels 0-3 of three frames,
# and the mean absolute value. Measured agreement over all values: 2e-5 for T = 100, 5e-4 for T = 1500.
CTRANSLATE2 = {
    100: (
        {
            0: (-0.64755714, -0.42487752, 1.8705719, -0.7677312),
            50: (0.19027989, -0.5428841, -0.04349214, -0.31726924),
            99: (-0.4323129, -0.3208031, 0.5765865, -0.6622729),
        },
        0.65161645,
    ),
    1500: (
        {
            0: (-0.46185917, -0.26090178, 1.8183444, -0.21695465),
            50: (-0.0678827, 0.06392669, 0.4241498, -0.3917905),
            1499: (0.02453834, 0.16063824, -0.3570028, 0.5746737),
        },
        0.6778941,
    ),
}
# Outputs of single blocks in transformers 5.23.0 (WhisperEncoder, eager attention, float32) for pattern(1500): frames
# 0, 700, 1499, channels 0-3, and the mean absolute value. Block numbers count from 1.
TRANSFORMERS = {
    2: (
        [
            (0.70130444, 0.23683774, 2.2625988, -0.03011376),
            (0.2963559, 0.5496149, 0.75593424, 1.2022703),
            (0.68021035, 0.35444626, 0.1250768, 0.6041177),
        ],
        0.440634,
    ),
    3: (
        [
            (0.49615663, -0.09157704, 2.0942092, -0.38400573),
            (0.45586103, 0.65662754, 1.0495093, 1.4849099),
            (0.62771666, 0.01102068, -0.20399424, 0.8140068),
        ],
        0.5503976,
    ),
    4: (
        [
            (0.8132751, 0.742555, 3.9848528, 0.59406734),
            (1.1913334, 0.09486032, 3.9458325, 2.2298546),
            (2.4545968, 2.0218909, 0.41370144, 3.159078),
        ],
        1.0369833,
    ),
}


@pytest.mark.parametrize("frames", [100, 1500])
def test_last_layer_agrees_with_ctranslate2(encoder: WhisperEncoder, frames: int) -> None:
    with torch.inference_mode():
        out = encoder.norm(encoder(pattern(frames))[-1])[0].numpy()
    rows, size = CTRANSLATE2[frames]
    assert out.shape == (frames, 384)
    for row, values in rows.items():
        np.testing.assert_allclose(out[row, :4], values, atol=2e-3)
    assert np.abs(out).mean() == pytest.approx(size, rel=1e-4)


def test_single_blocks_agree_with_transformers(encoder: WhisperEncoder) -> None:
    with torch.inference_mode():
        states = encoder(pattern(1500))
    for block, (rows, size) in TRANSFORMERS.items():
        out = states[block][0].numpy()
        np.testing.assert_allclose(out[[0, 700, 1499], :4], rows, atol=2e-3)
        assert np.abs(out).mean() == pytest.approx(size, rel=1e-4)


def test_log_mel_agrees_with_librosa() -> None:
    wave = noise(640 * 12)
    padded = np.pad(wave, (40, 200), mode="reflect")
    power = librosa.feature.melspectrogram(
        y=padded, sr=16000, n_fft=400, hop_length=160, n_mels=80, center=False, window="hann", fmax=8000
    )
    logs = np.log10(np.maximum(power, 1e-10))
    expected = (np.maximum(logs, logs.max() - 8) + 4) / 4
    np.testing.assert_allclose(whisper_mel(wave), expected.T, atol=1e-4)


@given(st.integers(0, 15))
def test_input_frame_j_is_centred_on_sample_160_j_plus_1(j: int) -> None:
    # A click on the frame's centre is louder in it than one sample to either side is.
    def loudness(at: int) -> float:
        wave = np.zeros(640 * 5, np.float32)
        wave[at] = 1
        return float(whisper_mel(wave)[j].sum())

    centre = 160 * (j + 1)
    assert loudness(centre) > loudness(centre - 1)
    assert loudness(centre) > loudness(centre + 1)


def test_output_frame_k_hears_a_window_centred_on_320_k_plus_160(encoder: WhisperEncoder) -> None:
    # Before attention mixes frames, state k reaches input frames 2k-2 .. 2k+2, that is 520 samples to each side of
    # 320k + 160 (window ends weigh nothing); so a click moves exactly the states around it, evenly.
    base = noise(640 * 12)
    for k in (8, 11):
        heard = []
        for offset in range(-640, 641, 40):
            wave = base.copy()
            wave[320 * k + 160 + offset] += 0.05
            moved = np.abs(encoder.states(wave, 0)[0][k] - encoder.states(base, 0)[0][k]).max()
            heard.append(moved > 1e-6)
        assert heard == heard[::-1]
        assert sum(heard) == 2 * (520 // 40) - 1  # offsets -480 .. 480


@pytest.mark.parametrize("frames", [1, 2, 13, 75])
def test_two_states_per_video_frame(encoder: WhisperEncoder, frames: int) -> None:
    states = encoder.states(noise(640 * frames), 3)
    assert len(states) == 4
    assert all(state.shape == (2 * frames, 384) for state in states)


@given(st.integers(1, 9000), st.integers(201, 1500))
def test_windows_tile_the_clip_with_context(frames: int, longest: int) -> None:
    at = 0
    for start, stop, low, high in windows(frames, longest):
        assert 0 <= start <= low < high <= stop <= frames
        assert stop - start == min(longest, frames)
        assert low == at
        assert low - start >= EDGE or start == 0
        assert stop - high >= EDGE or stop == frames
        at = high
    assert at == frames


def test_a_clip_beyond_thirty_seconds_equals_its_windows(encoder: WhisperEncoder) -> None:
    wave = noise(640 * 800)
    whole = encoder.states(wave, 1)[1]
    assert whole.shape == (1600, 384)
    mel = torch.from_numpy(whisper_mel(wave).T)[None]
    with torch.inference_mode():
        first, last = (encoder(mel[:, :, 2 * s : 2 * s + 3000], 1)[1][0].numpy() for s in (0, 100))
    np.testing.assert_allclose(whole[:1400], first[:1400], atol=1e-4)
    np.testing.assert_allclose(whole[1400:], last[1300:], atol=1e-4)


def written(
    tensors: list[tuple[str, tuple[int, ...], int, bytes]], version: int = 6, kind: str = "WhisperSpec"
) -> bytes:
    """A CTranslate2 file, written from the format's description."""

    def text(word: str) -> bytes:
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    out = struct.pack("<I", version) + text(kind) + struct.pack("<II", 3, len(tensors))
    for name, shape, code, data in tensors:
        out += text(name) + struct.pack(f"<B{len(shape)}I", len(shape), *shape)
        out += struct.pack("<BI", code, len(data)) + data
    return out + struct.pack("<I", 0)


GOOD = [
    ("encoder/a", (2, 3), 4, np.arange(6, dtype="<f2").tobytes()),
    ("decoder/b", (1,), 0, b"\0" * 4),
    ("encoder/num_heads", (), 2, struct.pack("<h", 6)),
]


def test_reader_takes_the_encoder_only(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(written(GOOD))
    found = read_ctranslate2(tmp_path / "m.bin")
    assert sorted(found) == ["a", "num_heads"]
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert int(found["num_heads"]) == 6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a whole"),
        (b"PK\3\4 a zip file, say, and some more text", "version"),
        (written(GOOD, version=5), "version 5"),
        (written(GOOD, kind="TransformerSpec"), "TransformerSpec"),
        (written([("encoder/a", (2, 4), 4, b"\0" * 12)]), "encoder/a"),
        (written([("encoder/a", (2, 3), 9, b"\0" * 12)]), "encoder/a"),
        (written(GOOD[:2]), "num_heads"),
        (written([GOOD[2], ("encoder/position_encodings/encodings", (4, 12), 0, b"\0" * 192)]), "conv1"),
    ],
)
def test_other_files_are_one_clear_error(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_encoder(tmp_path / "m.bin")
    assert "m.bin" in str(caught.value)


@given(st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = written(GOOD)
    path = tmp_path_factory.mktemp("cut") / "m.bin"
    # The alias count at the very end is not needed.
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 5))])
    with pytest.raises(UserError, match="not a whole"):
        read_ctranslate2(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.bin"):
        load_encoder(tmp_path / "gone.bin")


def test_stage_gives_units_and_timbre(encoder: WhisperEncoder, tmp_path: Path) -> None:
    pcm = np.rint(noise(640 * 30) * 32768).astype(np.int16)
    states = encoder.states((pcm / 32768).astype(np.float32))
    path = tmp_path / "c.npy"
    with open(path, "wb") as stream:
        save_codebook(stream, states[3][::6])
    stage = Speech(SpeechConfig(clusters=10, centroids=path))
    assert list(stage.weights()) == [find_weights()]
    assert list(stage.codebook()) == [path]
    stage.setup()
    made = stage.run(Item(Clip("a", "", ""), {"wav": pcm}))
    assert made["units"].dtype == np.int16
    assert made["units"].shape == (60,)
    assert made["units"][::6].tolist() == list(range(10))
    assert made["timbre"].dtype == np.float32
    np.testing.assert_allclose(made["timbre"], states[1].mean(0), atol=1e-5)


def test_stage_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "c.npy"
    with open(path, "wb") as stream:
        save_codebook(stream, np.zeros((10, 384), np.float32))
    for settings, words in (
        ({}, "no centroids"),
        ({"centroids": path}, "clusters"),
        ({"centroids": path, "clusters": 10, "layer": 5}, "layer"),
    ):
        with pytest.raises(UserError, match=words):
            Speech(SpeechConfig.model_validate(settings)).setup()
