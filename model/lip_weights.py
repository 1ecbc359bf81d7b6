"""Public AV-HuBERT weights: the video path of a checkpoint, under the names of `model.avhubert.AVHubert`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.config import LipEncoderConfig
from model.fairseq import HEAD, read_checkpoint
from shards.errors import UserError
from shards.storage import is_remote, local_path, open_uri

PUBLIC = "https://dl.fbaipublicfiles.com/avhubert/model/lrs3_vox/clean-pretrain/large_vox_iter5.pt"
"""AV-HuBERT Large, pretrained on LRS3 and VoxCeleb2 (English), not fine-tuned."""
DROPPED = ("feature_extractor_audio.", "mask_emb", "final_proj.", "label_embs_concat")
"""Public keys that the video path does not use begin so: audio branch and pretraining heads."""
FINE_TUNED = ("encoder.w2v_model.", "w2v_encoder.w2v_model.")
"""In front of the keys where the network was fine-tuned as the encoder of a transcriber, with a decoder or CTC."""
WEIGHT_NORM = {
    ".parametrizations.weight.original0": ".weight_g",
    ".parametrizations.weight.original1": ".weight_v",
}
"""Names of weight norm's two tensors since torch 2.0, and those of the public files."""
VIDEO = "feature_extractor_video."
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote: `parameters` are the trained numbers of the `tensors`, without BatchNorm's statistics."""

    output: str
    layers: int
    dim: int
    tensors: int
    parameters: int
    bytes: int
    sha256: str


def read_weights(path: Path) -> dict[str, Tensor]:
    """The video path's tensors of fairseq's original checkpoint, pretrained or fine-tuned, of a plain `torch.save`d
    dict of tensors, or of a safetensors file; float32, on the CPU. Nothing in the file is run.

    Raises:
        UserError: the file is missing, damaged or of another kind, has no video path, or holds a number that is not
            finite.
    """
    try:
        with open(path, "rb") as stream:
            head = stream.read(HEAD)
    except FileNotFoundError:
        raise UserError(
            f"AV-HuBERT weights {path}: no such file; accept AV-HuBERT's licence, fetch {PUBLIC} "
            f"and reduce it with `f2v weights convert large_vox_iter5.pt OUT{SUFFIX}`"
        ) from None
    except OSError as error:
        raise UserError(f"AV-HuBERT weights {path}: cannot be read ({error.strerror or error})") from None
    try:
        # A header's length in 8 bytes, then JSON.
        weights = _video_path(_read_safetensors(path) if head[8:9] == b"{" else read_checkpoint(path))
    except UserError as error:
        raise UserError(f"AV-HuBERT weights {error}") from None
    if not any(key.startswith(VIDEO) for key in weights):
        example = f", e.g. {min(weights)}" if weights else ""
        raise UserError(f"AV-HuBERT weights {path}: no video path (no {VIDEO}*{example}); a network for sound alone?")
    for key, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"AV-HuBERT weights {path}: {key} holds a number that is not finite; fetch the file again")
    return weights


def load_public(network: nn.Module, path: Path) -> None:
    """Load a file that `read_weights` reads into an `AVHubert`.

    Raises:
        UserError: as `read_weights`, or it is another network: keys missing, unknown or of another shape are listed.
    """
    weights = read_weights(path)
    _check(network, weights, path)
    network.load_state_dict(weights)


def convert(source: Path, target: str, half: bool = False) -> Converted:
    """Write the video path of a checkpoint as safetensors, whole or not at all; any dimensions, no part missing.

    Args:
        target: path or URI that ends in `.safetensors`; what lies there is replaced.
        half: matrices and kernels in float16. Vectors (norms, biases, BatchNorm's statistics) stay float32.

    Raises:
        UserError: as `load_public`; `target` is `source` or has another ending; a number is too large for float16.
    """
    from safetensors.torch import save

    from model.avhubert import AVHubert

    if not target.endswith(SUFFIX):
        raise UserError(f"{target}: name a file that ends in {SUFFIX}")
    there = not is_remote(target) and source.exists() and local_path(target).exists()
    if there and source.samefile(local_path(target)):
        raise UserError(f"{target}: is the file to convert; give the result another name")
    weights = read_weights(source)
    config = _config(weights, source)
    with torch.device("meta"):
        network = AVHubert(config)
    _check(network, weights, source)
    if half:
        weights = {key: value.half() if value.ndim > 1 else value for key, value in weights.items()}
        for key, value in weights.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise UserError(f"AV-HuBERT weights {source}: {key} is too large for float16; leave out --half")
    data = save(weights, metadata={"format": "pt"})
    store, name = open_uri(target)
    store.write(name, data)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    digest = hashlib.sha256(data).hexdigest()
    return Converted(target, config.layers, config.dim, len(weights), parameters, len(data), digest)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged, cut short or no safetensors file ({error})") from None
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def _video_path(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of a pretrained network, without the parts that lips do not need."""
    for prefix in FINE_TUNED:
        inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        tensors = inside or tensors
    kept = {}
    for key, value in tensors.items():
        if key.startswith(DROPPED):
            continue
        for new, old in WEIGHT_NORM.items():
            if key.endswith(new):
                key = key.removesuffix(new) + old
        kept[key] = value
    return kept


def _check(network: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    own = network.state_dict()
    faults = [f"missing {key}" for key in sorted(own.keys() - weights.keys())]
    faults += [f"unexpected {key}" for key in sorted(weights.keys() - own.keys())]
    faults += [
        f"{key} has shape {list(weights[key].shape)}, not {list(own[key].shape)}"
        for key in sorted(own.keys() & weights.keys())
        if weights[key].shape != own[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(f"AV-HuBERT weights {path}: not this network: {'; '.join(faults[:8])}{more}")


def _config(weights: dict[str, Tensor], path: Path) -> LipEncoderConfig:
    """The dimensions that the tensors state. Heads leave no trace in them: one stands for any number."""

    def side(key: str, axis: int = 0) -> int:
        value = weights.get(key)
        if value is None or value.ndim <= axis or value.shape[axis] == 0:
            raise UserError(f"AV-HuBERT weights {path}: not its network: {key} is missing or has another shape")
        return value.shape[axis]

    def many(prefix: str) -> int:
        numbers = {key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)}
        return max(len(numbers), 1)

    resnet, dim = f"{VIDEO}resnet", side("encoder.layer_norm.weight")
    one, two, three, four = (side(f"{resnet}.trunk.layer{level}.0.conv1.weight") for level in (1, 2, 3, 4))
    try:
        return LipEncoderConfig(
            stem=side(f"{resnet}.frontend3D.0.weight"),
            trunk=(one, two, three, four),
            trunk_blocks=many(f"{resnet}.trunk.layer1."),
            dim=dim,
            layers=many("encoder.layers."),
            heads=1,
            ffn=side("encoder.layers.0.fc1.weight"),
            pos_kernel=side("encoder.pos_conv.0.weight_v", 2),
            pos_groups=max(dim // side("encoder.pos_conv.0.weight_v", 1), 1),
        )
    except ValueError:  # groups that do not divide the width
        raise UserError(
            f"AV-HuBERT weights {path}: not its network: encoder.pos_conv.0.weight_v has another shape"
        ) from None
