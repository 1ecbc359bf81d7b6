"""HuBERT: its framing, its layers against plain numpy, public files of all kinds, batches, and the stage around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.special import erf
from transformers import HubertConfig, HubertModel

import pipeline.networks.hubert as hubert
from pipeline.networks.encoders import make_encoder
from pipeline.networks.hubert import HubertEncoder, find_hubert, large, load_hubert, prepare
from pipeline.stage import Clip, Item, Reason, Rejection
from pipeline.stages.speech import Speech, SpeechConfig
from pipeline.units import save_codebook
from shards.errors import UserError

CPU = torch.device("cpu")
WIDTH, HEADS, LAYERS, GROUPS = 24, 3, 3, 4
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


def tiny() -> HubertConfig:
    """The large network's kind, with few channels."""
    shape = large()
    shape.update(
        {
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "intermediate_size": 40,
            "conv_dim": [12] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": GROUPS,
        }
    )
    return shape


@pytest.fixture(scope="module")
def network() -> HubertModel:
    torch.manual_seed(0)
    network = HubertModel(tiny()).eval().requires_grad_(False)
    for name, value in network.named_parameters():
        # Biases and norms start at 0 and 1, where an error would not show.
        if value.ndim == 1:
            value.add_(0.2 * torch.randn_like(value))
        elif "attention" in name:
            value.mul_(8)
    return network


@pytest.fixture(scope="module")
def path(network: HubertModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the hub has it."""
    found = tmp_path_factory.mktemp("hubert") / "pytorch_model.bin"
    torch.save(network.state_dict(), found)
    return found


@pytest.fixture(scope="module")
def encoder(path: Path) -> HubertEncoder:
    return load_hubert(path, CPU, shape=tiny())


def sound(frames: int, seed: int = 0, level: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.02, level, 640 * frames).astype(np.float32)


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def plain(state: dict[str, np.ndarray], wave: np.ndarray) -> list[np.ndarray]:
    """Hidden states of every layer in numpy float64, from the formulas of wav2vec 2.0 (Baevski et al. 2020) with layers
    in pre-norm order; last the final LayerNorm of the last."""

    def affine(x: np.ndarray, name: str) -> np.ndarray:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        return norm(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = wave[:, None].astype(np.float64)
    for number, (kernel, stride) in enumerate(zip(KERNELS, STRIDES, strict=True)):
        name = f"feature_extractor.conv_layers.{number}"
        seen = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=0)[::stride]
        x = np.einsum("tck,ock->to", seen, state[f"{name}.conv.weight"]) + state[f"{name}.conv.bias"]
        x = gelu(normed(x, f"{name}.layer_norm"))
    x = affine(normed(x, "feature_projection.layer_norm"), "feature_projection.projection")
    name = "encoder.pos_conv_embed.conv"
    g, v = (state[f"{name}.parametrizations.weight.original{i}"] for i in (0, 1))
    weight = g * v / np.sqrt((v**2).sum((0, 1), keepdims=True))
    seen = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((8, 8), (0, 0))), 16, axis=0)[: len(x)]
    per = WIDTH // GROUPS
    parts = [np.einsum("tck,ock->to", seen[:, i : i + per], weight[i : i + per]) for i in range(0, WIDTH, per)]
    x = x + gelu(np.concatenate(parts, 1) + state[f"{name}.bias"])
    states = [x]
    for number in range(LAYERS):
        name = f"encoder.layers.{number}"
        y = normed(x, f"{name}.layer_norm")
        q, k, v = (
            affine(y, f"{name}.attention.{part}_proj").reshape(len(x), HEADS, -1).transpose(1, 0, 2) for part in "qkv"
        )
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(WIDTH // HEADS)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(x.shape)
        x = x + affine(mixed, f"{name}.attention.out_proj")
        y = normed(x, f"{name}.final_layer_norm")
        y = affine(gelu(affine(y, f"{name}.feed_forward.intermediate_dense")), f"{name}.feed_forward.output_dense")
        x = x + y
        states.append(x)
    return [*states, normed(x, "encoder.layer_norm")]


def test_every_layer_agrees_with_plain_numpy(network: HubertModel, encoder: HubertEncoder) -> None:
    state = {name: value.numpy().astype(np.float64) for name, value in network.state_dict().items()}
    wave = sound(11)
    # Padding and normalisation once more by hand: reflected without the edge, HF's epsilon.
    padded = np.concatenate([wave[40:0:-1], wave, wave[-2:-42:-1]]).astype(np.float64)
    states = plain(state, (padded - padded.mean()) / np.sqrt(padded.var() + 1e-7))
    assert (encoder.width, encoder.layers) == (WIDTH, LAYERS)
    for layer in (1, 2, 3):
        ((first, features),) = encoder.encode([wave], layer)
        # The last layer's output comes after the final norm, the others' before it.
        np.testing.assert_allclose(features, states[layer if layer < LAYERS else -1], atol=2e-4)
        np.testing.assert_allclose(first, states[1].mean(0), atol=2e-4)
        assert (first.dtype, features.dtype) == (np.float32, np.float32)


def test_layers_agree_with_transformers(network: HubertModel, encoder: HubertEncoder) -> None:
    out = network(torch.from_numpy(prepare(sound(9)))[None], output_hidden_states=True)
    for layer, expected in ((2, out.hidden_states[2]), (3, out.last_hidden_state)):
        ((first, features),) = encoder.encode([sound(9)], layer)
        np.testing.assert_allclose(features, expected[0], atol=1e-4)
        np.testing.assert_allclose(first, out.hidden_states[1][0].mean(0), atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60))
def test_two_frames_per_video_frame(encoder: HubertEncoder, frames: int) -> None:
    assert encoder.encode([sound(frames)], 1)[0][1].shape == (2 * frames, WIDTH)


@pytest.mark.parametrize("frame", [0, 7, 19])
def test_frame_k_hears_400_samples_around_320_k_plus_160(network: HubertModel, frame: int) -> None:
    padded = torch.from_numpy(prepare(sound(10)))[None].requires_grad_()
    network.feature_extractor(padded)[0, :, frame].square().sum().backward()
    assert padded.grad is not None
    heard = np.flatnonzero(padded.grad[0].numpy()) - 40  # in samples of the clip
    assert (heard[0], heard[-1] + 1) == (320 * frame + 160 - 200, 320 * frame + 160 + 200)


@pytest.mark.parametrize("level", [0.3, 0.003])
def test_sound_is_normalised_however_quiet(level: float) -> None:
    made = prepare(sound(20, level=level))
    assert made.shape == (640 * 20 + 80,)
    assert made.mean() == pytest.approx(0, abs=1e-6)
    assert made.std() == pytest.approx(1, abs=0.01)
    assert prepare(np.zeros(640, np.float32)).tolist() == [0.0] * 720


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=2, max_size=5), st.integers(1, LAYERS))
def test_a_clip_does_not_depend_on_its_batch(encoder: HubertEncoder, frames: list[int], layer: int) -> None:
    waves = [sound(count, seed, 0.01 * 10**seed) for seed, count in enumerate(frames)]
    for wave, (first, features) in zip(waves, encoder.encode(waves, layer), strict=True):
        ((alone, expected),) = encoder.encode([wave], layer)
        np.testing.assert_allclose(features, expected, atol=1e-4)
        np.testing.assert_allclose(first, alone, atol=1e-4)


@pytest.fixture(scope="module")
def rounded(path: Path) -> HubertEncoder:
    return load_hubert(path, CPU, "bfloat16", tiny())


def test_bfloat16_stays_close(rounded: HubertEncoder, encoder: HubertEncoder) -> None:
    short = rounded
    waves = [sound(30), sound(22, 1)]
    for (first, rough), (mean, fine) in zip(short.encode(waves, 3), encoder.encode(waves, 3), strict=True):
        assert rough.dtype == first.dtype == np.float32
        # Three layers of rounding to 8 bits (2^-9 at most, of values about 1), not another network.
        assert 0.001 < np.sqrt(np.mean((rough - fine) ** 2)) / fine.std() < 0.015
        assert np.abs(first - mean).max() < 0.015


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(2, 6))
def test_bfloat16_gives_the_same_among_clips_of_equal_length(rounded: HubertEncoder, frames: int, count: int) -> None:
    waves = [sound(frames, seed) for seed in range(count)]
    for wave, (first, features) in zip(waves, rounded.encode(waves, 3), strict=True):
        ((alone, expected),) = rounded.encode([wave], 3)
        np.testing.assert_array_equal(features, expected)
        np.testing.assert_array_equal(first, alone)


@pytest.mark.parametrize("frames", [(40, 25), (50, 48), (31, 30, 12)])
def test_bfloat16_beside_longer_clips_differs_by_rounding_alone(
    rounded: HubertEncoder, frames: tuple[int, ...]
) -> None:
    waves = [sound(count, count) for count in frames]
    for wave, (_, features) in zip(waves, rounded.encode(waves, 3), strict=True):
        assert np.abs(features - rounded.encode([wave], 3)[0][1]).max() < 0.05


def renamed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """As older versions of torch named weight norm."""
    for new, old in (
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    ):
        state = {name.replace(new, old): value for name, value in state.items()}
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("kind", ["old names", "below a head", "safetensors", "half"])
def test_public_formats(network: HubertModel, encoder: HubertEncoder, tmp_path: Path, kind: str) -> None:
    state = dict(network.state_dict())
    file = tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    mask = {"masked_spec_embed": torch.zeros(WIDTH)}
    if kind == "safetensors":
        save_file(renamed({**state, **mask}, ""), file)
    elif kind == "old names":
        torch.save(renamed({**state, **mask}, ""), file)
    elif kind == "below a head":
        head = {"lm_head.weight": torch.zeros(5, WIDTH), "lm_head.bias": torch.zeros(5)}
        torch.save({**renamed({**state, **mask}, "hubert."), **head}, file)
    else:
        torch.save({name: value.half() for name, value in state.items()}, file)
    made = load_hubert(file, CPU, shape=tiny()).encode([sound(6)], 3)[0][1]
    expected = encoder.encode([sound(6)], 3)[0][1]
    np.testing.assert_allclose(made, expected, atol=0.02 if kind == "half" else 1e-6)


def test_other_tensors_are_one_clear_error(network: HubertModel, tmp_path: Path) -> None:
    state = dict(network.state_dict())
    state.pop("encoder.layer_norm.bias")
    torch.save(state, tmp_path / "short.bin")
    with pytest.raises(
        UserError, match=r"HuBERT-Large LL60k .*short\.bin: .*1 missing, e\.g\. encoder\.layer_norm\.bias"
    ):
        load_hubert(tmp_path / "short.bin", CPU, shape=tiny())
    torch.save(dict(network.state_dict()), tmp_path / "small.bin")
    with pytest.raises(UserError, match="of another shape"):
        load_hubert(tmp_path / "small.bin", CPU)  # the large one is expected


def test_the_large_shape_is_the_published_one() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in HubertModel(large()).state_dict().items()}
    assert shapes["feature_extractor.conv_layers.0.conv.weight"] == (512, 1, 10)
    assert shapes["feature_extractor.conv_layers.6.layer_norm.weight"] == (512,)
    assert shapes["feature_projection.projection.weight"] == (1024, 512)
    assert shapes["encoder.pos_conv_embed.conv.parametrizations.weight.original1"] == (1024, 64, 128)
    assert shapes["encoder.layers.23.feed_forward.intermediate_dense.weight"] == (4096, 1024)
    assert "encoder.layers.24.layer_norm.weight" not in shapes
    # Hsu et al. (2021) give 317 M, with what training alone needs.
    assert sum(np.prod(shape) for shape in shapes.values()) == pytest.approx(316e6, rel=0.005)


def test_where_the_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hubert, "CHECKPOINT", replace(hubert.CHECKPOINT, url="http://127.0.0.1:9/pytorch_model.bin"))
    with pytest.raises(UserError, match=r"hubert-large-ll60k/pytorch_model\.bin .*127\.0\.0\.1:9.*--weights"):
        find_hubert(tmp_path)
    cached = tmp_path / "cache" / "faces2voices" / "weights" / "hubert-large-ll60k"
    own = tmp_path / "hubert-large-ll60k"
    for file in (cached / "pytorch_model.bin", cached / "model.safetensors", own / "pytorch_model.bin"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
        with pytest.raises(UserError, match=rf"{file.name}: no file of tensors: it is empty"):
            find_hubert(tmp_path)
        file.write_bytes(b"PK\x03\x04 and then the fetch broke off")
        with pytest.raises(UserError, match="cut short"):
            find_hubert(tmp_path)
        file.write_bytes(b"\x80 a pickle, or so it seems")
        assert find_hubert(tmp_path) == file


def items(lengths: Sequence[int]) -> list[Item]:
    waves = [np.rint(32768 * sound(frames, seed)).astype(np.int16) for seed, frames in enumerate(lengths)]
    return [Item(Clip(str(number), "", ""), {"wav": wav}) for number, wav in enumerate(waves)]


@pytest.fixture
def centroids(encoder: HubertEncoder, tmp_path: Path) -> Path:
    with open(tmp_path / "c.npy", "wb") as stream:
        save_codebook(stream, encoder.encode([sound(30, 9)], 3)[0][1][::6])
    return tmp_path / "c.npy"


def test_the_stage_batches_and_keeps_the_order(
    path: Path, encoder: HubertEncoder, centroids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hubert-large-ll60k").mkdir()
    (tmp_path / "hubert-large-ll60k" / "pytorch_model.bin").write_bytes(path.read_bytes())
    monkeypatch.setattr(hubert, "large", tiny)
    config = SpeechConfig(encoder="hubert_large", layer=3, clusters=10, centroids=centroids, keep_features=True)
    stage = Speech(config, tmp_path)
    assert list(stage.weights()) == [tmp_path / "hubert-large-ll60k" / "pytorch_model.bin"]
    stage.setup()
    sizes: list[int] = []
    plainly = HubertEncoder.encode

    def counted(self: HubertEncoder, waves: Sequence[np.ndarray], layer: int) -> Any:
        sizes.append(len(waves))
        return plainly(self, waves, layer)

    monkeypatch.setattr(HubertEncoder, "encode", counted)
    given = items([20, 5, 21, 20, 5, 13, 5])
    results = list(stage.process(given))
    assert sorted(sizes) == [1, 3, 3]
    assert [item.clip.key for item, _ in results] == [item.clip.key for item in given]
    for item, made in results:
        alone = stage.run(item)
        assert not isinstance(made, Rejection)
        assert made["features"].dtype == np.float16
        np.testing.assert_allclose(made["features"].astype(float), alone["features"].astype(float), atol=2e-3)
        np.testing.assert_allclose(made["timbre"], alone["timbre"], atol=1e-4)
        for fields in (made, alone):  # each frame's unit is the centroid nearest to the feature that is kept
            distance = np.linalg.norm(fields["features"].astype(float)[:, None] - np.load(centroids), axis=2)
            near = distance[np.arange(len(distance)), fields["units"]]
            np.testing.assert_allclose(near, distance.min(1), atol=1e-4)
    with pytest.raises(UserError, match=r"speech\.layer 4: hubert_large has 3"):
        make_encoder("hubert_large", 4, tmp_path)


def test_one_guilty_clip_is_refused_alone(centroids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fussy:
        width, layers, budget, waste = WIDTH, 24, 500, 0.05

        def encode(self, waves: Sequence[np.ndarray], layer: int) -> list[tuple[np.ndarray, np.ndarray]]:
            if any(wave[0] == 0.5 for wave in waves):
                raise RuntimeError("out of memory")
            return [(np.zeros(WIDTH), np.zeros((len(wave) // 320, WIDTH))) for wave in waves]

    monkeypatch.setattr("pipeline.stages.speech.make_encoder", lambda *args: Fussy())
    stage = Speech(SpeechConfig(encoder="hubert_large", layer=24, clusters=10, centroids=centroids))
    stage.setup()
    given = items([9] * 6)
    given[2].fields["wav"][0] = 16384
    results = [made for _, made in stage.process(given)]
    assert [isinstance(made, Rejection) for made in results] == [False, False, True, False, False, False]
    assert isinstance(results[2], Rejection)
    assert results[2].reason is Reason.FAULT
    assert "out of memory" in results[2].traceback
