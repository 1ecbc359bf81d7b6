"""ArcFace: against a forward pass in plain numpy, with files in the published format, and as the identity stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.networks import iresnet
from pipeline.networks.iresnet import ArcFace, IResNet
from pipeline.stage import Clip, Item
from pipeline.stages.identity import Identity, IdentityConfig
from shards.errors import UserError

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")
SMALL = (1, 2, 1, 1)


def published(depths: tuple[int, ...], seed: int = 0) -> Tensors:
    """Random tensors with the names and shapes of insightface's `backbone.pth`, written down from that format."""
    make = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = 0.5 + torch.rand(width, generator=make)
        tensors[f"{name}.bias"] = 0.2 * torch.randn(width, generator=make)
        tensors[f"{name}.running_mean"] = 0.2 * torch.randn(width, generator=make)
        tensors[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=make)
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def conv(name: str, outputs: int, inputs: int, size: int) -> None:
        scale = (size * size * inputs) ** -0.5
        tensors[f"{name}.weight"] = scale * torch.randn(outputs, inputs, size, size, generator=make)

    conv("conv1", 64, 3, 3)
    norm("bn1", 64)
    tensors["prelu.weight"] = torch.rand(64, generator=make)
    inputs = 64
    for stage, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512), strict=True), 1):
        for block in range(depth):
            name = f"layer{stage}.{block}"
            norm(f"{name}.bn1", inputs)
            conv(f"{name}.conv1", width, inputs, 3)
            norm(f"{name}.bn2", width)
            tensors[f"{name}.prelu.weight"] = torch.rand(width, generator=make)
            conv(f"{name}.conv2", width, width, 3)
            norm(f"{name}.bn3", width)
            if block == 0:
                conv(f"{name}.downsample.0", width, inputs, 1)
                norm(f"{name}.downsample.1", width)
            inputs = width
    norm("bn2", 512)
    tensors["fc.weight"] = 25088**-0.5 * torch.randn(512, 25088, generator=make)
    tensors["fc.bias"] = torch.randn(512, generator=make)
    norm("features", 512)
    tensors["features.weight"] = torch.ones(512)
    return tensors


def plain_forward(tensors: Tensors, x: np.ndarray) -> np.ndarray:
    """Embedding of pictures [n, 112, 112, 3] in [-1, 1] by the definition of each layer, float64."""
    value = {name: tensor.double().numpy() for name, tensor in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = value[f"{name}.weight"] / np.sqrt(value[f"{name}.running_var"] + 1e-5)
        return (x - value[f"{name}.running_mean"]) * scale + value[f"{name}.bias"]

    def conv(x: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
        weight = value[f"{name}.weight"]
        edge = weight.shape[2] // 2
        padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        patches = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], (1, 2))[:, ::stride, ::stride]
        return np.tensordot(patches, weight, ((3, 4, 5), (1, 2, 3)))

    def prelu(x: np.ndarray, name: str) -> np.ndarray:
        return np.where(x > 0, x, x * value[f"{name}.weight"])

    x = prelu(norm(conv(x, "conv1"), "bn1"), "prelu")
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in value:
            name = f"layer{stage}.{block}"
            stride = 1 if block else 2
            y = prelu(norm(conv(norm(x, f"{name}.bn1"), f"{name}.conv1"), f"{name}.bn2"), f"{name}.prelu")
            y = norm(conv(y, f"{name}.conv2", stride), f"{name}.bn3")
            if f"{name}.downsample.0.weight" in value:
                x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x, block = x + y, block + 1
    flat = norm(x, "bn2").transpose(0, 3, 1, 2).reshape(len(x), -1)
    return norm(flat @ value["fc.weight"].T + value["fc.bias"], "features")


def crops(count: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 14, 14, 3), np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, Callable[..., ArcFace]]:
    """Tensors of a network of few blocks, and `ArcFace` from their file under the depth 50."""
    tensors = published(SMALL)
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(tensors, path)

    def load(precision: str = "float32") -> ArcFace:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(iresnet.DEPTHS, 50, SMALL)
            return ArcFace(path, 50, CPU, precision)  # type: ignore[arg-type]

    return tensors, load


def test_embedding_agrees_with_plain_numpy(small: tuple[Tensors, Callable[..., ArcFace]]) -> None:
    tensors, load = small
    faces = crops(2)
    expected = plain_forward(tensors, (faces / 255 - 0.5) / 0.5)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = load().embed(faces)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert abs(expected[0] @ expected[1]) < 0.99  # two pictures, two embeddings
    cosine = (load("bfloat16").embed(faces) * expected).sum(axis=1)
    assert (cosine > 0.998).all()


def test_embedding_does_not_depend_on_the_batch(small: tuple[Tensors, Callable[..., ArcFace]]) -> None:
    for precision, count in (("float32", 17), ("bfloat16", 5)):  # 17 are more than go through the network at once
        network, faces = small[1](precision), crops(count)
        together = network.embed(faces)
        for part in (slice(0, 1), slice(2, 5)):
            np.testing.assert_allclose(network.embed(faces[part]), together[part], atol=1e-5)


@pytest.mark.parametrize(("layers", "depths", "millions"), [(50, (3, 4, 14, 3), 43.6), (100, (3, 13, 30, 3), 65.2)])
def test_names_and_sizes_are_the_published_ones(layers: int, depths: tuple[int, ...], millions: float) -> None:
    with torch.device("meta"):
        network = IResNet(iresnet.DEPTHS[layers])
        wanted = {name: tuple(tensor.shape) for name, tensor in published_shapes(depths).items()}
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == wanted
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == millions


def published_shapes(depths: tuple[int, ...]) -> Tensors:
    """`published` for its names and shapes alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape, **_: torch.empty(shape, device="meta"))
        patch.setattr(torch, "rand", lambda *shape, **_: torch.empty(shape, device="meta"))
        return published(depths)


def test_checkpoints_of_another_kind_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "backbone.pth"

    def refusal() -> str:
        with pytest.raises(UserError) as refused:
            ArcFace(path, 50, CPU, "float32")
        text = str(refused.value)
        assert str(path) in text
        assert "\n" not in text
        return text

    tensors = published((1, 1, 1, 1))
    tensors["fc.weight"] = torch.zeros(512, 100)
    torch.save(tensors, path)
    text = refusal()
    assert "missing" in text
    assert "layer1.1." in text  # too few blocks
    assert "fc.weight (512, 100)" in text
    torch.save({"state_dict": {**published_shapes((3, 4, 14, 3)), "extra": torch.zeros(1)}}, path)
    assert "extra" in refusal()
    path.write_bytes(path.read_bytes()[:-500])
    refusal()
    path.unlink()
    refusal()


def test_prefix_of_parallel_training_goes(small: tuple[Tensors, Callable[..., ArcFace]], tmp_path: Path) -> None:
    tensors, load = small
    path = tmp_path / "backbone.pth"
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(iresnet.DEPTHS, 50, SMALL)
        prefixed = ArcFace(path, 50, CPU, "float32")
    np.testing.assert_array_equal(prefixed.embed(crops(1)), load().embed(crops(1)))


def test_identity_stage_runs_the_full_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = iresnet.CHECKPOINTS[50]
    torch.save(published((3, 4, 14, 3)), tmp_path / checkpoint.file)
    config = IdentityConfig(network="iresnet50", every=3)
    with pytest.raises(UserError, match="sha256"):  # random, so not the published file
        Identity(config, tmp_path).weights()
    unpinned = iresnet.Checkpoint(what=checkpoint.what, file=checkpoint.file, url=checkpoint.url)
    monkeypatch.setitem(iresnet.CHECKPOINTS, 50, unpinned)
    stage = Identity(config, tmp_path)
    assert list(stage.weights()) == [tmp_path / checkpoint.file]
    stage.setup()
    faces = crops(6)
    values = stage.run(Item(Clip("k", "k.mp4", ""), {"face": faces}))["identity"].astype(float)
    assert values.shape == (6, 512)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-3)
    direct = ArcFace(tmp_path / checkpoint.file, 50, CPU, "float32").embed(faces[[0, 3, 5]])
    np.testing.assert_allclose(values[[0, 3, 5]], direct, atol=1e-3)
    between = 2 * direct[0] + direct[1]  # a third of the way from frame 0 to frame 3
    np.testing.assert_allclose(values[1], between / np.linalg.norm(between), atol=1e-3)


@pytest.mark.parametrize("faces", [np.zeros((2, 96, 96, 3), np.uint8), np.zeros((2, 112, 112, 3), np.float32)])
def test_other_crops_are_refused(small: tuple[Tensors, Callable[..., ArcFace]], faces: np.ndarray) -> None:
    with pytest.raises(ValueError, match="112"):
        small[1]().embed(faces)
