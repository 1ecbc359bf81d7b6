"""What happens in a build: shown on a terminal, as lines in a log or as JSON events, counted for Prometheus, and kept
in the dataset as a run record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline import metrics
from pipeline.board_lines import State
from pipeline.config import BuildConfig
from pipeline.cost import Look, Node
from pipeline.estimate import Estimate, gpu_stages
from pipeline.machines import Machines
from pipeline.outlet import Outlet
from pipeline.pack import Packed
from pipeline.recordings import Scan
from pipeline.run_record import (
    Expected,
    LostWork,
    Outcome,
    PoisonClip,
    RunRecord,
    money,
    stamp,
    versions,
    write_run,
)
from pipeline.stage import Reason
from pipeline.tally import Tally, seconds_left
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import ColumnRef

if TYPE_CHECKING:
    from pipeline.runner import Work
    from pipeline.worker import Done

ENDS = {
    "node": "is gone",
    "crash": "crashed",
    "hang": "hung",
    "memory": "ran out of memory",
    "killed": "was killed",
}
"""How workers end, in words."""


class Board:
    """The runner tells it what happens; it shows that on standard error. Use as a context manager.

    Args:
        uri: of the dataset, where `record` puts the run record.
        config: of the build.
        json: events as JSON lines instead of text.
        quiet: nothing is shown; all is counted all the same.

    Attributes:
        stages: name -> counts, in the order in which they came up.
    """

    def __init__(self, uri: str, config: BuildConfig, json: bool = False, quiet: bool = False) -> None:
        self._uri, self._config = uri, config
        self._begin, self._utc = monotonic(), datetime.now(timezone.utc)
        self._outlet = Outlet(json, quiet, self._begin)
        self.stages: dict[str, Tally] = {}
        self._clips: dict[str, int] = {}
        self._open: set[tuple[str, str]] = set()
        self._machines = Machines()
        self._lost: Counter[str] = Counter()
        self._lost_seconds: dict[str, float] = {}
        self._poison: list[PoisonClip] = []
        self._expected: Estimate | None = None
        self._outcome: Outcome = "done"
        self._on_gpu = gpu_stages(config)

    def begin(self, tasks: Sequence[Work], clips: Mapping[str, int]) -> None:
        """More work is known; `clips` are the numbers of clips by shard. Work that is known and not through counts
        once."""
        self._clips.update(clips)
        new = [task for task in tasks if (task.stage, task.shard) not in self._open]
        for task in new:
            self._tally(task.stage).add(self._clips.get(task.shard, 1))
            self._open.add((task.stage, task.shard))
        self._share_out()
        stages = {name: tally.total for name, tally in self.stages.items()}
        self._outlet.tell("begin", tasks=len(new), clips=stages)
        self._export()
        self._show()

    def expect(self, estimate: Estimate | None) -> None:
        """What `f2v plan` would have said of this build."""
        self._expected = estimate
        self._share_out()

    def given(self, task: Work, host: str) -> None:
        """A worker on `host` has the task."""
        self._tally(task.stage).given(task.shard, self._clips.get(task.shard, 1), monotonic())
        self._outlet.tell("given", stage=task.stage, shard=task.shard, host=host)
        self._export()

    def looks(self, looks: Sequence[Look]) -> None:
        """What the workers say that have a task."""
        now = monotonic()
        for look in looks:
            if look.stage in self.stages:
                self.stages[look.stage].look(look, now)
        for tally in self.stages.values():
            tally.tick(now)
        self._show()

    def done(self, task: Work, done: Done) -> None:
        """A task is through."""
        refused, cost = _refused(done.result), done.cost if done.ran else None
        clips = self._clips.get(task.shard, 1)
        self._tally(task.stage).finish(task.shard, clips, refused, done.ran, cost, monotonic())
        self._open.discard((task.stage, task.shard))
        took = {} if cost is None else {"cost": vars(cost)}
        self._outlet.tell(
            "done", stage=task.stage, shard=task.shard, ran=done.ran, clips=clips, refused=refused, **took
        )
        self._export()
        self._show()
        if not self._open:
            self._outlet.clear()  # whatever comes now may have something to show itself

    def lost(self, task: Work, why: str, seconds: float, host: str) -> None:
        """A task lost its worker and waits again; `why`: node, crash, hang, memory or killed."""
        self._tally(task.stage).lose(task.shard, monotonic())
        self._lost[why] += 1
        self._lost_seconds[why] = self._lost_seconds.get(why, 0.0) + seconds
        metrics.lost(why)
        self._outlet.tell("lost", stage=task.stage, shard=task.shard, why=why, seconds=round(seconds, 1), host=host)
        who = f"machine {host}" if why == "node" else f"a worker on {host}"
        self._outlet.say(
            f"{who} {ENDS.get(why, why)}: {task.stage} {task.shard} begins again, {seconds:.0f} s of work lost",
            self._state(monotonic()),
        )
        self._export()

    def poison(self, task: Work, key: str, reason: Reason, message: str) -> None:
        """A clip that ended its worker too often is refused."""
        self._poison.append(PoisonClip(key=key, stage=task.stage, shard=task.shard, reason=reason.value))
        self._outlet.tell("poison", stage=task.stage, shard=task.shard, key=key, reason=reason.value, message=message)
        self._outlet.say(f"{key}: to quarantine by {task.stage} ({reason.value}): {message}", self._state(monotonic()))

    def cluster(self, nodes: Sequence[Node]) -> None:
        """The machines that there are now, or were; told every few seconds, also while nobody works."""
        for node, alive in self._machines.see(nodes, monotonic()):
            kind = {"kind": node.kind, "cpus": node.cpus, "gpus": node.gpus}
            self._outlet.tell("node", host=node.host, node=node.id, alive=alive, **kind)
            if not alive:
                metrics.node_lost(node.kind)
        self._show()

    def note(self, text: str) -> None:
        """A line for the user."""
        self._outlet.tell("note", text=text)
        self._outlet.say(text, self._state(monotonic()))

    def record(self, outcome: Outcome, message: str = "") -> str | None:
        """Keep what this build was like in the dataset; None where it computed nothing.

        Returns:
            Object name of the record. Where the dataset cannot be written to, that is a note and no error: what ended
            the build is the thing to say.
        """
        now, self._outcome = monotonic(), outcome
        if not self._lost and not any(tally.tasks or tally.hand for tally in self.stages.values()):
            return None
        try:
            name = write_run(Dataset(self._uri), self._run(outcome, message, now))
        except (OSError, UserError) as error:
            self.note(f"{self._uri}: the run record could not be written ({error})")
            return None
        self._outlet.tell("progress", **self._state(now).tree())
        self._outlet.tell("end", outcome=outcome, message=message, seconds=round(now - self._begin, 1), record=name)
        return name

    def total_eta(self) -> float | None:
        """Seconds until all known work is through: that of workers with a GPU or of those without, whichever takes
        longer. None where a stage has never been timed."""
        now, longest = monotonic(), 0.0
        for on_gpu in {name in self._on_gpu for name in self.stages}:
            group = [tally for name, tally in self.stages.items() if (name in self._on_gpu) == on_gpu]
            left = seconds_left(group, now)
            if left is None:
                return None
            longest = max(longest, left)
        return longest

    def _run(self, outcome: Outcome, message: str, now: float) -> RunRecord:
        prices: dict[str, float] = dict(self._config.run.prices)
        hours = self._machines.hours(now)
        cost, unpriced = money(hours, prices)
        begin = self._expected
        expected = begin and Expected(seconds=begin.seconds, work=begin.work, unknown=begin.unknown, cost=begin.cost)
        stages = {name: tally.run(now) for name, tally in self.stages.items()}
        return RunRecord(
            outcome=outcome,
            message=message,
            begin=stamp(self._utc),
            end=stamp(datetime.now(timezone.utc)),
            seconds=round(now - self._begin, 3),
            config=self._config.model_dump(mode="json"),
            versions=versions(),
            hosts=self._machines.hosts(now),
            stages=stages,
            lost={
                why: LostWork(workers=workers, seconds=round(self._lost_seconds[why], 1))
                for why, workers in sorted(self._lost.items())
            },
            poison=self._poison,
            work=round(sum(stage.seconds for stage in stages.values()), 3),
            node_hours={kind: round(spent, 6) for kind, spent in hours.items()},
            prices=prices,
            cost=cost,
            unpriced=unpriced if prices else [],
            expected=expected if begin and begin.work else None,
        )

    def _tally(self, stage: str) -> Tally:
        return self.stages.setdefault(stage, Tally())

    def _share_out(self) -> None:
        """What the estimate says of a clip, to the stages that have not begun."""
        if self._expected:
            for stage, tally in self.stages.items():
                work = self._expected.work.get(stage)
                if work is not None:
                    tally.expected = work / max(1, self._expected.clips.get(stage, tally.total))

    def _export(self) -> None:
        for stage, tally in self.stages.items():
            metrics.waiting(stage, tally.waiting)
            metrics.running(stage, len(tally.hand))
        metrics.workers(sum(len(tally.hand) for tally in self.stages.values()))

    def _state(self, now: float) -> State:
        return State(self.stages, now - self._begin, self.total_eta(), self._machines.alive())

    def _show(self) -> None:
        now = monotonic()
        if self._open and self._outlet.due(now):
            self._outlet.show(self._state(now))

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outlet.clear()
        if kind is None and self._outcome == "done" and self.stages:
            self._outlet.last(self._state(monotonic()))


def _refused(result: Any) -> int:
    """Clips that are not in what came of a task; of a packed shard, all that any stage refused."""
    if isinstance(result, ColumnRef):
        return result.refused
    if isinstance(result, Packed):
        return len(result.lost)
    return int(isinstance(result, Scan) and result.refused is not None)
