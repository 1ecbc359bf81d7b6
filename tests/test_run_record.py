"""Run records: what they count, what a build cost and would cost, and that they belong to the dataset."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli.main import main
from pipeline.board import Board
from pipeline.config import BuildConfig
from pipeline.cost import Node
from pipeline.estimate import Estimate, estimate
from pipeline.plan import Cell
from pipeline.run_record import RunRecord, last_run, list_runs, money, versions, write_run
from pipeline.stage import Reason
from shards.config import load_config
from shards.dataset import Dataset
from shards.history import find_garbage
from shards.manifest import OWN
from shards.verify import verify
from tests.test_board import COST, SHARDS, Clock, clock, did, task  # noqa: F401
from tests.toy import toy_dataset

PRICES = {"cpu": 0.5, "gpu": 3.0}
N1, N2, HEAD = (
    Node("1", "h1", 8, 0, "cpu", True),
    Node("2", "h2", 8, 2, "gpu", True),
    Node("0", "h0", 0, 0, "head", True),
)


def an_hour(uri: str, clock: Clock) -> tuple[Board, str | None]:  # noqa: F811
    """A build of an hour: one machine there all the time, one with GPUs for 15 minutes in two parts."""
    board = Board(uri, load_config(BuildConfig, base={"run": {"prices": PRICES}}), quiet=True)
    board.cluster([HEAD, N1, N2])
    board.begin([task("faces", shard) for shard in SHARDS], dict.fromkeys(SHARDS, 100))
    board.expect(Estimate(900.0, {"faces": 1800.0}, 0, 0, ["pack"], 2, {"faces": 400}, 2.5))
    board.given(task(shard=SHARDS[0]), "h1")
    board.given(task(shard=SHARDS[1]), "h2")
    clock.now += 600
    board.cluster([HEAD, N1])  # a machine that is not named is gone
    board.lost(task(shard=SHARDS[1]), "node", 600.0, "h2")
    board.lost(task(shard=SHARDS[0]), "crash", 30.5, "h1")
    board.given(task(shard=SHARDS[0]), "h1")
    board.poison(task(shard=SHARDS[0]), "clip-9", Reason.FAULT, "it crashes")
    clock.now += 300
    board.done(task(shard=SHARDS[0]), did())
    board.done(task(shard=SHARDS[3]), did(None, ran=False))
    clock.now += 2400
    board.cluster([HEAD, N1, N2])
    clock.now += 300
    return board, board.record("failed", "no room")


def test_a_record_counts_what_was_done_and_what_it_cost(tmp_path: Path, clock: Clock) -> None:  # noqa: F811
    dataset = Dataset(str(tmp_path))
    _, name = an_hour(dataset.uri, clock)
    assert name is not None
    assert OWN.fullmatch(name)
    record = RunRecord.model_validate_json((tmp_path / name).read_bytes())
    assert list_runs(dataset) == {name: record}
    assert (record.outcome, record.message, record.seconds, record.work) == ("failed", "no room", 3600, 20)
    faces = record.stages["faces"]
    assert (faces.tasks, faces.found, faces.clips, faces.refused, faces.read, faces.written) == (
        1,
        1,
        97,
        3,
        1000,
        3000,
    )
    assert (faces.seconds, faces.compute, faces.setup, faces.active, faces.workers) == (20, 15, 2, 900, 2)
    assert faces.clips_per_second == pytest.approx(100 / 900, abs=1e-4)
    assert faces.hosts == {"h1": 1}
    assert {why: (lost.workers, lost.seconds) for why, lost in record.lost.items()} == {
        "crash": (1, 30.5),
        "node": (1, 600),
    }
    assert [(clip.key, clip.reason) for clip in record.poison] == [("clip-9", "fault")]
    assert record.node_hours == {"head": 1, "cpu": 1, "gpu": 0.25}
    assert record.cost == 0.5 + 0.25 * 3
    assert record.unpriced == ["head"]
    hosts = {host.host: host for host in record.hosts}
    assert (hosts["h2"].seconds, hosts["h2"].gpus, hosts["h2"].lost) == (900, 2, False)
    assert record.expected is not None
    assert (record.expected.seconds, record.expected.cost, record.expected.unknown) == (900, 2.5, ["pack"])
    assert record.config["run"]["prices"] == PRICES
    assert load_config(BuildConfig, base=record.config).run.prices == PRICES
    assert {"faces2voices", "ray", "numpy", "python"} <= set(record.versions)


def test_a_build_that_computed_nothing_leaves_no_record(tmp_path: Path, clock: Clock) -> None:  # noqa: F811
    board = Board(str(tmp_path / "ds"), BuildConfig(), quiet=True)
    assert board.record("done") is None
    board.begin([task()], {})
    board.done(task(), did(None, ran=False))
    assert board.record("done") is None
    assert not (tmp_path / "ds").exists()


def test_a_build_that_was_stopped_in_its_first_task_leaves_one(tmp_path: Path, clock: Clock) -> None:  # noqa: F811
    board = Board(str(tmp_path), BuildConfig(), quiet=True)
    board.begin([task()], {})
    board.given(task(), "h1")
    clock.now += 5
    name = board.record("stopped")
    assert name is not None
    record = list_runs(Dataset(str(tmp_path)))[name]
    assert (record.outcome, record.stages["faces"].active, record.cost, record.expected) == ("stopped", 5, None, None)


def test_a_record_that_cannot_be_written_is_a_note(
    tmp_path: Path,
    clock: Clock,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.board.write_run", full)
    board = Board(str(tmp_path), BuildConfig())
    board.begin([task()], {})
    board.given(task(), "h1")
    assert board.record("failed", "disk") is None
    assert "could not be written" in capsys.readouterr().err


def test_money() -> None:
    assert money({"cpu": 10, "gpu": 2}, {"cpu": 0.1, "gpu": 2, "head": 9}) == (5.0, [])
    assert money({"cpu": 10, "gpu": 2}, {"cpu": 0.1}) == (1.0, ["gpu"])
    assert money({"cpu": 10}, {}) == (None, ["cpu"])


def test_versions_name_the_commit_of_a_checkout() -> None:
    if not Path(__file__).parent.parent.joinpath(".git").exists():
        pytest.skip("no checkout")
    assert len(versions()["commit"].rstrip("+")) == 40


def plan_of(clips: int) -> tuple[Any, dict[str, list[Any]], Any]:
    """A plan that runs mel over one shard, and a manifest by which 10 clips of it took 20 s."""
    ref = SimpleNamespace(clips=9, refused=1, seconds=20.0, bytes=1000, reuse=None)
    cell = Cell("missing", "", None, True, None)
    plan = SimpleNamespace(cells={"mel": {"train-000001": cell}}, packs={})
    manifest = SimpleNamespace(columns={"mel": {"train-000000": ref}}, packs={})
    return plan, {"train-000001": [None] * clips}, manifest


def test_an_estimate_in_money_goes_by_the_last_build(tmp_path: Path, clock: Clock) -> None:  # noqa: F811
    an_hour(str(tmp_path), clock)
    dataset = Dataset(str(tmp_path))
    (record,) = list_runs(dataset).values()
    assert last_run(dataset) is None  # it failed
    write_run(dataset, record.model_copy(update={"outcome": "done", "begin": "2030-01-01T00:00:00.000Z"}))
    last = last_run(dataset)
    assert last is not None
    config = load_config(BuildConfig, base={"run": {"prices": {"cpu": 1.0, "gpu": 6.0}}})
    found = estimate(*plan_of(40), config, last)
    # 80 s of work; the last build did 20 s of it with an hour of cpu and a quarter of gpu.
    assert (found.work["mel"], found.cost) == (80, 4 * (1 + 1.5))
    assert found.clips == {"mel": 40}
    assert estimate(*plan_of(40), config).cost is None
    assert estimate(*plan_of(40), BuildConfig(), last).cost is None
    # On a cluster: as many processors as there were, 8 for an hour and 8 for a quarter.
    far = load_config(BuildConfig, base={"run": {"ray_address": "10.0.0.1:6379"}})
    assert estimate(*plan_of(40), far, last).cpus == 10


def test_records_are_part_of_the_dataset(tmp_path: Path, clock: Clock) -> None:  # noqa: F811
    dataset = toy_dataset(tmp_path / "ds", [[14]])
    _, name = an_hour(dataset.uri, clock)
    assert name is not None
    old = time.time() - 40 * 86400
    os.utime(tmp_path / "ds" / name, (old, old))
    garbage = find_garbage(dataset, timedelta(days=7))
    assert name not in {found.name for found in [*garbage.old, *garbage.young, *garbage.kept]}
    assert garbage.foreign == []
    verdict = verify(dataset.uri)
    assert not verdict.problems, verdict.problems


def test_status_lists_builds(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main(["status", str(tmp_path), "--runs"]) == 0
    assert "no build has left a record" in capsys.readouterr().out
    _, name = an_hour(str(tmp_path), clock)
    assert main(["status", str(tmp_path), "--runs"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["began", "(UTC)", "ended", "took", "work", "clips", "refused", "lost", "cost"]
    assert line.split()[2:] == ["failed", "60.0", "min", "20.0", "s", "100", "3", "2", "1.25"]
    assert main(["status", str(tmp_path), "--runs", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree[name]["stages"]["faces"]["clips"] == 97


def test_a_damaged_record_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "runs/20260101T000000Z-00000000.json"
    (tmp_path / "runs").mkdir()
    (tmp_path / name).write_text("{}")
    assert main(["status", str(tmp_path), "--runs"]) != 0
    assert name in capsys.readouterr().err
