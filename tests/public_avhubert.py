"""Random tensors under the names of a public AV-HuBERT checkpoint, written down from its list of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import LipEncoderConfig


def public_weights(config: LipEncoderConfig, seed: int = 0) -> dict[str, Tensor]:
    """The `model` entry of a pretrained checkpoint of these dimensions: video path, audio branch and heads."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}

    def normal(key: str, *shape: int, scale: float = 0.1, mean: float = 0.0) -> None:
        found[key] = mean + scale * torch.randn(shape, generator=generator)

    def linear(key: str, outputs: int, inputs: int) -> None:
        normal(f"{key}.weight", outputs, inputs, scale=inputs**-0.5)
        normal(f"{key}.bias", outputs)

    def norm(key: str, width: int) -> None:
        normal(f"{key}.weight", width, mean=1.0)
        normal(f"{key}.bias", width)

    def batch_norm(key: str, width: int) -> None:
        norm(key, width)
        normal(f"{key}.running_mean", width, scale=0.3)
        found[f"{key}.running_var"] = 0.5 + torch.rand(width, generator=generator)
        found[f"{key}.num_batches_tracked"] = torch.tensor(1234)

    def kernel(key: str, *shape: int) -> None:
        normal(f"{key}.weight", *shape, scale=(2 / (shape[0] * shape[-1] * shape[-2])) ** 0.5)

    dim, resnet = config.dim, "feature_extractor_video.resnet"
    linear("feature_extractor_audio.proj", dim, 104)
    kernel(f"{resnet}.frontend3D.0", config.stem, 1, 5, 7, 7)
    batch_norm(f"{resnet}.frontend3D.1", config.stem)
    normal(f"{resnet}.frontend3D.2.weight", config.stem, mean=0.25)
    width = config.stem
    for level, channels in enumerate(config.trunk, 1):
        for block in range(2):
            at = f"{resnet}.trunk.layer{level}.{block}"
            for half, inputs in ((1, width), (2, channels)):
                kernel(f"{at}.conv{half}", channels, inputs, 3, 3)
                batch_norm(f"{at}.bn{half}", channels)
                normal(f"{at}.relu{half}.weight", channels, mean=0.25)
            if level > 1 and block == 0:
                kernel(f"{at}.downsample.0", channels, width, 1, 1)
                batch_norm(f"{at}.downsample.1", channels)
            width = channels
    linear("feature_extractor_video.proj", dim, config.trunk[-1])
    norm("layer_norm", 2 * dim)
    linear("post_extract_proj", dim, 2 * dim)
    normal("mask_emb", 104)
    normal("encoder.pos_conv.0.weight_g", 1, 1, config.pos_kernel, mean=1.0)
    normal("encoder.pos_conv.0.weight_v", dim, dim // config.pos_groups, config.pos_kernel)
    normal("encoder.pos_conv.0.bias", dim)
    for layer in range(config.layers):
        at = f"encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{at}.self_attn.{name}", dim, dim)
        norm(f"{at}.self_attn_layer_norm", dim)
        norm(f"{at}.final_layer_norm", dim)
        linear(f"{at}.fc1", config.ffn, dim)
        linear(f"{at}.fc2", dim, config.ffn)
    norm("encoder.layer_norm", dim)
    linear("final_proj", 256, dim)
    normal("label_embs_concat", 2004, 256)
    return found
