"""RetinaFace (Deng et al. 2020) in plain torch, with ResNet-50 or MobileNetV1-0.25, for the public checkpoints.

Module names are the checkpoints' own: biubug6/Pytorch_Retinaface and ternaus/retinaface (`retinaface-pytorch`) share
them. There are three outputs per anchor and two anchors per cell of the maps at strides 8, 16 and 32: four box offsets,
two logits (background, face; softmax) and ten landmark offsets (x, y of left eye, right eye, nose, left and right mouth
corner, as seen in the image).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

ANCHORS = 2
"""Per cell."""


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution without bias that keeps the size, and its normalisation."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


def activation(channels: int) -> nn.Module:
    """Leaky with slope 0.1 in the necks of up to 64 channels, else plain."""
    return nn.LeakyReLU(0.1, inplace=True) if channels <= 64 else nn.ReLU(inplace=True)


class Bottleneck(nn.Module):
    """ResNet block with its stride on the 3x3 convolution (torchvision's placement, "v1.5")."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1)
        self.conv2, self.bn2 = conv(width, width, 3, stride)
        self.conv3, self.bn3 = conv(width, 4 * width, 1)
        self.downsample = None
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(*conv(inputs, 4 * width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet50(nn.Module):
    """Maps of the stages at strides 8, 16 and 32, with 512, 1024 and 2048 channels."""

    channels = (512, 1024, 2048)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 7, 2)
        inputs = 64
        for number, blocks in enumerate((3, 4, 6, 3)):
            width, stride = 64 << number, 1 if number == 0 else 2
            stage = [
                Bottleneck(4 * width if block else inputs, width, 1 if block else stride) for block in range(blocks)
            ]
            self.add_module(f"layer{number + 1}", nn.Sequential(*stage))
            inputs = 4 * width

    def forward(self, x: Tensor) -> list[Tensor]:
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = functional.max_pool2d(x, 3, 2, 1)
        maps = []
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
            maps.append(x)
        return maps[1:]


class MobileNet(nn.Module):
    """MobileNetV1 of a quarter of the width; maps at strides 8, 16 and 32, with 64, 128 and 256 channels."""

    channels = (64, 128, 256)

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(*conv(3, 8, 3, 2), nn.LeakyReLU(0.1, inplace=True))
        shapes = [(8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.stage1 = nn.Sequential(first, *[self._separable(*shape) for shape in shapes])
        self.stage2 = nn.Sequential(self._separable(64, 128, 2), *[self._separable(128, 128, 1) for _ in range(5)])
        self.stage3 = nn.Sequential(self._separable(128, 256, 2), self._separable(256, 256, 1))

    @staticmethod
    def _separable(inputs: int, outputs: int, stride: int) -> nn.Module:
        depth, point = conv(inputs, inputs, 3, stride, inputs), conv(inputs, outputs, 1)
        return nn.Sequential(*depth, nn.LeakyReLU(0.1, inplace=True), *point, nn.LeakyReLU(0.1, inplace=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.stage1(x)
        middle = self.stage2(fine)
        return [fine, middle, self.stage3(middle)]


class Pyramid(nn.Module):
    """Feature pyramid: every map gets the coarser one, enlarged by nearest neighbour, added and merged."""

    def __init__(self, channels: tuple[int, int, int], width: int) -> None:
        super().__init__()
        for number, inputs in enumerate(channels, 1):
            self.add_module(f"output{number}", nn.Sequential(*conv(inputs, width, 1), activation(width)))
        self.merge1 = nn.Sequential(*conv(width, width), activation(width))
        self.merge2 = nn.Sequential(*conv(width, width), activation(width))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        fine, middle, coarse = [self.get_submodule(f"output{number}")(x) for number, x in enumerate(maps, 1)]
        middle = self.merge2(middle + functional.interpolate(coarse, size=middle.shape[2:]))
        fine = self.merge1(fine + functional.interpolate(middle, size=fine.shape[2:]))
        return [fine, middle, coarse]


class Context(nn.Module):
    """SSH context module (Najibi et al. 2017): views of 3x3, 5x5 and 7x7 cells, built from 3x3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        quarter = width // 4
        self.conv3X3 = nn.Sequential(*conv(width, width // 2))
        self.conv5X5_1 = nn.Sequential(*conv(width, quarter), activation(width))
        self.conv5X5_2 = nn.Sequential(*conv(quarter, quarter))
        self.conv7X7_2 = nn.Sequential(*conv(quarter, quarter), activation(width))
        self.conv7x7_3 = nn.Sequential(*conv(quarter, quarter))

    def forward(self, x: Tensor) -> Tensor:
        shared = self.conv5X5_1(x)
        views = [self.conv3X3(x), self.conv5X5_2(shared), self.conv7x7_3(self.conv7X7_2(shared))]
        return functional.relu(torch.cat(views, dim=1), inplace=True)


class Head(nn.Module):
    """Values of every anchor: [B, C, h, w] to [B, h x w x 2, values], anchors of a cell side by side."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.values = values
        self.conv1x1 = nn.Conv2d(width, ANCHORS * values, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x).permute(0, 2, 3, 1).reshape(len(x), -1, self.values)


class Network(nn.Module):
    """RetinaFace.

    Args:
        body: backbone; the neck has 64 channels with MobileNet and 256 with ResNet-50.
    """

    def __init__(self, body: ResNet50 | MobileNet) -> None:
        super().__init__()
        width = min(256, body.channels[0])
        self.body = body
        self.fpn = Pyramid(body.channels, width)
        self.ssh1, self.ssh2, self.ssh3 = Context(width), Context(width), Context(width)
        self.ClassHead = nn.ModuleList(Head(width, 2) for _ in range(3))
        self.BboxHead = nn.ModuleList(Head(width, 4) for _ in range(3))
        self.LandmarkHead = nn.ModuleList(Head(width, 10) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Box offsets [B, n, 4], logits [B, n, 2] and landmark offsets [B, n, 10] of normalised images [B, 3, H, W]."""
        maps = self.fpn(self.body(x))
        maps = [context(level) for context, level in zip((self.ssh1, self.ssh2, self.ssh3), maps, strict=True)]
        boxes, classes, points = (
            torch.cat([head(level) for head, level in zip(heads, maps, strict=True)], dim=1)
            for heads in (self.BboxHead, self.ClassHead, self.LandmarkHead)
        )
        return boxes, classes, points
