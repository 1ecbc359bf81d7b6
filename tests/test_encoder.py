"""The hierarchical encoder and the whole model: padding, wiring, teacher forcing, losses, learning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.encoder import HierarchicalEncoder, Targets
from model.predictors import MaskedPredictor
from tests.small_model import NO_DROPOUT, SMALL, batch, build, config, first_alone, seeded, targets


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


def test_padding_stays_within_rounding_in_half_precision() -> None:
    """Kernels may add in another order for another length: with bfloat16's 8 bits that is up to 2 % of an output's
    root mean square, as far as it is from float32 itself."""
    shape = config()
    model = build(shape).eval()
    clips = batch(shape)
    alone = first_alone(clips, 6)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = model.encode(alone, targets(alone)), model.encode(clips, targets(clips))
    for name, value in vars(one).items():
        assert value.dtype == torch.float32
        other = getattr(two, name)[:1]
        if name == "mu":
            other = other[:, :, :12]
        elif name != "timbre":
            other = other[:, :12]
        assert (other - value).norm() < 0.03 * value.norm(), name


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


def test_the_mel_trains_no_predictor_and_predictions_train_no_later_stage() -> None:
    shape = config()
    model = build(shape)
    clips = batch(shape)
    out = model.encode(clips, targets(clips))
    heads = {name: p for name, p in model.named_parameters() if ".predictor." in name or ".masked." in name}
    heads |= {
        name: p
        for name, p in model.named_parameters()
        if name.startswith(("encoder.prosody.pitch.", "encoder.prosody.energy."))
    }
    found = torch.autograd.grad(out.mu.sum(), list(heads.values()), allow_unused=True, retain_graph=True)
    assert [name for name, gradient in zip(heads, found, strict=True) if gradient is not None] == []
    # Nor does the loss of a later attribute reach the head of an earlier one.
    earlier = [p for name, p in heads.items() if name.startswith(("encoder.content", "encoder.timbre"))]
    assert out.pitch is not None
    assert set(torch.autograd.grad(out.pitch.sum(), earlier, allow_unused=True)) == {None}


@pytest.mark.parametrize("frames", [(1,), (2,), (5,), (1, 7)])
def test_clips_of_any_length_are_synthesised(frames: tuple[int, ...]) -> None:
    shape = config()
    model, clips = build(shape).eval(), batch(shape, frames)
    found = model.synthesize(clips, seeded(), steps=2)
    length = 2 * max(frames)
    assert found["mel"].shape == (len(frames), 80, length)
    assert found["units"].shape == found["pitch"].shape == found["energy"].shape == (len(frames), length)
    assert all(torch.isfinite(value).all() for value in found.values())


def test_a_prediction_that_changes_changes_the_mel() -> None:
    """At inference each head's own answer is fed on."""
    shape = config()
    model, clips = build(shape).eval(), batch(shape)
    before = model.encode(clips).mu
    biases = dict(model.named_parameters())
    for head in ("content.predictor", "timbre.predictor", "prosody.pitch", "prosody.energy"):
        bias = biases[f"encoder.{head}.head.2.bias"]
        kept = bias.detach().clone()
        with torch.no_grad():
            bias[0] += 100.0
            assert (model.encode(clips).mu - before).abs().max() > 1e-3
            bias.copy_(kept)


def test_masked_predictor_is_blind_to_its_frame() -> None:
    head = MaskedPredictor(config().encoder, 3).eval()
    x = torch.randn(1, 41, 32, generator=seeded()).requires_grad_()
    head(x, torch.ones(1, 41, dtype=torch.bool))[0, 20].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert seen == [*range(13, 18), *range(23, 28)]


@pytest.mark.parametrize("variant", [{}, {"hier": False}, {"timbre": False}, {"face_id": False, "fe": False}])
def test_stages_are_wired_as_in_the_paper(variant: dict[str, Any]) -> None:
    """The equations of section 3, written once more around the encoder's own pieces."""
    shape = config(**variant)
    torch.manual_seed(0)
    net = HierarchicalEncoder(shape).eval()
    clips = batch(shape, (6,))
    lips, mask = torch.randn(1, 6, 16, generator=seeded()), torch.ones(1, 6, dtype=torch.bool)
    mask2 = torch.ones(1, 12, dtype=torch.bool)
    out = net(lips, clips["identity"], clips["expression"], mask, targets(clips))
    h_l = net.lip_up(lips, mask)
    h_c = h_l + net.content.embedding(clips["units"])
    h_t = h_c
    if net.timbre is not None:
        z_t = h_l if net.to_timbre is None else net.to_timbre(h_c, mask2)
        if net.timbre.fusion is not None and net.timbre.up is not None:
            identity = clips["identity"] / clips["identity"].square().sum(-1, keepdim=True).sqrt()
            z_t = net.timbre.fusion(net.timbre.up(identity, mask), z_t, mask2)
        assert out.timbre is not None
        torch.testing.assert_close(out.timbre, net.timbre.predictor(z_t, mask2).mean(dim=1), rtol=1e-4, atol=1e-5)
        h_t = z_t + net.timbre.embedding(clips["timbre"])[:, None] + h_c
    assert net.prosody is not None
    z_p = h_l if net.to_prosody is None else net.to_prosody(h_t, mask2)
    if net.prosody.fusion is not None and net.prosody.up is not None:
        z_p = net.prosody.fusion(net.prosody.up(clips["expression"], mask), z_p, mask2)
    pitch = net.prosody.pitch_embedding(clips["pitch"][..., None], mask2)
    h_p = z_p + pitch + net.prosody.energy_embedding(clips["energy"][..., None], mask2) + h_t
    mu = net.to_mel(net.decoder(h_p, mask2)).transpose(1, 2)
    for found, expected in ((out.mu, mu), (out.logits, net.content.predictor(h_l, mask2))):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for head, one in ((net.prosody.pitch, out.pitch), (net.prosody.energy, out.energy)):
        assert one is not None
        torch.testing.assert_close(one, head(z_p, mask2)[..., 0], rtol=1e-4, atol=1e-5)


def test_identity_by_frames_or_as_a_mean_of_unit_length() -> None:
    clips = batch(config())
    alone = first_alone(clips, 6)

    def timbre(features: Tensor, **keys: Any) -> Tensor:
        model = build(config(encoder={**SMALL["encoder"], **keys})).eval()
        found = model.encode({**alone, "identity": features}).timbre
        assert found is not None
        return found

    features = alone["identity"]
    unit = features / features.norm(dim=-1, keepdim=True)
    mean = features.mean(dim=1, keepdim=True).expand_as(features)
    torch.testing.assert_close(timbre(features), timbre(unit, normalize_identity=False), rtol=1e-4, atol=1e-5)
    # What is stored has unit length, in half precision: normalising it again is no more than rounding.
    torch.testing.assert_close(timbre(unit.half().float()), timbre(unit), rtol=0, atol=1e-3)
    assert (timbre(features, normalize_identity=False) - timbre(features)).abs().max() > 1e-3
    plain = {"identity": "mean", "normalize_identity": False}
    torch.testing.assert_close(timbre(features, **plain), timbre(mean, normalize_identity=False), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(timbre(features, identity="mean"), timbre(mean), rtol=1e-4, atol=1e-5)
    assert (timbre(features, identity="mean") - timbre(features)).abs().max() > 1e-3
    # The mean is that of valid frames: garbage in the padding of a batch changes nothing.
    model = build(config(encoder={**SMALL["encoder"], "identity": "mean"})).eval()
    padded = model.encode(clips).timbre
    assert padded is not None
    torch.testing.assert_close(padded[:1], timbre(features, identity="mean"), rtol=1e-4, atol=1e-4)


def test_losses_are_sums_over_plain_and_masked_predictors() -> None:
    shape = config()
    model, clips = build(shape).eval(), batch(shape)
    found = {name: value.item() for name, value in model.losses(clips, seeded()).items()}
    with torch.no_grad():
        out = {
            name: value.numpy().astype(np.float64) for name, value in vars(model.encode(clips, targets(clips))).items()
        }
    valid = np.arange(20) < 2 * clips["frames"].numpy()[:, None]

    def entropy(logits: Any) -> Any:
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        hit = np.take_along_axis(log_p, clips["units"].numpy().clip(0)[..., None], axis=-1)[..., 0]
        return -(0.9 * hit + 0.1 * log_p.mean(axis=-1))[valid].mean()

    def distance(name: str) -> Any:
        target = clips[name.removeprefix("masked_")].numpy()
        return np.abs(out[name] - target)[valid].mean()

    expected = {
        "content": entropy(out["logits"]) + entropy(out["masked_logits"]),
        "timbre": np.abs(out["timbre"] - clips["timbre"].numpy()).mean(),
        "pitch": distance("pitch") + distance("masked_pitch"),
        "energy": distance("energy") + distance("masked_energy"),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    total = found["cfm"] + found["prior"] + 0.5 * sum(expected.values())
    assert found["loss"] == pytest.approx(total, rel=1e-4)


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
    shape = config(encoder={**SMALL["encoder"], **NO_DROPOUT}, flow={"cfg_dropout": 0.0})
    model, clips = build(shape).train(), batch(shape, (8, 10))
    model.mel_mean.fill_(-5.0)
    model.mel_std.fill_(2.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    for step in range(25):
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
