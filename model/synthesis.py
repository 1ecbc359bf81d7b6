"""Visual features in, speech out: a checkpoint and a vocoder, for clips of any length."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.system import System
from model.systems import build_network
from model.vocoder.load import HiFiGAN, load_vocoder
from model.windows import OVERLAP, WINDOW, Blend, ramp, starts
from shards.augment import augmented, centred
from shards.config import load_config
from shards.errors import UserError
from shards.schema import LIP_SIZE, MEL_PER_FRAME

METHOD = 2
"""Raised where the same checkpoint and settings give other speech than before, so that old speech is made anew."""
BLENDED = {"mu": 2, "logits": 1, "pitch": 1, "energy": 1}
"""What `predict` gives per acoustic frame -> the axis that these frames are along."""


@dataclass(frozen=True)
class Sampling:
    """How the flow is integrated.

    Attributes:
        steps: Euler steps.
        guidance: scale beta of classifier-free guidance.
        temperature: scale of the noise that the flow begins with.
        seed: of Griffin-Lim's first phases and, with the clip (see `noise_seed`), of that noise.

    Raises:
        UserError: a value out of range.
    """

    steps: int = 10
    guidance: float = 0.7
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not (0 <= self.guidance < math.inf and 0 <= self.temperature < math.inf):
            raise UserError("--steps must be 1 or more, --guidance and --temperature 0 or more")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"--seed {self.seed}: must be 0 or more, and below 2^63")


def noise_seed(seed: int, lips: NDArray[np.uint8]) -> int:
    """Of a clip's noise: from `seed` and the clip's pixels, so that clips of a set have noises of their own, whose
    chance an interval over clips then covers, and a clip has the same one in any set and order.

    Args:
        lips: uint8 [F, 96, 96].
    """
    digest = hashlib.sha256(f"{seed} ".encode() + np.ascontiguousarray(lips).tobytes()).digest()
    return int.from_bytes(digest[:7], "little")


@dataclass(frozen=True)
class Spoken:
    """Speech of one clip of F frames, with T = 2F.

    Attributes:
        wave: float32 [640F] at 16 kHz, within -1..1.
        mel: float32 [T, 80], ln amplitude.
        units: int64 [T]; None where the system predicts none, as for the following.
        pitch: float32 [T], standardised over the clip.
        energy: float32 [T], ln amplitude.
        timbre: float32 [D].
    """

    wave: NDArray[np.float32]
    mel: NDArray[np.float32]
    units: NDArray[np.int64] | None = None
    pitch: NDArray[np.float32] | None = None
    energy: NDArray[np.float32] | None = None
    timbre: NDArray[np.float32] | None = None


class Synthesizer:
    """A trained system and a vocoder, loaded once.

    Clips longer than `model.windows.WINDOW` are read in overlapping windows, whose predictions are blended; timbre is
    one vector for the whole clip, and the flow has one trajectory. A clip's speech depends on itself, the sampling and
    the machine alone: not on clips beside it or on their order.

    Attributes:
        state: what the checkpoint says of the run and its dataset; its tensors are given up.

    Args:
        checkpoint: file, or folder of a training run.
        vocoder: see `model.vocoder.load.load_vocoder`; None is Griffin-Lim.
        lip_weights: see `load_network`.
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or one of several, `cuda:1`.
        threads: of torch on the CPU; another number may round sums otherwise.

    Raises:
        UserError: a checkpoint or vocoder that cannot be used, or no such device.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        vocoder: str | Path | None = None,
        lip_weights: Path | None = None,
        device: str = "auto",
        sampling: Sampling = Sampling(),
        threads: int = 1,
    ) -> None:
        self.sampling, self.threads = sampling, threads
        self.device = pick_device(device)
        self.state = checkpoints.load(checkpoint)
        self.network = load_network(self.state, lip_weights).to(self.device)
        self.state.release()
        stages = self.state.dataset["stages"]
        filterbank = stages["mel"]["settings"]["filterbank"]
        self.vocoder = load_vocoder(vocoder, filterbank, self.device, stages.get("speech", {}))

    def facts(self) -> dict[str, Any]:
        """What made the speech, as JSON values."""
        return {
            "system": self.network.config.system,
            "step": self.state.step,
            "vocoder": self.vocoder.name,
            "method": METHOD,
            **asdict(self.sampling),
        }

    @cached_property
    def digests(self) -> dict[str, str]:
        """sha256 over every parameter and buffer of the network, its lip encoder included, and of the vocoder."""
        networks: dict[str, nn.Module] = {"network": self.network}
        if isinstance(self.vocoder, HiFiGAN):
            networks["vocoder"] = self.vocoder.network
        return {f"{name}_sha256": _digest(network) for name, network in networks.items()}

    def speak(self, clips: Sequence[Mapping[str, NDArray[Any]]]) -> list[Spoken]:
        """Speech for silent clips.

        Args:
            clips: each with lips uint8 [F, 96, 96], identity and expression [F, D], and, for systems that are told a
                voice, timbre [D].

        Raises:
            UserError: features of another width than the network's, or of different lengths; a vocoder that reads
                more than the system predicts.
        """
        with torch_threads(self.threads):
            # One by one: in a batch, sums are rounded in an order that depends on the other clips.
            return [self._speak(clip) for clip in clips]

    @torch.inference_mode()
    def _speak(self, clip: Mapping[str, NDArray[Any]]) -> Spoken:
        check_features(clip, self.network.config)
        prediction = self._predict(clip)
        how = self.sampling
        mask = torch.ones(1, prediction["mu"].shape[2], dtype=torch.bool, device=self.device)
        # Drawn on the CPU, so that every device begins with the same noise.
        noise = torch.Generator().manual_seed(noise_seed(how.seed, clip["lips"]))
        mel = self.network.render(prediction, mask, noise, how.steps, how.guidance, how.temperature)
        found: dict[str, NDArray[Any]] = {"mel": mel[0].T.contiguous().cpu().numpy()}
        if "logits" in prediction:
            found["units"] = prediction["logits"][0].argmax(-1).cpu().numpy()
        found |= {
            name: prediction[name][0].cpu().numpy() for name in ("pitch", "energy", "timbre") if name in prediction
        }
        missing = [name for name in self.vocoder.needs if name not in found]
        if missing:
            raise UserError(
                f"{self.vocoder.name}: reads {', '.join(missing)}, which this checkpoint's system does not predict; "
                "take a vocoder that reads the mel alone"
            )
        return Spoken(wave=self.vocoder(found, how.seed), **found)

    def _predict(self, clip: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """`predict` over a clip of any length."""
        frames = len(clip["lips"])
        begins = starts(frames)
        if len(begins) == 1:
            return self.network.predict(self._batch(clip, 0, frames))
        if self.network.config.mean_identity:
            # Of a window alone it would be another: one clip, one speaker.
            identity = clip["identity"].astype(np.float32)
            clip = {**clip, "identity": np.broadcast_to(identity.mean(axis=0), identity.shape)}
        told: dict[str, Tensor] = {}
        first = self.network.predict(self._batch(clip, 0, WINDOW))
        if "timbre" in first:
            # Windows are equally long, so this is the mean over their frames.
            voices = [self.network.predict(self._batch(clip, begin, WINDOW))["timbre"] for begin in begins[1:]]
            told["timbre"] = torch.stack([first["timbre"], *voices]).mean(dim=0)
        blends: dict[str, Blend] = {}
        for begin in begins:
            part = self.network.predict(self._batch(clip, begin, WINDOW), **told)
            weight = ramp(frames, begin, WINDOW, OVERLAP)
            for name, axis in BLENDED.items():
                if name in part:
                    shape = [*part[name].shape]
                    shape[axis] = MEL_PER_FRAME * frames
                    blend = blends.setdefault(name, Blend(shape, axis, self.device))
                    blend.add(part[name], MEL_PER_FRAME * begin, weight)
        return {name: blend.mean() for name, blend in blends.items()} | told

    def _batch(self, clip: Mapping[str, NDArray[Any]], begin: int, length: int) -> dict[str, Tensor]:
        """Frames `begin` on of a clip, as a batch of one."""
        own = slice(begin, begin + length)
        lips = clip["lips"][own]
        batch = {
            "frames": torch.tensor([len(lips)]),
            "lips": torch.from_numpy(augmented(lips, centred(len(lips))))[None, None],
            "identity": torch.from_numpy(clip["identity"][own].astype(np.float32))[None],
            "expression": torch.from_numpy(clip["expression"][own].astype(np.float32))[None],
        }
        if "timbre" in clip:
            batch["timbre"] = torch.from_numpy(clip["timbre"].astype(np.float32))[None]
        return {name: value.to(self.device) for name, value in batch.items()}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run torch's operators on `count` threads of the CPU meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_features(clip: Mapping[str, NDArray[Any]], shape: ModelConfig) -> None:
    """Raises UserError: features that the network cannot take."""
    lips = clip["lips"]
    if lips.dtype != np.uint8 or lips.ndim != 3 or lips.shape[1:] != (LIP_SIZE, LIP_SIZE) or not len(lips):
        raise UserError(f"lips: uint8 [F, {LIP_SIZE}, {LIP_SIZE}] with F at least 1, found {lips.dtype} {lips.shape}")
    wanted: dict[str, tuple[int, ...]] = {
        "identity": (len(lips), shape.identity_dim),
        "expression": (len(lips), shape.expression_dim),
    }
    if shape.told_voice and "timbre" in clip:  # a voice that is not asked for may be any
        wanted["timbre"] = (shape.timbre_dim,)
    for name, size in wanted.items():
        if clip[name].shape != size:
            raise UserError(
                f"{name}: {clip[name].shape}, but the checkpoint's network takes {size}; use features of the profile "
                "that it was trained with"
            )


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises UserError: there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise UserError(f"--device {name}: choose from auto, cpu, cuda, cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return torch.device(name)


def load_network(state: checkpoints.Checkpoint, lip_weights: Path | None = None) -> System:
    """The network of a checkpoint, in evaluation mode on the CPU, with averaged parameters where it has them.

    Args:
        lip_weights: file of the frozen lip encoder, which checkpoints leave out; default where training had it.

    Raises:
        UserError: a vocoder's checkpoint, the shape that the checkpoint names is not of this version, its tensors do
            not fit it, or the lip encoder's file is not there or another one.
    """
    if "lip_encoder" not in state.shape:
        raise UserError("this is no checkpoint of `f2v train`; that of a vocoder belongs to --vocoder")
    network = build_network(load_config(ModelConfig, base=state.shape))
    if state.without is not None:
        network.lip_encoder.load_public(checkpoints.weights_file(state.without, lip_weights))
    checkpoints.restore(network, state)
    if state.ema is not None:
        network.load_state_dict(state.ema, strict=False)
    return network.eval()
