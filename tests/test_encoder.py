"""The hierarchical encoder and the whole model: padding, teacher forcing, ablations, learning."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import PRESETS, ModelConfig
from model.encoder import HierarchicalEncoder, Targets
from model.faces2voices import FacesToVoices
from model.layers import length_mask
from model.predictors import MaskedPredictor
from shards.config import load_config
from shards.errors import UserError

SMALL: dict[str, Any] = {
    "identity_dim": 6,
    "expression_dim": 7,
    "units": 11,
    "timbre_dim": 9,
    "lip_encoder": {
        "stem": 4,
        "stem_stride": 4,
        "trunk": [4, 4, 8, 8],
        "trunk_blocks": 1,
        "dim": 16,
        "layers": 2,
        "heads": 2,
        "ffn": 16,
        "pos_kernel": 8,
        "pos_groups": 4,
        "frozen": False,
    },
    "encoder": {"dim": 32, "layers": 1, "heads": 2, "ffn": 32, "blocks": 1},
    "decoder": {"channels": [16, 16], "head_dim": 8, "mid_blocks": 1},
}
SWITCHES = ("hier", "timbre", "prosody", "face_id", "fe", "ws", "mp")


def config(**changes: Any) -> ModelConfig:
    return load_config(ModelConfig, base={**SMALL, **changes})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(shape: ModelConfig, frames: tuple[int, ...] = (6, 10)) -> dict[str, Tensor]:
    """Random clips with garbage in their padding."""
    g, count, longest = seeded(3), len(frames), max(frames)
    lengths = torch.tensor(frames)
    made = {
        "lips": torch.randn(count, 1, longest, 88, 88, generator=g),
        "identity": torch.randn(count, longest, shape.identity_dim, generator=g),
        "expression": torch.randn(count, longest, shape.expression_dim, generator=g),
        "units": torch.randint(0, shape.units, (count, 2 * longest), generator=g),
        "timbre": torch.randn(count, shape.timbre_dim, generator=g),
        "pitch": torch.randn(count, 2 * longest, generator=g),
        "energy": torch.randn(count, 2 * longest, generator=g),
        "mel": 2 * torch.randn(count, 80, 2 * longest, generator=g) - 5,
        "frames": lengths,
    }
    video, sound = length_mask(lengths, longest), length_mask(2 * lengths, 2 * longest)
    made["units"][~sound] = -100
    made["pitch"][~sound] = 1e3
    made["mel"].transpose(1, 2)[~sound] = 1e3
    made["identity"][~video] = 1e3
    made["lips"][:, 0][~video] = 1e3
    return made


def targets(clips: dict[str, Tensor]) -> Targets:
    return Targets(clips["units"], clips["timbre"], clips["pitch"], clips["energy"])


def build(shape: ModelConfig) -> FacesToVoices:
    torch.manual_seed(0)
    return FacesToVoices(shape)


def first_alone(clips: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    cut = {"lips": 2, "identity": 1, "expression": 1, "units": 1, "pitch": 1, "energy": 1, "mel": 2}
    alone = {name: value[:1] for name, value in clips.items()}
    for name, axis in cut.items():
        length = frames if name in ("lips", "identity", "expression") else 2 * frames
        alone[name] = alone[name].narrow(axis, 0, length)
    return alone


@pytest.mark.parametrize("forced", [False, True])
def test_a_clip_is_the_same_alone_and_padded(forced: bool) -> None:
    shape = config()
    model = build(shape).eval()
    clips = batch(shape)
    alone = first_alone(clips, 6)
    one = model.encode(alone, targets(alone) if forced else None)
    two = model.encode(clips, targets(clips) if forced else None)
    assert one.mu.shape == (1, 80, 12)
    torch.testing.assert_close(two.mu[:1, :, :12], one.mu, rtol=1e-4, atol=1e-4)
    assert one.timbre is not None
    assert two.timbre is not None
    torch.testing.assert_close(two.timbre[:1], one.timbre, rtol=1e-4, atol=1e-4)
    for name in ("logits", "pitch", "energy") + (("masked_logits", "masked_pitch", "masked_energy") if forced else ()):
        torch.testing.assert_close(getattr(two, name)[:1, :12], getattr(one, name), rtol=1e-4, atol=1e-4)


def test_padding_does_not_enter_the_losses() -> None:
    # One clip alone and with a row of padding behind it: same losses, but for the noise, whose shape differs.
    shape = config(flow={"cfg_dropout": 0.0})
    model = build(shape).eval()
    alone = batch(shape, (6,))
    long = batch(shape, (6, 9))
    long = {name: value[:1] for name, value in long.items()}
    for name, value in alone.items():
        if name in ("units", "pitch", "energy", "identity", "expression"):
            long[name][:, : value.shape[1]] = value
        elif name in ("lips", "mel"):
            long[name][:, :, : value.shape[2]] = value
        else:
            long[name] = value
    one, two = model.losses(alone, seeded()), model.losses(long, seeded())
    for name in ("prior", "content", "timbre", "pitch", "energy", "unit_accuracy"):
        assert two[name].item() == pytest.approx(one[name].item(), rel=1e-4), name


def test_teacher_forcing_feeds_targets_and_inference_feeds_predictions() -> None:
    shape = config()
    model = build(shape).eval()
    clips = batch(shape)
    free = model.encode(clips)
    assert free.masked_logits is free.masked_pitch is free.masked_energy is None
    assert free.timbre is not None
    assert free.pitch is not None
    assert free.energy is not None
    own = Targets(free.logits.argmax(-1), free.timbre, free.pitch, free.energy)
    torch.testing.assert_close(model.encode(clips, own).mu, free.mu, rtol=1e-4, atol=1e-5)
    given = targets(clips)
    base = model.encode(clips, given)
    changes = {
        "units": (given.units + 1) % shape.units,
        "timbre": given.timbre + 1,
        "pitch": given.pitch + 1,
        "energy": given.energy + 1,
    }
    for name, value in changes.items():
        changed = model.encode(clips, Targets(**{**vars(given), name: value}))
        assert (changed.mu - base.mu).abs().max() > 1e-4, name
        # Content is predicted before anything is fed, so no target may reach its own prediction.
        torch.testing.assert_close(changed.logits, base.logits, rtol=0, atol=0)
        if name != "units":
            assert changed.timbre is not None
            assert base.timbre is not None
            torch.testing.assert_close(changed.timbre, base.timbre, rtol=0, atol=0)
        if name in ("pitch", "energy"):
            assert changed.pitch is not None
            assert base.pitch is not None
            torch.testing.assert_close(changed.pitch, base.pitch, rtol=0, atol=0)


def test_masked_predictor_is_blind_to_its_frame() -> None:
    head = MaskedPredictor(config().encoder, 3).eval()
    x = torch.randn(1, 41, 32, generator=seeded()).requires_grad_()
    head(x, torch.ones(1, 41, dtype=torch.bool))[0, 20].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert seen == [*range(13, 18), *range(23, 28)]


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_ablation_trains_and_synthesises_with_every_parameter_in_use(switch: str) -> None:
    shape = config(**{switch: False})
    model, clips = build(shape), batch(shape)
    losses = model.losses(clips, seeded())
    losses["loss"].backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []
    assert ("timbre" in losses) == (switch != "timbre")
    assert ("pitch" in losses) == ("energy" in losses) == (switch != "prosody")
    found = model.eval().synthesize(clips, seeded(), steps=2)
    assert found["mel"].shape == (2, 80, 20)
    assert torch.isfinite(found["mel"]).all()
    assert ("timbre" in found) == (switch != "timbre")
    assert ("pitch" in found) == (switch != "prosody")


def influences(shape: ModelConfig, source: str, output: str) -> bool:
    """Whether an input, or a target that is fed, has a gradient to an output."""
    torch.manual_seed(0)
    encoder = HierarchicalEncoder(shape).eval()
    clips = batch(shape)
    fed = {name: clips[name].clone() for name in ("identity", "expression", "timbre")}
    for value in fed.values():
        value.requires_grad_()
    embedding = encoder.content.embedding.weight
    given = Targets(clips["units"], fed["timbre"], clips["pitch"], clips["energy"])
    mask = length_mask(clips["frames"], 10)
    lips = torch.randn(2, 10, shape.lip_encoder.dim, generator=seeded())
    out = encoder(lips, fed["identity"], fed["expression"], mask, given)
    leaf = embedding if source == "units" else fed[source]
    (gradient,) = torch.autograd.grad(getattr(out, output).square().sum(), leaf, allow_unused=True)
    return gradient is not None and bool(gradient.abs().sum() > 0)


def test_switches_change_who_informs_whom() -> None:
    full = config()
    for source, output in (
        ("units", "timbre"),
        ("units", "pitch"),
        ("timbre", "pitch"),
        ("identity", "timbre"),
        ("expression", "pitch"),
        ("expression", "mu"),
    ):
        assert influences(full, source, output), (source, output)
    assert not influences(full, "expression", "timbre")
    flat = config(hier=False)
    assert not influences(flat, "units", "timbre")
    assert not influences(flat, "timbre", "pitch")
    assert influences(flat, "units", "mu")
    assert influences(flat, "identity", "timbre")
    assert not influences(config(face_id=False), "identity", "mu")
    assert influences(config(face_id=False), "units", "timbre")
    assert not influences(config(fe=False), "expression", "mu")
    assert influences(config(fe=False), "timbre", "pitch")
    assert not influences(config(timbre=False), "identity", "mu")
    assert influences(config(timbre=False), "units", "pitch")
    assert not influences(config(prosody=False), "expression", "mu")
    assert influences(config(prosody=False), "timbre", "mu")


def test_masked_predictors_and_weighted_sum_switch_off() -> None:
    clips = batch(config())
    without = build(config(mp=False))
    assert without.encode(clips, targets(clips)).masked_logits is None
    assert build(config()).encode(clips, targets(clips)).masked_logits is not None
    assert build(config()).lip_encoder.logits is not None
    assert build(config(ws=False)).lip_encoder.logits is None


def test_synthesis_is_repeatable_and_undoes_the_standardisation() -> None:
    shape = config()
    model, clips = build(shape).eval(), batch(shape)
    visible = {name: clips[name] for name in ("lips", "identity", "expression", "frames")}
    plain = model.synthesize(visible, seeded(1))
    again = model.synthesize(visible, seeded(1))
    torch.testing.assert_close(again["mel"], plain["mel"], rtol=0, atol=0)
    assert (model.synthesize(visible, seeded(2))["mel"] - plain["mel"]).abs().max() > 1e-3
    model.mel_mean.fill_(-5.0)
    model.mel_std.fill_(2.0)
    torch.testing.assert_close(model.synthesize(visible, seeded(1))["mel"], 2 * plain["mel"] - 5)


def test_a_small_model_overfits_one_batch() -> None:
    shape = config(encoder={**SMALL["encoder"], "dropout": 0.0}, flow={"cfg_dropout": 0.0})
    model, clips = build(shape).train(), batch(shape, (8, 10))
    model.mel_mean.fill_(-5.0)
    model.mel_std.fill_(2.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(60):
        optimiser.zero_grad()
        losses = model.losses(clips, seeded(step))
        losses["loss"].backward()
        optimiser.step()
        history.append({name: value.item() for name, value in losses.items()})
    first, last = history[0], history[-1]
    assert last["loss"] < 0.7 * first["loss"]
    assert last["content"] < 0.7 * first["content"]
    assert last["pitch"] + last["timbre"] < 0.8 * (first["pitch"] + first["timbre"])
    assert last["unit_accuracy"] > 0.8


def test_presets_and_wrong_shapes() -> None:
    assert ModelConfig.preset("paper") == ModelConfig()
    tiny = load_config(ModelConfig, overrides=["hier=false", "encoder.dim=64"], base=PRESETS["tiny"])
    assert (tiny.hier, tiny.encoder.dim, tiny.lip_encoder.frozen) == (False, 64, False)
    for override, match in (
        ("encoder.masked_gap=4", "must be odd"),
        ("encoder.masked_gap=15", "below masked_kernel"),
        ("encoder.dim=10", "multiple of twice the heads"),
        ("decoder.channels=[12,12]", "multiples of 8"),
        ("lip_encoder.heads=7", "multiple of heads"),
    ):
        with pytest.raises(UserError, match=match):
            load_config(ModelConfig, overrides=[override])


def test_configuration_does_not_import_torch() -> None:
    code = "import sys, model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
