"""AV-HuBERT's video path: its public shape and keys, padding and the layer sum."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.avhubert import AVHubert, LipEncoder, PositionalConv
from model.config import LipEncoderConfig
from model.layers import length_mask

SMALL = LipEncoderConfig(
    stem=4, trunk=(4, 6, 8, 10), dim=16, layers=3, heads=2, ffn=24, pos_kernel=8, pos_groups=4, frozen=False
)


def lips(batch: int, frames: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1, frames, 88, 88, generator=torch.Generator().manual_seed(seed))


def everything(batch: int, frames: int) -> Tensor:
    return torch.ones(batch, frames, dtype=torch.bool)


def test_large_model_has_the_published_size_and_keys() -> None:
    with torch.device("meta"):
        network = AVHubert(LipEncoderConfig())
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(324.5, abs=0.05)
    resnet = "feature_extractor_video.resnet"
    published = {
        f"{resnet}.frontend3D.0.weight": [64, 1, 5, 7, 7],
        f"{resnet}.frontend3D.2.weight": [64],
        "feature_extractor_video.proj.weight": [1024, 512],
        "layer_norm.weight": [2048],
        "post_extract_proj.weight": [1024, 2048],
        "encoder.pos_conv.0.weight_g": [1, 1, 128],
        "encoder.pos_conv.0.weight_v": [1024, 64, 128],
        "encoder.pos_conv.0.bias": [1024],
        "encoder.layers.23.self_attn.out_proj.weight": [1024, 1024],
        "encoder.layers.0.fc1.weight": [4096, 1024],
        "encoder.layer_norm.bias": [1024],
    }
    assert published.items() <= shapes.items()
    norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    pattern = re.compile(
        rf"feature_extractor_video\.resnet\.(frontend3D\.(0\.weight|1\.{norm}|2\.weight)"
        rf"|trunk\.layer[1-4]\.[01]\.(conv[12]\.weight|bn[12]\.{norm}|relu[12]\.weight)"
        rf"|trunk\.layer[2-4]\.0\.downsample\.(0\.weight|1\.{norm}))"
        r"|(feature_extractor_video\.proj|layer_norm|post_extract_proj|encoder\.layer_norm)\.(weight|bias)"
        r"|encoder\.pos_conv\.0\.(weight_g|weight_v|bias)"
        r"|encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|self_attn_layer_norm|final_layer_norm|fc1|fc2)\.(weight|bias)"
    )
    assert [key for key in shapes if not pattern.fullmatch(key)] == []
    # Stem 1 + 5 + 1; 8 blocks of 14 and 3 shortcuts of 6; projections and norms 8; positions 3; layers of 16.
    assert len(shapes) == 7 + 8 * 14 + 3 * 6 + 8 + 3 + 24 * 16


@pytest.mark.parametrize("kernel", [8, 5])
def test_positional_convolution_equals_numpy(kernel: int) -> None:
    generator = torch.Generator().manual_seed(1)
    conv = PositionalConv(6, kernel, 3)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(1, 6, 11, generator=generator)
    v, g, bias = (p.detach().numpy().astype(np.float64) for p in (conv.weight_v, conv.weight_g, conv.bias))
    weight = v * g / np.sqrt((v**2).sum(axis=(0, 1), keepdims=True))
    padded = np.pad(x[0].numpy(), ((0, 0), (kernel // 2, kernel // 2)))
    expected = np.zeros((6, 11))
    for out in range(6):
        group = out // 2
        for frame in range(11):
            window = padded[2 * group : 2 * group + 2, frame : frame + kernel]
            expected[out, frame] = (weight[out] * window).sum() + bias[out]
    np.testing.assert_allclose(conv(x)[0].detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_stem_is_the_published_three_dimensional_convolution() -> None:
    encoder = LipEncoder(SMALL).eval()
    resnet = encoder.network.feature_extractor_video.resnet
    x, clip = lips(1, 7), everything(1, 7)
    conv, norm, activation, pool = resnet.frontend3D
    volume = nn.functional.conv3d(x, conv.weight, stride=(1, 2, 2), padding=(2, 3, 3))
    images = pool(activation(norm(volume[0].transpose(0, 1))))
    expected = resnet.trunk(images).mean(dim=(-2, -1))
    assert images.shape == (7, 4, 22, 22)
    assert resnet.trunk(images).shape == (7, 10, 3, 3)
    torch.testing.assert_close(resnet(x, clip)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_clip_is_the_same_alone_and_padded() -> None:
    encoder = LipEncoder(SMALL).eval()
    x = lips(2, 9)
    x[0, :, 5:] = 50.0
    alone = encoder(x[:1, :, :5], everything(1, 5))
    batch = encoder(x, length_mask(torch.tensor([5, 9]), 9))
    torch.testing.assert_close(batch[:1, :5], alone, rtol=1e-4, atol=1e-4)
    assert batch[0, 5:].abs().max() == 0


def test_padded_frames_do_not_enter_batch_statistics() -> None:
    def statistics(x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(0)
        encoder = LipEncoder(SMALL).train()
        encoder(x, mask)
        return {key: value for key, value in encoder.state_dict().items() if "running" in key}

    clip = lips(1, 5)
    padded = torch.cat([clip, torch.full((1, 1, 20, 88, 88), 9.0)], dim=2)
    alone = statistics(clip, everything(1, 5))
    batch = statistics(padded, length_mask(torch.tensor([5]), 25))
    assert len(alone) > 10
    for key, value in alone.items():
        torch.testing.assert_close(batch[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("include_input", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_layer_sum(include_input: bool, normalize: bool) -> None:
    config = SMALL.model_copy(update={"include_input": include_input, "normalize": normalize})
    encoder = LipEncoder(config).eval()
    assert encoder.logits is not None
    x, clip = lips(1, 4), everything(1, 4)
    states = [state.detach().numpy() for state in encoder.network.states(x, clip)]
    assert len(states) == 4
    if not include_input:
        states = states[1:]
    if normalize:
        states = [(s - s.mean(-1, keepdims=True)) / np.sqrt(s.var(-1, keepdims=True) + 1e-5) for s in states]
    np.testing.assert_allclose(encoder(x, clip).detach().numpy(), np.mean(states, axis=0), rtol=1e-4, atol=1e-5)
    logits = torch.arange(len(states), dtype=torch.float32)
    with torch.no_grad():
        encoder.logits.copy_(logits)
    shares = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum()
    expected = sum(share * state for share, state in zip(shares, states, strict=True))
    np.testing.assert_allclose(encoder(x, clip).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_without_the_sum_the_last_normed_state_alone() -> None:
    encoder = LipEncoder(SMALL, weighted_sum=False).eval()
    x, clip = lips(1, 4), everything(1, 4)
    *_, last = encoder.network.states(x, clip)
    torch.testing.assert_close(encoder(x, clip), last)
    torch.testing.assert_close(last.mean(-1), torch.zeros(1, 4), atol=1e-5, rtol=0)


def test_frozen_network_stays_fixed_while_layer_weights_learn() -> None:
    encoder = LipEncoder(SMALL.model_copy(update={"frozen": True})).train()
    before = {key: value.clone() for key, value in encoder.network.state_dict().items()}
    x, clip = lips(2, 4), everything(2, 4)
    first, second = encoder(x, clip), encoder(x, clip)
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # no dropout
    first.square().sum().backward()
    assert encoder.logits is not None
    assert encoder.logits.grad is not None
    assert encoder.logits.grad.abs().sum() > 0
    assert [name for name, p in encoder.named_parameters() if p.grad is not None] == ["logits"]
    for key, value in encoder.network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_trained_from_scratch_every_parameter_learns() -> None:
    encoder = LipEncoder(SMALL).train()
    encoder(lips(2, 4), everything(2, 4)).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
