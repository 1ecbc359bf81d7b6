"""How far a stage is: clips done, at what rate, when it will be through, and what it took."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.cost import Cost, Look
from pipeline.run_record import StageRun

WINDOW = 60.0
"""Seconds of the recent past that a rate is taken over."""
APART = 0.5
"""Seconds between the counts that a rate is made of."""
FIRST = 2.0
"""Seconds of work before a rate is told: the first figures of a worker that has just begun mean little."""
TOOK = ("seconds", "compute", "setup", "read", "written", "clips", "refused")
"""What is summed of `Cost`."""


@dataclass
class InHand:
    """A task that a worker is at: its clips, since when, and what the worker last said of it."""

    clips: int
    since: float
    share: float = 0.0
    refused: int = 0
    cpu_seconds: float | None = None
    looked: float = 0.0
    cpu: float | None = None
    gpu: float | None = None
    rss: int = 0

    def look(self, look: Look, now: float) -> float:
        """Take up what the worker says at second `now`; returns the clips that came out since it last did."""
        # A task skips clips that an earlier stage refused; its share of the shard is what counts.
        share = min(1.0, look.done / look.total) if look.total else 0.0
        new, self.share = max(0.0, share - self.share) * self.clips, share
        if self.cpu_seconds is not None and now > self.looked:
            self.cpu = max(0.0, look.cpu - self.cpu_seconds) / (now - self.looked)
        self.cpu_seconds, self.looked, self.gpu, self.rss, self.refused = (
            look.cpu,
            now,
            look.gpu,
            look.rss,
            look.refused,
        )
        return new


@dataclass
class Tally:
    """Counts of one stage. All times are seconds of one steady clock.

    Attributes:
        total, done: clips of all tasks, and of those that are through.
        found: of the ones done, those whose result was there already.
        tasks, tasks_found: tasks computed, and found.
        waiting: tasks without a worker.
        refused: clips that tasks which are through refused.
        took: sums of what the computed tasks took.
        hosts: tasks computed, by host.
        active: seconds in which at least one worker was at it.
        most: tasks in hand at the same time, at most.
        expected: worker seconds per clip by an earlier build; None where there is none.
    """

    total: int = 0
    done: int = 0
    found: int = 0
    tasks: int = 0
    tasks_found: int = 0
    waiting: int = 0
    refused: int = 0
    took: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TOOK, 0.0))
    peak: int = 0
    hosts: Counter[str] = field(default_factory=Counter)
    active: float = 0.0
    most: int = 0
    expected: float | None = None
    hand: dict[str, InHand] = field(default_factory=dict)
    _worked: float = 0.0
    _samples: deque[tuple[float, float]] = field(default_factory=deque)
    _begun: float = 0.0

    def add(self, clips: int) -> None:
        """One more task is known."""
        self.total += clips
        self.waiting += 1

    def given(self, shard: str, clips: int, now: float) -> None:
        """A worker has the task."""
        if not self.hand:
            self._begun = now
        self.waiting = max(0, self.waiting - 1)
        self.hand[shard] = InHand(clips, now)
        self.most = max(self.most, len(self.hand))
        self._sample(now)

    def look(self, look: Look, now: float) -> None:
        """A worker says how far it is."""
        if look.shard in self.hand:
            self._worked += self.hand[look.shard].look(look, now)
            self._sample(now)

    def tick(self, now: float) -> None:
        """Time passes, whether clips come out or not."""
        if self._samples:
            self._sample(now)

    def finish(self, shard: str, clips: int, refused: int, ran: bool, cost: Cost | None, now: float) -> None:
        """A task is through; `cost` is what it took, where it `ran`."""
        task = self._put_down(shard, now)
        self.done += clips
        self.refused += refused
        if not ran:
            self.found += clips
            self.tasks_found += 1
            return
        self.tasks += 1
        self._worked += clips * (1 - (task.share if task else 0.0))
        self._sample(now)
        if cost:
            for name in TOOK:
                self.took[name] += getattr(cost, name)
            self.peak = max(self.peak, cost.peak)
            self.hosts[cost.host] += 1

    def lose(self, shard: str, now: float) -> None:
        """The worker of a task is gone: what it did counts into the rate, and is to be done again. A task that is not
        in hand waits already."""
        if shard in self.hand:
            self._put_down(shard, now)
            self.waiting += 1

    def rate(self) -> float | None:
        """Clips per second of all workers together, lately; None before there is one."""
        if len(self._samples) < 2:
            return None
        (begin, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end - begin) if end - begin >= FIRST and after > before else None

    def through(self) -> float:
        """Clips done, those of tasks in hand among them."""
        return self.done + sum(task.clips * task.share for task in self.hand.values())

    def eta(self) -> float | None:
        """Seconds until this stage is through if it goes on like this; None where nobody knows."""
        rate, left = self.rate(), self.total - self.through()
        if left <= 0:
            return 0.0
        return left / rate if rate else None

    def work_left(self, now: float) -> float | None:
        """Worker seconds that are left: by what this build's clips took, else by an earlier build's."""
        left = self.total - self.through()
        if left <= 0:
            return 0.0
        clips = self.through() - self.found
        if clips < min(1.0, 0.1 * self.total):
            return None if self.expected is None else left * self.expected
        return left * (self.took["seconds"] + sum(now - task.since for task in self.hand.values())) / clips

    def cpu(self) -> float | None:
        """Processors in use; None before two looks at a worker tell."""
        shares = [task.cpu for task in self.hand.values() if task.cpu is not None]
        return sum(shares) if shares else None

    def gpu(self) -> float | None:
        """Share of their GPUs in use, the mean of workers; None without GPUs."""
        shares = [task.gpu for task in self.hand.values() if task.gpu is not None]
        return sum(shares) / len(shares) if shares else None

    def quarantined(self) -> int:
        """Clips refused, those of tasks in hand among them."""
        return self.refused + sum(task.refused for task in self.hand.values())

    def busy(self, now: float) -> float:
        """`active` at second `now`."""
        return self.active + (now - self._begun if self.hand else 0.0)

    def tree(self) -> dict[str, Any]:
        """For a progress event."""
        rate, eta, cpu, gpu = self.rate(), self.eta(), self.cpu(), self.gpu()
        return {
            "done": round(self.through(), 1),
            "total": self.total,
            "found": self.found,
            "quarantined": self.quarantined(),
            "clips_per_second": None if rate is None else round(rate, 4),
            "eta": None if eta is None else round(eta, 1),
            "running": len(self.hand),
            "waiting": self.waiting,
            "cpu": None if cpu is None else round(cpu, 2),
            "gpu": None if gpu is None else round(gpu, 2),
            "rss": sum(task.rss for task in self.hand.values()),
        }

    def run(self, now: float) -> StageRun:
        """For the run record."""
        took, active = self.took, self.busy(now)
        clips, refused = int(took["clips"]), int(took["refused"])
        return StageRun(
            tasks=self.tasks,
            found=self.tasks_found,
            clips=clips,
            refused=refused,
            seconds=round(took["seconds"], 3),
            compute=round(took["compute"], 3),
            setup=round(took["setup"], 3),
            active=round(active, 3),
            clips_per_second=round((clips + refused) / active, 4) if active > 0 else None,
            read=int(took["read"]),
            written=int(took["written"]),
            peak=self.peak,
            workers=self.most,
            hosts=dict(sorted(self.hosts.items())),
        )

    def _put_down(self, shard: str, now: float) -> InHand | None:
        task = self.hand.pop(shard, None)
        if task is None:
            self.waiting = max(0, self.waiting - 1)
        elif not self.hand:
            self.active += now - self._begun
        return task

    def _sample(self, now: float) -> None:
        if len(self._samples) > 1 and now - self._samples[-2][0] < APART:
            self._samples.pop()
        self._samples.append((now, self._worked))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW:
            self._samples.popleft()


def seconds_left(stages: Sequence[Tally], now: float) -> float | None:
    """Seconds until stages that share their workers are through: worker seconds left over the workers at it. None
    where one of the stages has never been timed."""
    total = 0.0
    for tally in stages:
        left = tally.work_left(now)
        if left is None:
            return None
        total += left
    at_it = sum(len(tally.hand) for tally in stages) or max((tally.most for tally in stages), default=0)
    return total / max(1, at_it)
