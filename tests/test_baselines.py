"""The baselines: that they train and speak like any system, and the parts that are theirs alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.baselines.conformer import Conformer
from model.baselines.dit import DiTBlock
from model.baselines.svts import SVTS
from model.baselines.v2sflow import V2SFlow
from model.checkpoint import Checkpoint
from model.config import PRESETS, ModelConfig
from model.flops import count_flops
from model.flow import Place
from model.layers import length_mask, position_angles
from model.optimiser import adamw
from model.rehearsal import rehearsal
from model.resume import check_same_run, plain
from model.system import System
from model.systems import SYSTEMS, build_network
from model.train_config import OptimiserConfig, TrainConfig
from model.transformer_config import ConformerConfig, DiTConfig
from model.windows import WINDOW
from shards.config import load_config
from shards.errors import UserError
from tests.small_model import batch, config, first_alone, seeded

BASELINES = ("svts", "intelligible", "v2sflow")
SMALL: dict[str, Any] = {
    "conformer": {"dim": 16, "layers": 2, "heads": 2, "ffn": 16, "kernel": 5, "dropout": 0.0},
    "dit": {"dim": 16, "layers": 2, "heads": 2, "ffn": 16, "adapter_layers": 1, "adapter_ffn": 16, "dropout": 0.0},
}
FOUND: dict[str, set[str]] = {"svts": set(), "intelligible": {"logits"}, "v2sflow": {"logits", "pitch", "timbre"}}


def build(system: str, **changes: Any) -> System:
    torch.manual_seed(0)
    return build_network(config(system=system, **{**SMALL, **changes}))


def test_every_system_of_the_configuration_is_there() -> None:
    names = ModelConfig.model_json_schema()["properties"]["system"]["enum"]
    assert set(names) == set(SYSTEMS)
    assert isinstance(build("svts"), SVTS)
    with pytest.raises(UserError, match="system: choose from faces2voices, svts, intelligible, v2sflow"):
        load_config(ModelConfig, overrides=["system=lipvoicer"])


def test_shapes_that_cannot_be_are_named() -> None:
    for override, match in (
        ("conformer.kernel=4", "kernel 4 must be odd"),
        ("conformer.heads=3", "multiple of twice the heads 3"),
        ("dit.heads=7", "multiple of twice the heads 7"),
        ("dit={dim: 2, heads: 1}", r"dit\.dim: .*4"),
        ("speaker=name", "speaker: choose from face, voice"),
    ):
        with pytest.raises(UserError, match=match):
            load_config(ModelConfig, overrides=[override])


def test_part_of_a_flow_keeps_the_other_keys_of_a_rectified_one() -> None:
    flow = load_config(ModelConfig, overrides=["rectified_flow.cfg_dropout=0.2"]).rectified_flow
    assert (flow.sigma, flow.train_t, flow.solver_t, flow.cfg_dropout) == (0.0, "uniform", "uniform", 0.2)


@pytest.mark.parametrize("speaker", ["face", "voice"])
@pytest.mark.parametrize("system", BASELINES)
def test_trains_and_speaks_with_every_parameter_in_use(system: str, speaker: str) -> None:
    network, clips = build(system, speaker=speaker), batch(config())
    network(clips, seeded())["loss"].backward()
    assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    network.eval()
    spoken = network.synthesize(clips, seeded(), steps=2)
    assert spoken["mel"].shape == (2, 80, 20)
    assert torch.isfinite(spoken["mel"]).all()
    units = {"units" if name == "logits" else name for name in FOUND[system]}
    assert set(spoken) == {"mel"} | units | ({"timbre"} if speaker == "voice" else set())
    if speaker == "voice":
        torch.testing.assert_close(spoken["timbre"], clips["timbre"])
        with pytest.raises(UserError, match=r"model\.speaker=voice"):
            network.predict({name: value for name, value in clips.items() if name != "timbre"})
    else:
        # The sound's own fields are not looked at.
        silent = {name: clips[name] for name in ("lips", "identity", "frames")}
        torch.testing.assert_close(network.synthesize(silent, seeded(), steps=2)["mel"], spoken["mel"])


@pytest.mark.parametrize("system", BASELINES)
def test_who_speaks_is_heard(system: str) -> None:
    for speaker, field in (("face", "identity"), ("voice", "timbre")):
        network, clips = build(system, speaker=speaker).eval(), batch(config())
        given = network.predict(clips)
        other = network.predict({**clips, field: clips[field].flip(0)})
        assert (given["mu"] - other["mu"])[1].abs().max() > 1e-4
        if speaker == "voice" or system == "v2sflow":
            told = network.predict(clips, timbre=clips["timbre"].flip(0))
            torch.testing.assert_close(told["timbre"], clips["timbre"].flip(0))
            assert (given["mu"] - told["mu"]).abs().max() > 1e-4


@pytest.mark.parametrize("system", BASELINES)
def test_padding_and_neighbours_change_nothing(system: str) -> None:
    network, clips = build(system).eval(), batch(config())
    together, alone = network.predict(clips), network.predict(first_alone(clips, 6))
    assert set(together) == {"mu"} | FOUND[system]
    for name, value in alone.items():
        row = together[name][:1]
        row = row if name == "timbre" else row[..., :12] if name in ("mu", "pitch") else row[:, :12]
        torch.testing.assert_close(row, value, rtol=1e-4, atol=1e-5)
    mask = length_mask(2 * clips["frames"], 20)
    noises = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    mels = network.render(together, mask, noises, steps=2)
    mel = network.render(alone, mask[:1, :12], [torch.Generator().manual_seed(5)], steps=2)
    torch.testing.assert_close(mels[:1, :, :12], mel, rtol=1e-3, atol=1e-4)
    assert (mels[0, :, 12:] == network.mel_mean).all()


@pytest.mark.parametrize("system", BASELINES)
def test_a_batch_in_parts_has_the_loss_of_the_whole(system: str) -> None:
    network, clips = build(system, rectified_flow={"cfg_dropout": 0.0}).eval(), batch(config())
    whole = network.losses(clips, seeded())
    sums: dict[str, Tensor] = {}
    for row in range(2):
        part = {name: value[row : row + 1] for name, value in clips.items()}
        share = part["frames"].sum() / 8
        for name, value in network.losses(part, seeded(), Place(row, 2), share).items():
            sums[name] = sums.get(name, torch.zeros(())) + value / 2
    for name, value in whole.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("system", BASELINES)
def test_learns_two_clips(system: str) -> None:
    network, clips = build(system, dit={**SMALL["dit"], "residual": True}), batch(config())
    network.mel_mean.fill_(-5.0)
    network.mel_std.fill_(2.0)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        found = network.losses(clips, seeded())
        optimiser.zero_grad()
        found["loss"].backward()
        optimiser.step()
        losses.append(float(found["loss"].detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_svts_loss_is_the_l1_distance_of_valid_frames() -> None:
    network, clips = build("svts", loss={"mel": 3.0}).eval(), batch(config())
    network.mel_mean.fill_(-4.0)
    network.mel_std.fill_(1.5)
    found, mu = network.losses(clips, seeded()), network.predict(clips)["mu"].numpy()
    mel = (clips["mel"].numpy().astype(np.float64) + 4.0) / 1.5
    rows = zip(mu, mel, (12, 20), strict=True)
    errors = np.concatenate([np.abs(a[:, :length] - b[:, :length]).ravel() for a, b, length in rows])
    assert float(found["mel"].detach()) == pytest.approx(errors.mean(), rel=1e-5)
    assert float(found["loss"].detach()) == pytest.approx(3 * errors.mean(), rel=1e-5)
    spoken = network.synthesize(clips, seeded())["mel"].numpy()
    np.testing.assert_allclose(spoken[1], mu[1] * 1.5 - 4.0, rtol=1e-5, atol=1e-5)


def test_rectified_flow_loss_is_its_formula() -> None:
    network, clips = build("v2sflow", rectified_flow={"cfg_dropout": 0.0}).eval(), batch(config(), (8, 8))
    assert isinstance(network, V2SFlow)
    torch.nn.init.normal_(network.decoder.head.weight)
    seen: list[tuple[np.ndarray, ...]] = []
    inside = network.decoder.forward

    def watched(x: Tensor, t: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        out = inside(x, t, condition, mask)
        seen.append(tuple(value.detach().numpy().astype(np.float64) for value in (x, t, out)))
        return out

    network.decoder.forward = watched  # type: ignore[method-assign]
    loss = float(network.losses(clips, seeded())["cfm"].detach())
    ((x, t, out),) = seen
    # x_t = (1 - t) noise + t mel, so the way that is left, (mel - x_t) / (1 - t), is the velocity mel - noise.
    mel, left = clips["mel"].numpy().astype(np.float64), (1 - t)[:, None, None]
    assert ((t >= 0) & (t < 1)).all()
    assert loss == pytest.approx(np.mean((out - (mel - x) / left) ** 2), rel=1e-4)
    noise = (x - t[:, None, None] * mel) / left
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1


def test_guidance_leads_away_from_no_condition() -> None:
    network, clips = build("v2sflow").eval(), batch(config(), (4, 4))
    assert isinstance(network, V2SFlow)
    torch.nn.init.normal_(network.decoder.head.weight, std=0.1)
    prediction, mask = network.predict(clips), torch.ones(2, 8, dtype=torch.bool)
    mels = [network.render(prediction, mask, seeded(), 1, guidance) for guidance in (0.0, 1.0, 2.0)]
    # One Euler step is linear in the guidance.
    torch.testing.assert_close(mels[2] - mels[1], mels[1] - mels[0], rtol=1e-3, atol=1e-4)
    assert (mels[1] - mels[0]).abs().max() > 1e-3


def test_decoder_of_v2sflow_does_not_train_its_heads() -> None:
    network, clips = build("v2sflow"), batch(config())
    found = network.losses(clips, seeded())
    (found["cfm"] + found["prior"]).backward()
    trained = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert trained == {"unit_embedding", "unit_adapter", "pitch_embedding", "pitch_adapter", "timbre_embedding"} | {
        "mean",
        "decoder",
    }


def test_dit_block_begins_as_the_identity() -> None:
    block = DiTBlock(DiTConfig(dim=16, heads=2, ffn=16))
    x, time, mask = torch.randn(2, 5, 16), torch.randn(2, 16), torch.ones(2, 5, dtype=torch.bool)
    rotation = position_angles(5, 8, x.device)
    assert torch.equal(block(x, time, mask, rotation), x)
    torch.nn.init.normal_(block.modulation.weight)
    moved = block(x, time, mask, rotation)
    assert (moved - x).abs().max() > 0.1
    assert (block(x, time.flip(0), mask, rotation) - moved).abs().max() > 0.1


def test_conformer_sees_far_and_in_order() -> None:
    torch.manual_seed(0)
    network = Conformer(ConformerConfig(dim=16, layers=1, heads=2, ffn=16, kernel=3, dropout=0.0))
    x, mask = torch.randn(1, 12, 16), torch.ones(1, 12, dtype=torch.bool)
    other = x.clone()
    other[:, 11] = torch.randn(16)
    y, changed = network(x, mask), network(other, mask)
    assert (y - changed)[:, 0].abs().max() > 1e-6
    torch.testing.assert_close(y.mean(-1), torch.zeros(1, 12), rtol=0, atol=1e-5)
    assert (network(x.flip(1), mask).flip(1) - y).abs().max() > 1e-3


@pytest.mark.parametrize("system", BASELINES)
def test_a_step_can_be_counted_and_rehearsed(system: str) -> None:
    network, clips = build(system), batch(config())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with rehearsal(network):
        flops = count_flops(lambda: network.losses(clips, seeded())["loss"].backward())
    assert flops > 1e6
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_presets_are_of_a_size() -> None:
    def size(preset: str, system: str) -> int:
        with torch.device("meta"):
            network = build_network(load_config(ModelConfig, base={**PRESETS[preset], "system": system}))
        lips = sum(p.numel() for p in network.lip_encoder.parameters())
        return sum(p.numel() for p in network.parameters()) - lips

    for preset in ("paper", "tiny"):
        ours = size(preset, "faces2voices")
        assert all(0.6 < size(preset, system) / ours < 1.6 for system in BASELINES)


def test_lip_encoder_learns_at_its_own_rate() -> None:
    groups = adamw(build("svts"), OptimiserConfig(lr=1e-3, lip_lr=1e-4)).param_groups
    assert [group["scale"] for group in groups] == [1.0, pytest.approx(0.1)]
    counted = sum(p.numel() for group in groups for p in group["params"])
    assert counted == sum(p.numel() for p in build("svts").parameters())


def test_a_run_goes_on_with_its_own_system_alone() -> None:
    run, shape = TrainConfig(), config()
    old = plain(shape)
    for key in ("system", "speaker", "conformer", "dit", "rectified_flow"):  # as written before there were baselines
        del old[key]
    state = Checkpoint(3, plain(run), old, {}, {}, {}, None)
    check_same_run("run", state, run, load_config(ModelConfig, base=old), {})
    with pytest.raises(UserError, match=r"model\.system was 'faces2voices', is 'svts'"):
        check_same_run("run", state, run, config(system="svts"), {})


def test_long_clips_are_rendered_in_windows() -> None:
    network = build("v2sflow").eval()
    prediction = {
        "logits": torch.randn(1, 1000, 11),
        "pitch": torch.randn(1, 1000),
        "timbre": torch.randn(1, 9),
    }
    assert isinstance(network, V2SFlow)
    seen: set[int] = set()
    network.decoder.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].shape[2]))
    mel = network.render(prediction, torch.ones(1, 1000, dtype=torch.bool), seeded(), 1)
    assert seen == {2 * WINDOW}
    assert mel.shape == (1, 80, 1000)
    assert torch.isfinite(mel).all()
