"""The Face Alignment Network in plain torch: 68 landmarks from stacked hourglasses (Bulat and Tzimiropoulos 2017).

Two public releases share layers and names: `fan4` of 1adrianb/face-alignment (four stacks, average pooling) and `fan2`
of ibug's face_alignment (two stacks, maximum pooling), which auto_avsr's preparation runs. Each brings its own crop and
its own way to read heat maps, see `pipeline.networks.heatmaps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.networks.device import Precision, compute_type
from pipeline.networks.heatmaps import (
    SIZE,
    center_boxes,
    cut,
    decode_centroids,
    decode_peaks,
    flip_maps,
    raised_boxes,
)
from pipeline.networks.weights import Checkpoint, find_checkpoint, load_strict, load_tensors

Release = Literal["fan4", "fan2"]
STACKS: dict[Release, int] = {"fan4": 4, "fan2": 2}
WIDTH, POINTS, DEPTH = 256, 68, 4
"""Channels of the hourglasses, heat maps, and halvings inside an hourglass."""
_HOME = "https://www.adrianbulat.com/downloads/python-fan/"
CHECKPOINTS: dict[Release, tuple[Checkpoint, ...]] = {
    "fan4": (
        Checkpoint(
            "FAN-4 landmarks",
            "2DFAN4-11f355bf06.pth.tar",
            _HOME + "2DFAN4-11f355bf06.pth.tar",
            "11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa",
        ),
        Checkpoint(
            "FAN-4 landmarks",
            "2DFAN4-cd938726ad.zip",
            _HOME + "2DFAN4-cd938726ad.zip",
            "cd938726adb1f15f361263cce2db9cb820c42585fa8796ec72ce19107f369a46",
        ),
    ),
    "fan2": (
        Checkpoint(
            "FAN-2 landmarks",
            "2dfan2.pth",
            "https://github.com/hhj1897/face_alignment/raw/9cf5494e443f26d567972f3f50f6212d65b76c01/"
            "ibug/face_alignment/fan/weights/2dfan2.pth",
        ),
    ),
}
"""Published files of each release: the one that is fetched, then others that serve as well where they are at hand."""


def find_fan(release: Release, folder: Path | None) -> Path:
    """The checkpoint of a release: any of its published files in `folder`, else the first one from cache or network.

    Raises:
        UserError: see `find_checkpoint`.
    """
    known = CHECKPOINTS[release]
    there = [checkpoint for checkpoint in known if folder and (folder / checkpoint.file).is_file()]
    return find_checkpoint((there or known)[0], folder)


class Block(nn.Module):
    """Three 3x3 convolutions, each after norm and ReLU, whose outputs side by side are added to the input."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(into)
        self.conv1 = nn.Conv2d(into, out // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out // 2)
        self.conv2 = nn.Conv2d(out // 2, out // 4, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out // 4)
        self.conv3 = nn.Conv2d(out // 4, out // 4, 3, padding=1, bias=False)
        self.downsample = (
            nn.Sequential(nn.BatchNorm2d(into), nn.ReLU(), nn.Conv2d(into, out, 1, bias=False))
            if into != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """float [B, into, H, W] -> [B, out, H, W]."""
        first = self.conv1(F.relu_(self.bn1(x)))
        second = self.conv2(F.relu_(self.bn2(first)))
        third = self.conv3(F.relu_(self.bn3(second)))
        return torch.cat((first, second, third), 1).add_(self.downsample(x))


class Hourglass(nn.ModuleDict):
    """Halves the picture four times and comes back up, adding a side branch at each size."""

    def __init__(self, average: bool) -> None:
        names = ["b2_plus_1"] + [f"{branch}_{level}" for level in range(1, DEPTH + 1) for branch in ("b1", "b2", "b3")]
        super().__init__({name: Block(WIDTH, WIDTH) for name in names})
        self.average = average

    def forward(self, x: Tensor, level: int = DEPTH) -> Tensor:
        """float [B, 256, H, W] -> the same shape."""
        below = self[f"b2_{level}"](halve(x, self.average))
        below = self(below, level - 1) if level > 1 else self["b2_plus_1"](below)
        below = self[f"b3_{level}"](below)
        return self[f"b1_{level}"](x) + F.interpolate(below, scale_factor=2, mode="nearest")


class FanNetwork(nn.ModuleDict):
    """The network, under the published names of its parts: stem, then per stack `i` an hourglass `m<i>`, its head, and
    `bl<i>`, `al<i>` that carry features and heat maps on to the next stack.

    Args:
        stacks: hourglasses.
        average: whether pooling averages (`fan4`) or takes the maximum (`fan2`).
    """

    def __init__(self, stacks: int, average: bool = True) -> None:
        parts: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(3, 64, 7, stride=2, padding=3),
            "bn1": nn.BatchNorm2d(64),
            "conv2": Block(64, 128),
            "conv3": Block(128, 128),
            "conv4": Block(128, WIDTH),
        }
        for i in range(stacks):
            parts[f"m{i}"] = Hourglass(average)
            parts[f"top_m_{i}"] = Block(WIDTH, WIDTH)
            parts[f"conv_last{i}"] = nn.Conv2d(WIDTH, WIDTH, 1)
            parts[f"bn_end{i}"] = nn.BatchNorm2d(WIDTH)
            parts[f"l{i}"] = nn.Conv2d(WIDTH, POINTS, 1)
            if i < stacks - 1:
                parts[f"bl{i}"] = nn.Conv2d(WIDTH, WIDTH, 1)
                parts[f"al{i}"] = nn.Conv2d(POINTS, WIDTH, 1)
        super().__init__(parts)
        self.stacks, self.average = stacks, average

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Heat maps of the last stack.

        Args:
            x: RGB in [0, 1], float [B, 3, 256, 256].
            last: stop after this many stacks; None runs all.

        Returns:
            float32 [B, 68, 64, 64].
        """
        x = self["conv2"](F.relu_(self["bn1"](self["conv1"](x))))
        x = self["conv4"](self["conv3"](halve(x, self.average)))
        last = last or self.stacks
        for i in range(last):
            features = self[f"top_m_{i}"](self[f"m{i}"](x))
            features = F.relu_(self[f"bn_end{i}"](self[f"conv_last{i}"](features)))
            if i < last - 1:
                x = x + self[f"bl{i}"](features) + self[f"al{i}"](self[f"l{i}"](features))
        # Peaks are found by comparing neighbours, which bfloat16's eight bits of mantissa would make equal.
        head = self[f"l{last - 1}"]
        assert isinstance(head, nn.Conv2d)
        assert head.bias is not None
        maps = F.linear(features.permute(0, 2, 3, 1).float(), head.weight[:, :, 0, 0].float(), head.bias.float())
        return maps.permute(0, 3, 1, 2)


def halve(x: Tensor, average: bool) -> Tensor:
    """Half the picture's sides by the mean or the maximum of 2x2."""
    return F.avg_pool2d(x, 2) if average else F.max_pool2d(x, 2)


class Fan:
    """68 points from frames and face boxes.

    Args:
        checkpoint: file in a published format (see `CHECKPOINTS`).
        release: which network the file holds.
        stacks: hourglasses that run; None all. Fewer save their share of the work and change the points.
        flip: add the heat maps of the mirrored crop, face-alignment's default for `fan4`; ibug's `fan2` knows no such
            thing.
        precision: of convolutions; norms' statistics, heat maps and what follows stay float32.

    Attributes:
        batch: crops per call of the network, and frames that are best handed over at once.

    Raises:
        UserError: the file is damaged or holds another network.
    """

    def __init__(
        self,
        checkpoint: Path,
        release: Release,
        stacks: int | None = None,
        flip: bool = True,
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        network = FanNetwork(STACKS[release], average=release == "fan4")
        what = CHECKPOINTS[release][0].what
        load_strict(network, load_tensors(checkpoint, what), checkpoint, what)
        network.eval().requires_grad_(False)
        self.release, self.stacks, self.flip = release, stacks, flip and release == "fan4"
        self.device, self.dtype = torch.device(device), compute_type(precision)
        self.network = prepare(network, self.device, self.dtype)
        # A processor gains nothing from more crops at once, and one at a time makes each one's result its own to the
        # last bit; a GPU wants enough work per launch.
        self.batch = 1 if self.device.type == "cpu" else 32

    @torch.inference_mode()
    def points(self, frames: Sequence[np.ndarray], boxes: np.ndarray) -> np.ndarray:
        """Points of one face per frame, float32 [n, 68, 2] in pixels of the frame.

        A frame's points do not depend on the other frames, except that on a GPU a batch's size may choose another
        order of summation: then a point may move by a cell's quarter where heat-map cells are nearly equal.

        Args:
            frames: RGB uint8 [H, W, 3] each.
            boxes: float32 [n, 4], x0, y0, x1, y1 in pixels.
        """
        if not len(frames):
            return np.zeros((0, POINTS, 2), np.float32)
        boxes = np.asarray(boxes, np.float32)
        corners = raised_boxes(boxes) if self.release == "fan4" else center_boxes(boxes)
        crops = torch.from_numpy(np.stack([cut(frame, box) for frame, box in zip(frames, corners, strict=True)]))
        found = []
        for start in range(0, len(crops), self.batch):
            maps = self.heatmaps(crops[start : start + self.batch])
            part = slice(start, start + self.batch)
            if self.release == "fan4":
                found.append(decode_peaks(maps, boxes[part]))
            else:
                found.append(decode_centroids(maps, corners[part]))
        return np.concatenate(found)

    @torch.inference_mode()
    def heatmaps(self, crops: Tensor) -> Tensor:
        """Heat maps float32 [n, 68, 64, 64] of RGB crops uint8 [n, 256, 256, 3]; the mirrored ones added if `flip`."""
        if crops.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"crops of shape {tuple(crops.shape)}, expected (n, {SIZE}, {SIZE}, 3)")
        # Channels lie last in the crops already: the permuted view is torch's channels_last.
        x = (crops.to(self.device).permute(0, 3, 1, 2).float() / 255).to(self.dtype)
        if not self.flip:
            return self.network(x, self.stacks)
        maps, mirrored = self.network(torch.cat([x, x.flip(3)]), self.stacks).chunk(2)
        return maps + flip_maps(mirrored)


def prepare(network: FanNetwork, device: torch.device, dtype: torch.dtype) -> FanNetwork:
    """Move a network to its device, channels last, convolutions in `dtype`; norms stay float32."""
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    return network
