"""Features in, speech out: windows without seams, one voice, and nothing that depends on other clips."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model import checkpoint, flow
from model.flow import sample
from model.griffinlim import playable
from model.synthesis import METHOD, Sampling, Synthesizer, pick_device
from model.windows import OVERLAP, WINDOW, Blend, ramp, starts, windowed
from shards.augment import augmented, centred
from shards.errors import UserError
from tests.small_model import seeded
from tests.speaking import features, untrained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def synthesizer(run: Path) -> Synthesizer:
    return Synthesizer(run, device="cpu", sampling=Sampling(steps=2))


@settings(deadline=None, max_examples=60)
@given(frames=st.integers(1, 5000), size=st.integers(4, 400), data=st.data())
def test_windows_cover_the_clip_and_their_weights_add_up(frames: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(1, size // 2))
    begins = starts(frames, size, overlap)
    width = min(size, frames)
    assert begins[0] == 0
    assert begins[-1] + width == frames
    assert all(0 < b - a <= size - overlap for a, b in pairwise(begins))
    line = torch.linspace(-1, 1, 2 * frames)[None]
    blend = Blend((1, 2 * frames), 1, torch.device("cpu"))
    for begin in begins:
        blend.add(line[:, 2 * begin : 2 * (begin + width)], 2 * begin, ramp(frames, begin, width, overlap))
    torch.testing.assert_close(blend.mean(), line)


def test_weights_rise_in_a_line_across_the_middle_of_an_overlap() -> None:
    weight = ramp(1000, 100, 400, 40)
    assert weight[:20].tolist() == [0.0] * 20
    np.testing.assert_allclose(weight[20:60], (np.arange(40) + 0.5) / 40, rtol=1e-6)
    assert weight[60:740].tolist() == [1.0] * 680
    assert ramp(400, 0, 400).tolist() == [1.0] * 800


def blur(x: Tensor) -> Tensor:
    """Mean over 9 frames; what lies beyond the ends is zero."""
    return F.avg_pool1d(x, 9, stride=1, padding=4)


def pull(x: Tensor, t: Tensor, mu: Tensor, mask: Tensor) -> Tensor:
    """A velocity that sees 4 frames to either side and depends on everything."""
    return (blur(mu) - x + 0.3 * blur(x).tanh()) * (1 + t[:, None, None])


def test_a_local_velocity_gives_in_windows_what_it_gives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = 2 * WINDOW + 333
    mu = torch.randn(1, 4, 2 * frames, generator=seeded(1))
    mask = torch.ones(1, 2 * frames, dtype=torch.bool)
    windows = sample(pull, mu, mask, seeded(2), steps=4)
    monkeypatch.setattr(flow, "WINDOW", 10**9)
    whole = sample(pull, mu, mask, seeded(2), steps=4)
    torch.testing.assert_close(windows, whole, atol=1e-5, rtol=1e-5)
    assert (whole - mu).abs().max() > 0.1


def test_windows_of_a_batch_are_each_clips_own() -> None:
    """Window by window with fixed velocities, against sums written out: the velocity is its window's mean."""
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0], mask[1, :24] = True, True
    x = torch.randn(2, 1, 40, generator=seeded(4))
    own_mean = lambda x, t, mu, mask: x.mean(dim=2, keepdim=True).expand_as(x)  # noqa: E731
    found = windowed(own_mean, size=8, overlap=4)(x, torch.zeros(2), x, mask)
    for row, length, begins in ((0, 40, (0, 4, 8, 12)), (1, 24, (0, 4))):
        total, weights = np.zeros(length), np.zeros(length)
        for begin in begins:
            weight = np.ones(16)
            slope = [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
            if begin:
                weight[:8] = slope
            if begin != begins[-1]:
                weight[8:] = slope[::-1]
            part = slice(2 * begin, 2 * begin + 16)
            total[part] += weight * x[row, 0, part].numpy().mean()
            weights[part] += weight
        np.testing.assert_allclose(found[row, 0, :length], total / weights, rtol=1e-5, atol=1e-6)
    assert not found[1, :, 24:].any()


def test_a_generator_for_each_clip_makes_its_noise_its_own() -> None:
    mu = torch.zeros(2, 3, 10)
    mask = torch.arange(10)[None] < torch.tensor([[10], [6]])
    rest = lambda x, *_: torch.zeros_like(x)  # noqa: E731
    both = sample(rest, mu, mask, [seeded(5), seeded(6)], steps=1)
    alone = sample(rest, mu[1:, :, :6], mask[1:, :6], seeded(6), steps=1)
    torch.testing.assert_close(both[1:, :, :6], alone, atol=0, rtol=0)


def test_a_clip_of_one_window_is_spoken_as_a_whole(synthesizer: Synthesizer) -> None:
    clip = features(12)
    batch = {
        "frames": torch.tensor([12]),
        "lips": torch.from_numpy(augmented(clip["lips"], centred(12)))[None, None],
        "identity": torch.from_numpy(clip["identity"]).float()[None],
        "expression": torch.from_numpy(clip["expression"]).float()[None],
    }
    # The noise is the clip's own: from the seed and its pixels.
    own = int.from_bytes(sha256(b"0 " + clip["lips"].tobytes()).digest()[:7], "little")
    plain = synthesizer.network.synthesize(batch, seeded(own), steps=2)
    (spoken,) = synthesizer.speak([clip])
    torch.testing.assert_close(torch.from_numpy(spoken.mel.T), plain["mel"][0], atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(spoken.units, plain["units"][0])
    np.testing.assert_array_equal(spoken.wave, playable(spoken.mel, "htk", seed=0))
    assert spoken.wave.shape == (640 * 12,)
    for name in ("pitch", "energy", "timbre"):
        np.testing.assert_allclose(getattr(spoken, name), plain[name][0], atol=1e-5, rtol=1e-5)


def test_speech_depends_on_the_clip_and_the_seed_alone(run: Path, synthesizer: Synthesizer) -> None:
    a, b = features(5, seed=1), features(9, seed=2)
    before = torch.get_num_threads()
    (first, second), (again,) = synthesizer.speak([a, b]), synthesizer.speak([b])
    assert second.wave.tobytes() == again.wave.tobytes()
    assert first.wave.tobytes() == Synthesizer(run, device="cpu", sampling=Sampling(2)).speak([a])[0].wave.tobytes()
    other = Synthesizer(run, device="cpu", sampling=Sampling(2, seed=1)).speak([a])[0]
    assert other.wave.tobytes() != first.wave.tobytes()
    assert torch.get_num_threads() == before
    sampling = {"steps": 2, "guidance": 0.7, "temperature": 1.0, "seed": 0}
    made = {"system": "faces2voices", "step": 7, "vocoder": "Griffin-Lim", "method": METHOD}
    assert synthesizer.facts() == made | sampling


class Local:
    """Stands for a network that sees 4 acoustic frames to either side; its voice is the mean brightness of what it
    sees, and its pitch says which voice it was told."""

    config = SimpleNamespace(identity_dim=128, expression_dim=102, mean_identity=False, told_voice=False)

    def __init__(self) -> None:
        self.windows: list[int] = []

    def predict(self, batch: dict[str, Tensor], timbre: Tensor | None = None) -> dict[str, Tensor]:
        grey = batch["lips"].mean(dim=(3, 4)).repeat_interleave(2, dim=2)
        self.windows.append(grey.shape[2])
        voice = grey.mean(dim=2) if timbre is None else timbre
        pitch = voice.expand(-1, grey.shape[2])
        return {"mu": blur(grey).expand(-1, 80, -1), "pitch": pitch, "timbre": voice}

    def render(self, prediction: dict[str, Tensor], mask: Tensor, *_: Any) -> Tensor:
        return prediction["mu"]


def test_a_long_clip_is_one_sequence_with_one_voice(run: Path) -> None:
    frames = 2 * WINDOW - OVERLAP + 1
    synthesizer = Synthesizer(run, device="cpu")
    network: Any = Local()
    synthesizer.network = network
    synthesizer.vocoder = type("Mute", (), {"name": "", "needs": (), "__call__": lambda *_: np.zeros(0)})()
    clip = {name: value[np.arange(frames) % 50] for name, value in features(50).items()}
    clip["lips"] = (clip["lips"] * np.linspace(0, 1, frames)[:, None, None]).astype(np.uint8)
    (spoken,) = synthesizer.speak([clip])
    grey = augmented(clip["lips"], centred(frames)).mean(axis=(1, 2)).repeat(2)
    padded = np.pad(grey, 4)
    whole = np.stack([padded[k : k + 2 * frames] for k in range(9)]).mean(axis=0)
    np.testing.assert_allclose(spoken.mel[:, 3], whole, atol=2e-5)
    assert spoken.units is None
    begins = starts(frames)
    assert len(begins) == 3
    assert set(network.windows) == {2 * WINDOW}
    voice = np.mean([grey[2 * a : 2 * (a + WINDOW)].mean() for a in begins])
    np.testing.assert_allclose(spoken.timbre, [voice], atol=1e-5)
    np.testing.assert_allclose(spoken.pitch, np.full(2 * frames, voice), atol=1e-5)


def test_what_cannot_be_is_said(run: Path, synthesizer: Synthesizer) -> None:
    for wrong in ({"steps": 0}, {"guidance": float("nan")}, {"temperature": -1.0}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Sampling(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"identity: \(4, 128\), but the checkpoint's network takes \(3, 128\)"):
        synthesizer.speak([{**features(4), "lips": features(3)["lips"]}])
    with pytest.raises(UserError, match="lips"):
        synthesizer.speak([features(0)])
    with pytest.raises(UserError, match="choose from auto"):
        pick_device("gpu")
    with pytest.raises(UserError, match="this torch sees"):
        pick_device(f"cuda:{torch.cuda.device_count()}")
    mute = Synthesizer(run, device="cpu")
    mute.vocoder = type("Odd", (), {"name": "Odd", "needs": ("mel", "ghost")})()
    with pytest.raises(UserError, match="Odd: reads ghost"):
        mute.speak([features(3)])


def test_a_vocoder_is_no_system(run: Path, tmp_path: Path) -> None:
    state = checkpoint.load(run)
    checkpoint.save(tmp_path, replace(state, shape={"factors": [10, 8, 4]}), keep=1)
    with pytest.raises(UserError, match="that of a vocoder belongs to --vocoder"):
        Synthesizer(tmp_path, device="cpu")
