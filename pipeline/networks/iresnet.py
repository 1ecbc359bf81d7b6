"""ArcFace's face embedding (Deng et al. 2019): insightface's improved residual networks of 50 and 100 layers.

Module names are those of the published `backbone.pth` files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.networks.crops import apply_to_crops
from pipeline.networks.device import Precision, compute_type
from pipeline.networks.weights import Checkpoint, load_strict, load_tensors
from shards.schema import FACE_SIZE

DEPTHS = {50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
WIDTHS = (64, 128, 256, 512)
WIDTH = 512
"""Numbers of an embedding."""
_HOME = "https://huggingface.co/lithiumice/ArcFace_PyTorch/resolve/main"
CHECKPOINTS = {
    50: Checkpoint(
        what="ArcFace IResNet-50 (MS1MV3)",
        file="ms1mv3_arcface_r50_fp16.pth",
        url=f"{_HOME}/ms1mv3_arcface_r50_fp16.pth",
        sha256="ef005ba502a2d0f40e7b94245054d3a23e375776f7035080fcbce45ae49cfb01",
    ),
    100: Checkpoint(
        what="ArcFace IResNet-100 (Glint360K)",
        file="glint360k_cosface_r100_fp16_0.1.pth",
        url=f"{_HOME}/glink360k_cosface_r100_fp16_0.1.pth",  # the host's own spelling
        sha256="5f631718e783448b41631e15073bdc622eaeef56509bbad4e5085f23bd32db83",
    ),
}
"""Copies of insightface's model zoo, which itself lies on drives that only a browser can fetch from."""


class Block(nn.Module):
    """BN, conv 3x3, BN, PReLU, conv 3x3 with the stride, BN; plus the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """float [n, inputs, H, W] -> [n, outputs, H / stride, W / stride]."""
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(y)) + self.downsample(x)


class IResNet(nn.Module):
    """Stem, four stages of blocks (each halves the picture), and a linear layer over all that is left of it.

    Args:
        depths: blocks per stage.
    """

    def __init__(self, depths: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        inputs = WIDTHS[0]
        for number, (depth, outputs) in enumerate(zip(depths, WIDTHS, strict=True), 1):
            blocks = [Block(inputs, outputs, 2), *(Block(outputs, outputs, 1) for _ in range(depth - 1))]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            inputs = outputs
        self.bn2 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs * (FACE_SIZE // 16) ** 2, WIDTH)
        self.features = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """float [n, 3, 112, 112] in [-1, 1] -> float [n, 512], of any length.

        The convolutions compute in the type of the input, the head in its own weights' type.
        """
        x = self.prelu(self.bn1(self.conv1(x)))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        x = self.bn2(x.to(self.fc.weight.dtype))
        return self.features(self.fc(x.flatten(1)))


def fuse(network: IResNet) -> None:
    """Fold each normalisation that follows a convolution into it: the same function, fewer passes over memory.

    `bn1` of the blocks stays: it comes before a convolution whose zero padding must stay zero.
    """
    for module in network.modules():
        if isinstance(module, Block):
            _fold(module, "conv1", "bn2")
            _fold(module, "conv2", "bn3")
            if isinstance(module.downsample, nn.Sequential):
                module.downsample = fuse_conv_bn_eval(*module.downsample)
    _fold(network, "conv1", "bn1")


def _fold(owner: nn.Module, conv: str, norm: str) -> None:
    setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
    setattr(owner, norm, nn.Identity())


class ArcFace:
    """Embedding of aligned crops (insightface's template).

    Args:
        checkpoint: published file, plain tensors by name.
        layers: 50 or 100.
        precision: of the convolutions; the linear layer behind them is always float32.

    Raises:
        UserError: the file is damaged or holds another network.
    """

    def __init__(self, checkpoint: Path, layers: int, device: torch.device, precision: Precision) -> None:
        what = f"ArcFace IResNet-{layers}"
        tensors = load_tensors(checkpoint, what)
        network = IResNet(DEPTHS[layers]).eval().requires_grad_(False)
        load_strict(network, tensors, checkpoint, what)
        fuse(network)
        self._device, self._dtype = device, compute_type(precision)
        network.to(device, self._dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for head in (network.bn2, network.fc, network.features):
            head.float()
        self._network = network

    def embed(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings of RGB crops [n, 112, 112, 3]: float32 [n, 512], unit length."""
        return apply_to_crops(lambda x: F.normalize(self._network(x)), faces, self._device, self._dtype)
