"""How planning, committing and checking grow with the number of clips: trivial stages, without Ray, in one process.

    python benchmarks/manifest.py --clips 1000 3000 10000 --json manifest.json

Each size is a dataset of its own with two-frame clips. What is timed is everything around the stages' own work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import pipeline.build
from pipeline.build import Summary, build, plan_build
from pipeline.columns import Task, load_column
from pipeline.config import BuildConfig
from pipeline.fingerprint import recipe_key
from pipeline.pack import PackTask, load_packed, pack_shard
from pipeline.registry import KINDS
from pipeline.run_stage import build_column
from pipeline.selection import Selection
from pipeline.stage import Fields, Item, Stage
from pipeline.survey import survey
from pipeline.work import Crew
from pipeline.worker import Done, Order, Work
from shards.config import load_config
from shards.dataset import Dataset
from shards.history import find_garbage
from shards.schema import FIELDS
from shards.verify import verify

FRAMES = 2
WIDTHS = {"D_identity": 8, "D_expression": 8, "D_timbre": 8}


def value(name: str) -> Any:
    """A field of a two-frame clip."""
    field = FIELDS[name]
    if field.encoding == "json":
        return {}
    lengths = {"F": FRAMES, "2F": 2 * FRAMES, "640F": 640 * FRAMES, **WIDTHS}
    return np.zeros([lengths.get(str(part), part) for part in field.shape], field.dtype)


class Trivial(Stage[Any]):
    """Stands for a stage and takes no time."""

    name: ClassVar[str] = ""
    version: ClassVar[int] = 0

    def __init__(self, kind: type[Stage[Any]]) -> None:
        self.name, self.reads, self.writes = kind.name, kind.reads, kind.writes  # type: ignore[misc]
        self._fields = {name: value(name) for name in kind.writes}

    def run(self, item: Item) -> Fields:
        return self._fields


class Alone(Crew):
    """Does the tasks in this process; `seconds` is what that took."""

    seconds: ClassVar[float] = 0.0

    def _execute(self, orders: list[Order], on_done: Callable[[Work, Done], list[Order]]) -> None:
        begin = time.perf_counter()
        dataset = Dataset(self._site.uri)
        for order in orders:
            task, clips = order.task, order.clips
            assert isinstance(task, (Task, PackTask))
            reads = [load_column(dataset, stage, task.shard, mark) for stage, mark in task.reads.items()]
            columns = [column for column in reads if column]
            if isinstance(task, PackTask):
                found = load_packed(dataset, task.shard, task.inputs)
                done = Done(found or pack_shard(dataset, task, columns, clips), found is None)
            else:
                column, _ = build_column(dataset, Trivial(KINDS[task.stage]), task, clips, columns)
                done = Done(column.ref(recipe_key(task.recipe)), True)
            on_done(task, done)
        Alone.seconds += time.perf_counter() - begin


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds outside the stages, and the result."""
    Alone.seconds = 0.0
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin - Alone.seconds, result


def measure(folder: Path, clips: int) -> dict[str, float]:
    """Seconds of each step on a dataset of so many clips."""
    source = folder / "source"
    source.mkdir()
    for number in range(clips):
        (source / f"clip{number:06d}.mp4").write_bytes(b"%d" % number)
    np.save(folder / "centroids.npy", np.zeros((2, 384), np.float32))
    config = load_config(BuildConfig, base={"speech": {"centroids": str(folder / "centroids.npy"), "clusters": 2}})
    uri = str(folder / "dataset")
    dataset = Dataset(uri)

    def run(**sections: Any) -> Summary:
        return build(str(source), uri, config.model_copy(update=sections))

    found: dict[str, float] = {}
    found["first build"], summary = timed(run)
    assert summary.clips == clips
    found["nothing to do"], summary = timed(run)
    assert not summary.tasks
    found["plan"], _ = timed(lambda: plan_build(survey(None, uri, config), Selection()))
    (source / "one-more.mp4").write_bytes(b"x")
    found["one clip more"], summary = timed(run)
    assert (summary.clips, summary.packed) == (clips + 1, 1)
    energy = config.energy.model_copy(update={"kind": "norm"})
    found["energy again"], summary = timed(lambda: run(energy=energy))
    assert summary.tasks == summary.packed
    found["verify --quick"], verdict = timed(lambda: verify(uri, full=False))
    assert not verdict.problems
    from datetime import timedelta

    found["gc (list)"], _ = timed(lambda: find_garbage(dataset, timedelta(0)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[1000, 3000, 10000])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    pipeline.build.Crew = Alone  # type: ignore[misc,attr-defined]
    results: dict[int, dict[str, float]] = {}
    for clips in args.clips:
        with tempfile.TemporaryDirectory() as folder:
            results[clips] = measure(Path(folder), clips)
    print("".join([f"{'seconds outside the stages':<28}", *(f"{clips:>10}" for clips in results)]))
    for step in next(iter(results.values())):
        print("".join([f"{step:<28}", *(f"{row[step]:>10.2f}" for row in results.values())]))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
