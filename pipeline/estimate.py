"""How long a plan will take and how much it will write, from what the columns that are there took."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.codebook import SAMPLED
from pipeline.config import BuildConfig
from pipeline.plan import Cell, Plan
from pipeline.registry import KINDS, make_stage
from pipeline.run_record import HostRun, RunRecord, money
from pipeline.stage import Clip
from shards.manifest import ColumnRef, Manifest
from shards.schema import LIP_SIZE, MEL_PER_FRAME


@dataclass(frozen=True)
class Estimate:
    """Cost of a plan.

    Attributes:
        seconds: wall clock, on the processors and GPUs assumed.
        work: worker seconds per stage, of `pack`, and of `codebook`, the encoding that a fit of centroids takes.
        clips: that each of the stages and `pack` is to work on.
        columns, packed: bytes to be written.
        unknown: stages that never ran in this dataset, which the figures leave out.
        cpus: processors assumed.
        gpu_workers: workers with a share of a GPU at the same time; 0 where none are needed or nobody knows how many
            GPUs there will be.
        cost: in money; None where no price is set, or no earlier build tells how much work an hour of a machine does.
    """

    seconds: float
    work: dict[str, float]
    columns: int
    packed: int
    unknown: list[str]
    cpus: int
    clips: dict[str, int] = field(default_factory=dict)
    cost: float | None = None
    gpu_workers: int = 0


def estimate(
    plan: Plan,
    shards: Mapping[str, Sequence[Clip]],
    manifest: Manifest | None,
    config: BuildConfig,
    last: RunRecord | None = None,
) -> Estimate:
    """Scale what each stage took per clip to the clips that the plan runs.

    Args:
        last: record of the dataset's last build. What the machines of that build cost at today's prices, per second of
            work that they did, is what a second of this plan's work costs. The plan is thought to run on as many GPUs
            as there were then, and on a cluster on as many processors, if that build ran on a cluster or not as this
            one does.
    """
    work: dict[str, float] = {}
    counts: dict[str, int] = {}
    columns, packed = 0.0, 0.0
    unknown = []
    for stage, row in plan.cells.items():
        todo = {shard: cell for shard, cell in row.items() if cell.run and cell.state != "stored"}
        if not todo:
            continue
        known = list(manifest.columns.get(stage, {}).values()) if manifest else []
        # With the network, and without it from kept fields: what one takes says nothing about the other.
        ran = [ref for ref in known if ref.reuse is None]
        fresh = sum(len(shards[shard]) for shard, cell in todo.items() if cell.reuse is None)
        spared = sum(len(shards[shard]) for shard, cell in todo.items() if cell.reuse is not None)
        if fresh and not _clips(ran):
            unknown.append(stage)
            continue
        work[stage] = fresh * _seconds(ran) + spared * _seconds([ref for ref in known if ref.reuse is not None])
        counts[stage] = fresh + spared
        columns += (fresh + spared) * sum(ref.bytes for ref in known) / max(1, _clips(known))
        unfitted = [shard for shard, cell in todo.items() if cell.task is None and cell.reuse is None]
        if stage == "speech" and unfitted and manifest:
            sampled = min(sum(len(shards[shard]) for shard in unfitted), _fit_clips(manifest, config))
            work["codebook"] = sampled * _seconds(ran)
    again = to_pack(plan)
    clips = sum(len(shards[shard]) for shard in again)
    packs = list(manifest.packs.values()) if manifest else []
    held = sum(_packed_bytes(manifest, shard, config) for shard in manifest.packs) if manifest else 0
    seen = sum(pack.clips + sum(pack.refused.values()) for pack in packs)
    if clips and seen:
        work["pack"] = clips * sum(pack.seconds for pack in packs) / seen
        packed = clips * held / seen
        counts["pack"] = clips
    elif clips:
        unknown.append("pack")
    cpus = config.run.cpus or os.cpu_count() or 1
    hosts = last.hosts if last and _on_cluster(last) == (config.run.ray_address is not None) else []
    there = _at_once([host.cpus for host in hosts], hosts)
    if config.run.ray_address and there:
        cpus = max(1, round(there))
    on_gpu = {stage: seconds for stage, seconds in work.items() if stage in gpu_stages(config)}
    holders = min(cpus, _holders(config, hosts)) if on_gpu else 0
    spent, _ = money(last.node_hours, config.run.prices) if last else (None, [])
    cost = round(spent / last.work * sum(work.values()), 4) if last and spent is not None else None
    # Workers share all, but only those that hold a GPU, and a processor too, do the work of GPUs. One of them encodes
    # for the fit, beside the others, and units come after that.
    speakers = holders if holders and "speech" in on_gpu else cpus
    alone = work.get("codebook", 0.0) + (work.get("speech", 0.0) / speakers if "codebook" in work else 0.0)
    seconds = max(sum(work.values()) / cpus, sum(on_gpu.values()) / holders if holders else 0.0, alone)
    return Estimate(seconds, work, round(columns), round(packed), unknown, cpus, counts, cost, holders)


def gpu_stages(config: BuildConfig) -> frozenset[str]:
    """Stages, `segment` and `codebook` among them, whose workers hold a share of a GPU."""
    if not config.run.gpus:
        return frozenset()
    names = {name for name, kind in KINDS.items() if make_stage(kind, config, None).needs(config.run.gpus).gpus}
    beside = {"segment": "faces", "codebook": "speech"}
    return frozenset(names | {name for name, stage in beside.items() if stage in names})


def _on_cluster(record: RunRecord) -> bool:
    run = record.config.get("run")
    return isinstance(run, dict) and run.get("ray_address") is not None


def _at_once(numbers: Sequence[float], hosts: Sequence[HostRun]) -> float:
    """Sum of what each host has or holds, weighed by how long it was there. The machine of Ray's own processes is there
    from first to last, so the longest time of all is that of the cluster."""
    span = max((host.seconds for host in hosts), default=0.0)
    return sum(number * host.seconds for number, host in zip(numbers, hosts, strict=True)) / span if span else 0.0


def _holders(config: BuildConfig, hosts: Sequence[HostRun]) -> int:
    """Workers with their share of a GPU that there is room for at the same time; 0 where nobody knows."""
    share = config.run.gpus

    def on(gpus: float) -> int:
        # A share lies on one GPU.
        return int(gpus) * int(1 / share + 1e-6) if share <= 1 else int(gpus / share)

    there = _at_once([on(host.gpus) for host in hosts], hosts)
    most = on(config.run.max_gpus or 0.0) if config.run.ray_address else 0
    return max(1, round(there)) if there else most


def _clips(refs: Sequence[ColumnRef]) -> int:
    return sum(ref.clips + ref.refused for ref in refs)


def _seconds(refs: Sequence[ColumnRef]) -> float:
    """Per clip; 0 for no column."""
    return sum(ref.seconds for ref in refs) / max(1, _clips(refs))


def _packed_bytes(manifest: Manifest, shard: str, config: BuildConfig) -> int:
    """Of a packed shard, with lips stored as the settings say."""
    pack, column = manifest.packs[shard], manifest.columns.get("lips", {}).get(shard)
    if column is None or set(pack.raw) == set(config.pack.raw):
        return pack.bytes
    more = pack.frames * LIP_SIZE**2 - column.bytes
    return pack.bytes + (more if config.pack.raw else -more)


def _fit_clips(manifest: Manifest, config: BuildConfig) -> float:
    """How many clips a fit of centroids encodes."""
    packs = manifest.packs.values()
    length = MEL_PER_FRAME * sum(pack.frames for pack in packs) / max(1, sum(pack.clips for pack in packs))
    return SAMPLED * config.speech.fit_frames / length if length else math.inf


def to_pack(plan: Plan) -> list[str]:
    """Shards that the plan packs, those among them whose units are not known yet."""
    running = {shard for row in plan.cells.values() for shard, cell in row.items() if cell.run}
    shards = {shard for row in plan.cells.values() for shard in row}
    whole = {shard for shard in shards if all(_will_be(row[shard]) for row in plan.cells.values())}
    return sorted(shard for shard in whole if shard in running or (shard in plan.packs and plan.packs[shard].run))


def _will_be(cell: Cell) -> bool:
    return cell.run or cell.mark is not None
