"""The expression Swin-T: against the one of transformers, with files in the published format, and as a stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.networks.swin import CHECKPOINT, CLASSES, ExpressionNetwork, SwinExpression
from pipeline.stage import Clip, Item
from pipeline.stages.expression import Expression, ExpressionConfig
from shards.errors import UserError
from tests.test_iresnet import crops

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def published() -> Tensors:
    """Random tensors with the names and shapes of `state_dict_model`, written down from that format."""
    make = torch.Generator().manual_seed(3)
    tensors: Tensors = {}

    def random(name: str, *shape: int, scale: float = 0.06, mean: float = 0.0) -> None:
        tensors[name] = mean + scale * torch.randn(shape, generator=make)

    def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> None:
        random(f"{name}.weight", outputs, inputs)
        if bias:
            random(f"{name}.bias", outputs)

    def norm(name: str, width: int) -> None:
        random(f"{name}.weight", width, scale=0.2, mean=1)
        random(f"{name}.bias", width, scale=0.2)

    random("encoder.patch_embed.proj.weight", 96, 3, 2, 2, scale=0.3)
    random("encoder.patch_embed.proj.bias", 96)
    norm("encoder.patch_embed.norm", 96)
    for level, (depth, heads, side) in enumerate(zip((2, 2, 6, 2), (3, 6, 12, 24), (56, 28, 14, 7), strict=True)):
        width = 96 * 2**level
        for block in range(depth):
            name = f"encoder.layers.{level}.blocks.{block}"
            norm(f"{name}.norm1", width)
            random(f"{name}.attn.relative_position_bias_table", 169, heads, scale=1)
            tensors[f"{name}.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
            linear(f"{name}.attn.qkv", 3 * width, width)
            linear(f"{name}.attn.proj", width, width)
            norm(f"{name}.norm2", width)
            linear(f"{name}.mlp.fc1", 4 * width, width)
            linear(f"{name}.mlp.fc2", width, 4 * width)
            if block % 2 and side > 7:
                tensors[f"{name}.attn_mask"] = torch.zeros((side // 7) ** 2, 49, 49)
        if level < 3:
            norm(f"encoder.layers.{level}.downsample.norm", 4 * width)
            linear(f"encoder.layers.{level}.downsample.reduction", 2 * width, 4 * width, bias=False)
    norm("encoder.norm", 768)
    # The head for face recognition that the encoder was first trained with.
    linear("encoder.feature.0", 768, 768, bias=False)
    linear("encoder.feature.2", 512, 768, bias=False)
    for name, width in (("encoder.feature.1", 768), ("encoder.feature.3", 512)):
        norm(name, width)
        random(f"{name}.running_mean", width)
        random(f"{name}.running_var", width, mean=1)
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(1)
    norm("norm", 768)
    linear("head", 7, 768)
    return tensors


def save(tensors: Tensors, path: Path) -> None:
    """A file as the training script writes it."""
    torch.save({"epoch": 3, "global_step": 59999, "local_step": 2, "state_dict_model": tensors}, path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / CHECKPOINT.file
    save(published(), path)
    return path


def reference(tensors: Tensors) -> torch.nn.Module:
    """transformers' Swin with the same weights."""
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=112, patch_size=2, window_size=7, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24]
    )
    model = SwinModel(config).eval()
    state = {}
    for name, tensor in tensors.items():
        buffer = name.endswith(("attn_mask", "relative_position_index"))
        if buffer or name.startswith(("encoder.norm.", "encoder.feature.", "head.")):
            continue
        theirs = name.replace("encoder.patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        theirs = theirs.replace("encoder.patch_embed.norm.", "embeddings.norm.")
        theirs = f"layer{theirs}" if theirs.startswith("norm.") else theirs
        theirs = theirs.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        theirs = theirs.replace(".attn.proj.", ".attention.o_proj.")
        theirs = theirs.replace(".attn.relative", ".attention.relative_position_bias.relative")
        if ".attn.qkv." in theirs:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[theirs.replace(".attn.qkv.", f".attention.{part}_proj.")] = piece
        else:
            state[theirs] = tensor
    model.load_state_dict(state, strict=True)
    return model


def test_features_agree_with_transformers(checkpoint: Path) -> None:
    tensors, faces = published(), crops(2)
    pictures = torch.from_numpy((faces / 255 - 0.5) / 0.5).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = reference(tensors)(pictures).pooler_output
        scores = expected @ tensors["head.weight"].T + tensors["head.bias"]
    network = ExpressionNetwork(checkpoint, CPU, "float32")
    features = network.features(faces)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=1e-4)
    assert (features[0] - features[1]).std() > 0.01  # the agreement is not one of constants
    np.testing.assert_allclose(network.expressions(features), scores.softmax(1), atol=1e-4)
    assert CLASSES[3] == "happiness"
    np.testing.assert_allclose(network.features(faces[1:]), features[1:], atol=1e-4)
    short = ExpressionNetwork(checkpoint, CPU, "bfloat16").features(faces)
    cosine = (short * features).sum(axis=1) / np.linalg.norm(short, axis=1) / np.linalg.norm(features, axis=1)
    assert (cosine > 0.999).all()


def test_size_is_the_published_one() -> None:
    assert round(sum(parameter.numel() for parameter in SwinExpression().parameters()) / 1e6, 1) == 27.5


def test_checkpoints_of_another_kind_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT.file

    def refusal() -> str:
        with pytest.raises(UserError) as refused:
            ExpressionNetwork(path, CPU, "float32")
        assert str(path) in str(refused.value)
        return str(refused.value)

    tensors = published()
    save({name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}, path)
    assert "head.weight" in refusal()
    save({**tensors, "encoder.layers.2.blocks.6.norm1.weight": torch.ones(384)}, path)
    assert "encoder.layers.2.blocks.6.norm1.weight" in refusal()
    # The backbone for face recognition from which training starts.
    start = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    torch.save({"state_dict_backbone": start}, path)
    refusal()
    save(tensors, path)
    path.write_bytes(path.read_bytes()[:1000])
    refusal()


def test_expression_stage_reads_every_frame(checkpoint: Path) -> None:
    stage = Expression(ExpressionConfig(network="swin"), checkpoint.parent)
    assert list(stage.weights()) == [checkpoint]
    stage.setup()
    faces = crops(3)
    item = Item(Clip("k", "k.mp4", ""), {"face": faces, "landmarks": np.zeros((3, 68, 2), np.float32)})
    values = stage.run(item)["expression"]
    assert values.shape == (3, 768)
    assert values.dtype == np.float16
    np.testing.assert_allclose(values, ExpressionNetwork(checkpoint, CPU, "float32").features(faces), atol=5e-3)


def test_missing_checkpoint_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.networks.weights.user_cache", lambda: tmp_path / "cache")
    with pytest.raises(UserError, match="Mine-Extra-Knowledge"):
        Expression(ExpressionConfig(network="swin"), tmp_path).weights()
