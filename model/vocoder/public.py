"""Public HiFi-GAN checkpoints for a hop of 320, in the forms in which they are passed on."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from model.fairseq import read_checkpoint
from model.vocoder.config import GeneratorConfig
from model.vocoder.hifigan import ENDS, Generator
from shards.config import load_config
from shards.errors import UserError
from shards.schema import HOP, MEL_BINS

PLACES = (("generator", "model"), ("generator",), ("state_dict",), ("model",), ())
"""Where the tensors lie: AdaptVC's vocoder, HiFi-GAN, Lightning, others, a plain state dict."""
PREFIXES = ("", "module.", "generator.", "generator.module.", "module.generator.", "generator.model.", "model.")
"""What may stand in front of the generator's names, as DistributedDataParallel and Lightning put it there."""
LAYOUTS = {(20, 16, 4, 4): (10, 8, 2, 2), (11, 8, 8, 4, 4): (5, 4, 4, 2, 2)}
"""Up-sampling factors by kernels, which alone the tensors tell: AdaptVC's and speech-resynthesis' at a hop of 320."""
DILATIONS = (1, 3, 5)
"""Of all public generators with residual block 1; the tensors do not tell them."""
WEIGHT_NORM = {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}
"""Names of weight norm's two tensors in public files, and those since torch 2.0."""


def read_public(path: Path) -> Generator:
    """The generator in a public checkpoint, which reads raw log-mels. Nothing in the file is run.

    Accepted: AdaptVC's vocoder ({"generator": {"model": ...}}), HiFi-GAN's files ({"generator": ...}), Lightning's
    ({"state_dict": ...}) and plain state dicts; with `module.` in front of the names or not; weight norm in either of
    torch's forms, or folded into plain weights.

    Raises:
        UserError: the file cannot be read, or is not a HiFi-GAN generator for 80 mel bins and a hop of 320.
    """
    tensors = _generator(read_checkpoint(path, PLACES), path)
    network = Generator(_config(tensors, path))
    if not any(key.endswith(".original0") for key in tensors):
        network.fold()
    missing, odd = _fits(network, tensors)
    if missing or odd:
        faults = [f"missing {key}" for key in missing] + [f"unfit {key}" for key in odd]
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise UserError(f"{path}: not HiFi-GAN's generator: {'; '.join(faults[:4])}{more}")
    network.load_state_dict(tensors, strict=False)
    return network


def _generator(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The generator's tensors under their names in `Generator`."""
    prefixes = [prefix for prefix in PREFIXES if any(key.startswith(f"{prefix}conv_pre.") for key in tensors)]
    if not prefixes:
        found = sorted({key.rpartition(".")[0] or key for key in tensors})
        raise UserError(
            f"{path}: not a HiFi-GAN generator (no conv_pre, also not behind {', '.join(filter(None, PREFIXES))}); "
            f"it holds {', '.join(found[:4])}{' ...' if len(found) > 4 else ''}"
        )
    own = {key.removeprefix(prefixes[0]): value for key, value in tensors.items() if key.startswith(prefixes[0])}
    return {_renamed(key): value for key, value in own.items()}


def _renamed(key: str) -> str:
    for old, new in WEIGHT_NORM.items():
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _config(tensors: dict[str, Tensor], path: Path) -> GeneratorConfig:
    """The layout that the shapes state."""

    def shape(layer: str) -> tuple[int, ...]:
        for name in (f"{layer}.parametrizations.weight.original1", f"{layer}.weight"):
            if name in tensors and tensors[name].dim() == 3:
                return tuple(tensors[name].shape)
        raise UserError(f"{path}: not HiFi-GAN's generator: no {layer}.weight, .weight_g or .original0")

    def count(pattern: str) -> int:
        return len({found[0] for found in (re.match(pattern, key) for key in tensors) if found})

    first = shape("conv_pre")
    if first[1:] != (MEL_BINS, ENDS):
        raise UserError(
            f"{path}: its first layer reads {first[1]} channels with a kernel of {first[-1]}, "
            f"here a mel has {MEL_BINS} and the kernel is {ENDS}"
        )
    layers, blocks = count(r"ups\.\d+\."), count(r"resblocks\.\d+\.")
    kernels = tuple(shape(f"ups.{number}")[-1] for number in range(layers))
    if kernels not in LAYOUTS:
        known = " or ".join(", ".join(map(str, known)) for known in LAYOUTS)
        raise UserError(
            f"{path}: no generator for a hop of {HOP} that is known here: its up-sampling kernels are "
            f"{', '.join(map(str, kernels))}, not {known}"
        )
    sizes = [shape(f"resblocks.{number}.convs1.0")[-1] for number in range(blocks // layers)]
    base = {
        "factors": LAYOUTS[kernels],
        "kernels": kernels,
        "channels": first[0],
        "block_kernels": sizes,
        "block_dilations": [DILATIONS] * len(sizes),
    }
    try:
        return load_config(GeneratorConfig, base=base)
    except UserError as error:
        raise UserError(f"{path}: not HiFi-GAN's generator ({error})") from None


def _fits(network: Generator, tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names that are missing, and those that are not the network's or of another shape."""
    wanted = {key: value.shape for key, value in network.state_dict().items()}
    missing = [key for key in wanted if key not in tensors and key not in ("mel_mean", "mel_std")]
    return missing, [key for key, value in tensors.items() if wanted.get(key) != value.shape]
