"""The networks of the metrics against the packages and libraries that published them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.evaluation import dnsmos, speaker, utmos
from model.evaluation.mos import DistillMos
from shards.errors import UserError
from tests.voices import vowel


def test_dnsmos_is_that_of_the_public_package() -> None:
    public = pytest.importorskip("speechmos.dnsmos")
    ours = dnsmos.Dnsmos()
    for seconds in (2.4, 10.2):
        expected = public.run(vowel(seconds), 16_000)
        found = ours(vowel(seconds))
        for key in ("ovrl", "sig", "bak"):
            assert found[f"dnsmos_{key}"] == pytest.approx(expected[f"{key}_mos"], abs=1e-4)


@pytest.mark.parametrize(("seconds", "windows"), [(3.0, 3), (9.5, 1), (16.5, 7), (17.0, 7), (24.0, 7), (35.1, 9)])
def test_dnsmos_takes_the_windows_that_the_public_code_takes(seconds: float, windows: int) -> None:
    # Windows 7 to 23 of a long clip are lost there to rounding: int((7 + 9.01) * 16000) is a sample short.
    judge = dnsmos.Dnsmos()
    seen = []

    class Session:
        def run(self, _: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            seen.append(inputs["input_1"].shape)
            return [np.array([[1.0, 2.0, 3.0]])]

    judge._session = Session()
    figures = judge(np.zeros(int(seconds * 16_000), np.float32))
    assert seen == [(1, 144_160)] * windows
    assert figures["dnsmos_ovrl"] == pytest.approx(-0.06766283 * 9 + 1.11546468 * 3 + 0.04602535)


def test_distillmos_is_that_of_the_public_package() -> None:
    # Values of distillmos 0.9.1 itself, which cannot be imported without torchaudio; 9.5 s are three windows.
    judge = DistillMos()
    assert judge(vowel(2.4)) == pytest.approx(2.81432, abs=2e-3)
    assert judge(vowel(9.5)) == pytest.approx(1.96202, abs=2e-3)


def test_ge2e_is_that_of_the_public_package() -> None:
    pytest.importorskip("librosa")
    public = pytest.importorskip("resemblyzer")
    encoder, ours = public.VoiceEncoder("cpu", verbose=False), speaker.Speaker()
    pause = np.concatenate([vowel(1.0), 1e-3 * np.random.default_rng(0).standard_normal(24_000), vowel(1.5, 150.0)])
    for wave in (0.01 * pause.astype(np.float32), vowel(2.0), vowel(4.1, 210.0)):
        voice = public.preprocess_wav(wave.copy())
        assert np.allclose(speaker.voiced(speaker.louder(wave)), voice, atol=1e-6)
        embedding = ours.embed(wave)
        assert embedding is not None
        assert np.allclose(embedding, encoder.embed_utterance(voice, rate=1.25), atol=1e-5)


def test_too_little_voice_has_no_embedding() -> None:
    ours = speaker.Speaker()
    for wave in (np.zeros(16_000, np.float32), vowel(0.3), vowel(0.01), np.zeros(0, np.float32)):
        assert ours.embed(wave) is None


SMALL = {"features": 32, "width": 64, "layers": 2, "heads": 4, "ffn": 96, "told": 8, "hidden": 16, "head": 24}


@pytest.fixture(scope="module")
def network() -> utmos.Utmos:
    torch.manual_seed(0)
    small = utmos.Utmos(**SMALL)
    for tensor in small.parameters():  # norms and embeddings too
        torch.nn.init.normal_(tensor, 0.0, 0.2)
    return small.eval()


@pytest.mark.parametrize("samples", [400, 6400, 6720])
def test_utmos_listens_through_wav2vec2(network: utmos.Utmos, samples: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        conv_dim=(32,) * 7, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    reference = transformers.Wav2Vec2Model(config).eval()
    ours = network.wav2vec2.state_dict()
    theirs = {}
    for name in reference.state_dict():
        if name == "masked_spec_embed" or ".parametrizations." in name:
            continue
        source = name.replace("feature_projection.layer_norm", "layer_norm")
        source = source.replace("feature_projection.projection", "post_extract_proj")
        source = source.replace(".conv.weight", ".0.weight").replace("conv_layers.0.layer_norm", "conv_layers.0.2")
        source = source.replace("pos_conv_embed.conv", "pos_conv.0").replace(".attention.", ".self_attn.")
        source = source.replace("feed_forward.intermediate_dense", "fc1").replace("feed_forward.output_dense", "fc2")
        if ".layers." in source:
            source = source.replace("1.layer_norm", "1.self_attn_layer_norm").replace(
                "0.layer_norm", "0.self_attn_layer_norm"
            )
        theirs[name] = ours.pop(source)
    reference.load_state_dict(theirs, strict=False)
    reference.encoder.pos_conv_embed.conv.weight = ours.pop("encoder.pos_conv.0.weight")
    assert not ours
    wave = torch.randn(2, samples, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(wave).last_hidden_state
        assert torch.allclose(network.wav2vec2(wave), expected, atol=2e-4)


def test_utmos_judges_frames_by_its_formula(network: utmos.Utmos) -> None:
    wave = torch.randn(1, 4000, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        frames = network.wav2vec2(wave)[0]
        told = torch.cat([network.domain_emb[0], network.judge_emb[0]])
        rows = torch.stack([torch.cat([frame, told]) for frame in frames])
        hidden = network.blstm(rows)[0]
        scores = network.projection[2](network.projection[0](hidden).clamp(min=0))
        assert float(network(wave)[0]) == pytest.approx(3 + 2 * float(scores.mean()), abs=1e-5)


def published(network: utmos.Utmos) -> dict[str, torch.Tensor]:
    """Tensors as the public file has them: weight norm of the positional convolution, and the mask of training."""
    tensors = dict(network.state_dict())
    place = "wav2vec2.encoder.pos_conv.0.weight"
    weight = tensors.pop(place)
    tensors[f"{place}_g"] = weight.pow(2).sum((0, 1), keepdim=True).sqrt()
    tensors[f"{place}_v"] = 3 * weight
    return tensors | {"wav2vec2.mask_emb": torch.zeros(64)}


def test_utmos_loads_the_public_files_names(network: utmos.Utmos, tmp_path: Path) -> None:
    torch.save(published(network), tmp_path / "utmos.pt")
    loaded = utmos.Utmos(**SMALL).eval()
    utmos.load_public(loaded, tmp_path / "utmos.pt")
    wave = torch.randn(1, 4000)
    with torch.inference_mode():
        assert torch.allclose(loaded(wave), network(wave), atol=1e-5)
    expected = {"domain_emb": (1, 128), "judge_emb": (1, 128), "projection.0.weight": (2048, 1024)}
    expected |= {"wav2vec2.encoder.layers.11.self_attn.q_proj.bias": (768,), "blstm.weight_ih_l0_reverse": (2048, 1024)}
    expected |= {"wav2vec2.feature_extractor.conv_layers.0.2.weight": (512,), "projection.2.bias": (1,)}
    expected |= {"wav2vec2.encoder.pos_conv.0.weight": (768, 48, 128), "wav2vec2.post_extract_proj.weight": (768, 512)}
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in utmos.Utmos().state_dict().items()}
    assert {name: shapes[name] for name in expected} == expected


def test_utmos_refuses_another_file(network: utmos.Utmos, tmp_path: Path) -> None:
    tensors = published(network)
    del tensors["judge_emb"]
    torch.save(tensors, tmp_path / "other.pt")
    with pytest.raises(UserError, match="judge_emb"):
        utmos.load_public(utmos.Utmos(**SMALL), tmp_path / "other.pt")


def test_no_package_that_breaks_others_is_loaded() -> None:
    assert not {"torchaudio", "distillmos", "xls_r_sqa"} & {*sys.modules}
