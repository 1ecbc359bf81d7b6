"""What a build and a training run cost: processor and GPU hours, bytes, objects, requests, wall clock and money.

    python -m benchmarks.cost                               # the paper profile over LRS3: docs/walkthrough.md
    python -m benchmarks.cost --hours 28 --clips 33000 --cpu-price 0.02
    python -m benchmarks.cost DATASET                       # from what the stages of a dataset really took

The paper profile's figures below are inputs: replace them by those of a dataset of your own. Prices are assumptions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.cost_inputs import (
    BATCH,
    CLIP_FLOPS,
    CLIPS,
    FPS,
    GPUS,
    HOURS,
    LISTS_PER_SHARD,
    PAPER,
    PART,
    PAYLOAD,
    READ_AGAIN,
    READS_PER_CLIP,
    READS_PER_SHARD,
    SHARD_CLIPS,
    SOURCE,
    STEPS,
    TRAINING,
    TRAINING_SHARE,
    WHOLE,
    WRITES_PER_SHARD,
    Job,
    Prices,
)
from shards.errors import UserError

if TYPE_CHECKING:
    from shards.dataset import Dataset
    from shards.manifest import Manifest


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
