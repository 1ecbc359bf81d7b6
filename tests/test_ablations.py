"""The rows of the paper's ablation table: what each switch removes, who still informs whom, and that all train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.encoder import HierarchicalEncoder, Targets
from model.layers import length_mask
from tests.small_model import SMALL, batch, build, config, seeded, targets

SWITCHES = ("hier", "timbre", "prosody", "face_id", "fe", "ws", "mp")
NONE_LEFT = dict.fromkeys(SWITCHES, False)
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"without {switch}": {switch: False} for switch in SWITCHES},
    "without all": NONE_LEFT,
    "without hier and timbre": {"hier": False, "timbre": False},
    "frozen": {"lip_encoder": {**SMALL["lip_encoder"], "frozen": True}},
    "frozen without ws": {"lip_encoder": {**SMALL["lip_encoder"], "frozen": True}, "ws": False},
    "other pieces": {
        "encoder": {
            **SMALL["encoder"],
            "positions": "sinusoidal",
            "masked_hidden": 0,
            "masked_activation": "tanh",
            "fusion_layers": 1,
            "up_kernel": 6,
            "up_conv": 1,
            "drop_path": 0.9,
            "identity": "mean",
            "normalize_identity": False,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_trains_and_synthesises_with_every_parameter_in_use(variant: str) -> None:
    """Processes that share their gradients wait for every parameter's, so none may be left out."""
    shape = config(**VARIANTS[variant])
    model, clips = build(shape), batch(shape)
    losses = model.losses(clips, seeded())
    losses["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []
    assert ("timbre" in losses) == shape.timbre
    assert ("pitch" in losses) == ("energy" in losses) == shape.prosody
    found = model.eval().synthesize(clips, seeded(), steps=2)
    assert found["mel"].shape == (2, 80, 20)
    assert torch.isfinite(found["mel"]).all()
    assert ("timbre" in found) == shape.timbre
    assert ("pitch" in found) == shape.prosody


@pytest.mark.parametrize(
    ("switch", "gone"),
    [
        ("hier", ["to_timbre", "to_prosody"]),
        ("timbre", ["to_timbre", "timbre"]),
        ("prosody", ["to_prosody", "prosody"]),
        ("face_id", ["timbre.up", "timbre.fusion"]),
        ("fe", ["prosody.up", "prosody.fusion"]),
        ("mp", ["content.masked", "prosody.masked"]),
        ("ws", []),
    ],
)
def test_a_switch_removes_its_parameters_and_no_others(switch: str, gone: list[str]) -> None:
    def names(shape: ModelConfig) -> set[str]:
        return {name for name, _ in HierarchicalEncoder(shape).named_parameters()}

    full = names(config())
    removed = {name for name in full if name.startswith(tuple(f"{part}." for part in gone))}
    assert len({part for part in gone for name in removed if name.startswith(f"{part}.")}) == len(gone)
    assert names(config(**{switch: False})) == full - removed


def influences(shape: ModelConfig) -> dict[str, set[str]]:
    """Which inputs, and which targets that are fed, have a gradient to each output of the encoder."""
    torch.manual_seed(0)
    encoder = HierarchicalEncoder(shape).eval()
    clips = batch(shape)
    clips["lips"] = torch.randn(2, 10, shape.lip_encoder.dim, generator=seeded())
    names = ("lips", "identity", "expression", "timbre", "pitch", "energy")
    fed = {name: clips[name].clone().requires_grad_() for name in names}
    given = Targets(clips["units"], fed["timbre"], fed["pitch"], fed["energy"])
    mask = length_mask(clips["frames"], 10)
    out = encoder(fed["lips"], fed["identity"], fed["expression"], mask, given)
    leaves = {**fed, "units": encoder.content.embedding.weight}
    found = {}
    for name, value in vars(out).items():
        if value is None:
            continue
        gradients = torch.autograd.grad(
            value.square().sum(), list(leaves.values()), allow_unused=True, retain_graph=True
        )
        found[name] = {leaf for leaf, g in zip(leaves, gradients, strict=True) if g is not None and g.abs().sum() > 0}
    return found


def informed(
    timbre: set[str] | None, prosody: set[str] | None, mel: set[str], masked: bool = True
) -> dict[str, set[str]]:
    """A table for `influences`: who informs the timbre, the pitch and energy, and the mel; content hears lips alone."""
    table = {"logits": {"lips"}, "masked_logits": {"lips"}, "mu": mel}
    if timbre is not None:
        table["timbre"] = timbre
    if prosody is not None:
        table |= dict.fromkeys(("pitch", "energy", "masked_pitch", "masked_energy"), prosody)
    return {name: sources for name, sources in table.items() if masked or not name.startswith("masked")}


EVERYTHING = {"lips", "units", "identity", "timbre", "expression", "pitch", "energy"}
OF_TIMBRE = {"lips", "units", "identity"}
OF_PROSODY = {"lips", "units", "identity", "timbre", "expression"}


@pytest.mark.parametrize(
    ("switch", "expected"),
    [
        (None, informed(OF_TIMBRE, OF_PROSODY, EVERYTHING)),
        ("ws", informed(OF_TIMBRE, OF_PROSODY, EVERYTHING)),
        ("mp", informed(OF_TIMBRE, OF_PROSODY, EVERYTHING, masked=False)),
        ("hier", informed({"lips", "identity"}, {"lips", "expression"}, EVERYTHING)),
        ("timbre", informed(None, {"lips", "units", "expression"}, EVERYTHING - {"identity", "timbre"})),
        ("prosody", informed(OF_TIMBRE, None, {"lips", "units", "identity", "timbre"})),
        ("face_id", informed(OF_TIMBRE - {"identity"}, OF_PROSODY - {"identity"}, EVERYTHING - {"identity"})),
        ("fe", informed(OF_TIMBRE, OF_PROSODY - {"expression"}, EVERYTHING - {"expression"})),
    ],
)
def test_switches_change_who_informs_whom(switch: str | None, expected: dict[str, set[str]]) -> None:
    assert influences(config(**({} if switch is None else {switch: False}))) == expected


def test_masked_predictors_and_weighted_sum_switch_off() -> None:
    clips = batch(config())
    without = build(config(mp=False))
    assert without.encode(clips, targets(clips)).masked_logits is None
    assert build(config()).encode(clips, targets(clips)).masked_logits is not None
    assert build(config()).lip_encoder.logits is not None
    assert build(config(ws=False)).lip_encoder.logits is None
