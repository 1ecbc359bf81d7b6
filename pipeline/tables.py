"""The clip table and the quarantine table of a build, and the check that no clip is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.pack import disagreeing
from pipeline.plan import Plan, columns_of
from pipeline.stage import Clip, Reason
from shards.dataset import ClipRow, Dataset, Index, QuarantineRow


def make_tables(
    dataset: Dataset, shards: dict[str, list[Clip]], plan: Plan
) -> tuple[list[ClipRow], list[QuarantineRow]]:
    """A row per clip, and a row per refused clip with the first stage that refused it."""
    rows: list[ClipRow] = []
    refused: list[QuarantineRow] = []
    for shard, clips in shards.items():
        columns = columns_of(dataset, plan, shard, list(plan.marks))
        lengths = {clip.key: frames for clip, frames in disagreeing(columns, clips)}
        # Two branches (picture, sound) may refuse the same clip; the first stage in order speaks.
        first: dict[str, tuple[str, Any]] = {}
        for column in columns:
            for refusal in column.refused:
                first.setdefault(refusal.key, (column.stage, refusal))
        for clip in clips:
            state, frames = "quarantined", 0
            if clip.key in first:
                stage, refusal = first[clip.key]
                fault = refusal.reason is Reason.FAULT
                detail = (stage, refusal.reason.value, refusal.message, refusal.traceback, fault)
                refused.append(QuarantineRow(clip.key, clip.uri, clip.split, shard, *detail))
            elif clip.key in lengths:
                message = f"stages disagree on the number of video frames: {lengths[clip.key]}"
                detail = ("pack", Reason.AUDIO_LENGTH.value, message, "", False)
                refused.append(QuarantineRow(clip.key, clip.uri, clip.split, shard, *detail))
            else:
                state, frames = "packed", columns[0].clips[clip.key].frames
            place = (clip.uri, clip.digest, clip.split, clip.speaker, clip.text, clip.start, clip.end)
            rows.append(ClipRow(clip.key, *place, frames, shard, state))
    return rows, refused


def check_conservation(shards: dict[str, list[Clip]], index: Index, refused: Sequence[QuarantineRow]) -> None:
    """Clips in = clips packed + clips quarantined, shard by shard."""
    packed = {shard.shard: len(shard.clips) for shard in index.shards}
    lost = Counter(row.shard for row in refused)
    for shard, clips in shards.items():
        if len(clips) != packed.get(shard, 0) + lost[shard]:
            raise RuntimeError(
                f"{shard}: {len(clips)} clips in, {packed.get(shard, 0)} packed, {lost[shard]} quarantined"
            )
