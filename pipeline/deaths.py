"""Why a worker died, and whether a clip is to blame.

A clip is blamed only where it was alone in the hands of worker after worker that died. A machine that is gone, and a
worker that fell because others took its machine's memory, blame nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.columns import Refused
from pipeline.config import RunConfig
from pipeline.in_flight import Notes
from pipeline.pools import Member
from pipeline.recordings import Refusal, Scan, SegmentTask
from pipeline.schedule import Job
from pipeline.stage import Clip, Reason
from pipeline.words import count
from pipeline.worker import Done
from shards.errors import UserError

STRAYS = 10
"""So often a task may lose its worker to the hunger of others or to something unknown, or its machine."""
_REASONS = {"crash": Reason.CRASH, "killed": Reason.CRASH, "hang": Reason.HANG, "memory": Reason.MEMORY}
_SHORT_OF_MEMORY = ("running low on memory", "NODE_OUT_OF_MEMORY", "OutOfMemoryError")
"""How Ray says that its own monitor ended a worker."""


@dataclass(frozen=True)
class Death:
    """What a worker died of.

    Attributes:
        why: `node`, `crash`, `hang`, `memory` or `killed`.
        in_hand: the clips that it had in hand.
        seconds: of work lost.
        rss: bytes that it held.
        fault: its last words.
        low: whether Ray ended it because its machine was short of memory.
        blank: whether nothing is known of it, or it had not begun the task.
    """

    why: str
    in_hand: tuple[Clip, ...]
    seconds: float
    rss: int
    fault: str
    low: bool = False
    blank: bool = False


@dataclass(frozen=True)
class Inquest:
    """A death that is looked into.

    Attributes:
        error: what Ray said.
        seconds: since the worker got the job.
        until: when the answer must be there.
    """

    member: Member
    job: Job
    error: str
    seconds: float
    until: float

    def death(self, notes: Notes | None) -> Death:
        """By the notes that the worker left; None where they cannot be had."""
        if notes is None or notes.task != " ".join(self.job.place):
            return Death("killed", (), self.seconds, 0, "", blank=True)
        low = any(words in self.error for words in _SHORT_OF_MEMORY)
        why = notes.why or ("memory" if low else "killed")
        clips = self.job.order.clips
        in_hand = tuple(clips[place] for place in notes.in_hand if place < len(clips))
        return Death(why, in_hand, self.seconds, notes.rss, notes.fault, low and notes.why is None)

    def machine_lost(self) -> Death:
        """With its machine."""
        return Death("node", (), self.seconds, 0, "")


@dataclass(frozen=True)
class Verdict:
    """What follows from a death: clips that are given up, and the job's result where that was its only clip."""

    given_up: tuple[tuple[str, Reason, str], ...] = ()
    done: Done | None = None


def judge(job: Job, death: Death, kind_share: float, run: RunConfig) -> Verdict:
    """Enter a death into a job's record; its order then says what is to be done differently.

    Args:
        kind_share: bytes of its machine's memory that are such a worker's; 0 where that is not known.

    Raises:
        UserError: workers die of this task again and again, and no clip can be blamed.
    """
    if death.why == "node":
        job.machines += 1
        if job.machines > STRAYS:
            raise UserError(
                f"{_where(job)}: lost its machine {job.machines} times; either it takes longer than such machines last "
                "(pack.shard_clips makes smaller shards of new clips), or it takes them with it (memory); build again "
                "to resume"
            )
        return Verdict()
    if death.blank or (death.low and death.rss < kind_share):
        job.strays += 1
        if job.strays > STRAYS:
            raise UserError(
                f"{_where(job)}: lost {job.strays} workers through no fault that can be found; are machines short of "
                "memory? Give them fewer workers or more memory, and build again to resume"
            )
        return Verdict()
    if not death.in_hand:
        job.deaths += 1
        if job.deaths > run.retries:
            last = death.fault.partition("\n")[0] or "killed; Ray's worker-*.err logs may say why"
            raise UserError(
                f"{_where(job)}: the worker died {job.deaths} times with no clip in hand ({last}); build again to "
                "resume"
            )
        return Verdict()
    for clip in death.in_hand:
        job.strikes[clip.key] += 1
    alone = death.in_hand[0] if len(death.in_hand) == 1 else None
    if alone is None or job.strikes[alone.key] <= run.retries:
        given_up = {refused.key for refused in job.order.given_up}
        job.order = replace(job.order, alone=tuple(key for key in job.strikes if key not in given_up))
        return Verdict()
    return _give_up(job, alone, death, run)


def _give_up(job: Job, clip: Clip, death: Death, run: RunConfig) -> Verdict:
    reason, times = _REASONS[death.why], count(job.strikes[clip.key], "time")
    # No measured figures: they would differ from build to build.
    words = {
        "hang": f"did not come on within {run.clip_timeout:g} s (run.clip_timeout)",
        "memory": f"took more than {run.memory_gb:g} GB (run.memory_gb)",
        "crash": death.fault.partition("\n")[0].removeprefix("Fatal Python error: "),
        "killed": "was killed, by the system for want of memory or by a crash that left no word",
    }[death.why]
    if death.low:
        words = "held more than its share of a machine that ran short of memory"
    message = f"{clip.uri}: its worker died {times} on this clip, the last time alone: {words}"
    order, task = job.order, job.order.task
    if isinstance(task, SegmentTask):
        refusal = Refusal(reason=reason, message=message.removeprefix(f"{clip.uri}: "), traceback=death.fault)
        scan = Scan(task=task, frames=0, cuts=[], segments=[], left_out=[], refused=refusal)
        return Verdict(((clip.key, reason, message),), Done(scan, True))
    refused = Refused(key=clip.key, reason=reason, message=message, traceback=death.fault)
    job.order = replace(
        order, alone=tuple(key for key in order.alone if key != clip.key), given_up=(*order.given_up, refused)
    )
    return Verdict(((clip.key, reason, message),))


def _where(job: Job) -> str:
    return f"stage {job.order.task.stage}, shard {job.order.task.shard}"
