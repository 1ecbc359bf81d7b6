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
from pipeline.estimate import Estimate, estimate, gpu_stages
from pipeline.plan import Cell
from pipeline.run_record import HostRun, RunRecord, StageRun, last_run, list_runs, money, versions, write_run
from pipeline.stage import Reason
from shards.config import load_config
from shards.dataset import Dataset
from shards.history import find_garbage
from shards.manifest import OWN
from shards.storage import StorageError
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
    assert list_runs(dataset) == ({name: record}, {})
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
    record = list_runs(Dataset(str(tmp_path)))[0][name]
    assert (record.outcome, record.stages["faces"].active, record.cost, record.expected) == ("stopped", 5, None, None)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), StorageError("s3://b: access denied")])
def test_a_record_that_cannot_be_written_is_a_note(
    error: Exception,
    tmp_path: Path,
    clock: Clock,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: Any) -> str:
        raise error

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


def plan_of(clips: int, *stages: str) -> tuple[Any, dict[str, list[Any]], Any]:
    """A plan that runs stages (mel) over one shard, and a manifest by which 10 clips of each took 20 s."""
    ref = SimpleNamespace(clips=9, refused=1, seconds=20.0, bytes=1000, reuse=None)
    cell = Cell("missing", "", None, True, None)
    names = stages or ("mel",)
    plan = SimpleNamespace(cells={name: {"train-000001": cell} for name in names}, packs={})
    manifest = SimpleNamespace(columns={name: {"train-000000": ref} for name in names}, packs={})
    return plan, {"train-000001": [None] * clips}, manifest


def test_an_estimate_in_money_goes_by_the_last_build(tmp_path: Path, clock: Clock) -> None:  # noqa: F811
    an_hour(str(tmp_path), clock)
    dataset = Dataset(str(tmp_path))
    (record,) = list_runs(dataset)[0].values()
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
    cluster = last.model_copy(update={"config": far.model_dump(mode="json")})
    assert estimate(*plan_of(40), far, cluster).cpus == 10
    # Ray was there for the last hour of two; before that, media were listed.
    assert estimate(*plan_of(40), far, cluster.model_copy(update={"seconds": 7200.0})).cpus == 10
    # What this machine did says nothing of a cluster, and the other way round.
    assert (
        estimate(*plan_of(40), far, last).cpus == estimate(*plan_of(40), BuildConfig(), cluster).cpus == os.cpu_count()
    )


def hosts_of(*gpus: int) -> RunRecord:
    """Of a build on machines with these GPUs, the first for 100 s, the others for 50 s each; 16 processors each."""
    hosts = [HostRun(host=f"h{n}", cpus=16, gpus=has, seconds=50 if n else 100) for n, has in enumerate(gpus)]
    config = {"run": {"ray_address": "10.0.0.1:6379"}}
    return RunRecord(outcome="done", begin="2030-01-01T00:00:00.000Z", hosts=hosts, config=config, work=1)


def test_work_of_gpus_is_shared_by_the_workers_that_hold_one() -> None:
    def plan(share: float, last: RunRecord | None, **run: Any) -> Estimate:
        base = {"profile": "paper", "run": {"gpus": share, "ray_address": "10.0.0.1:6379", **run}}
        return estimate(*plan_of(40, "landmarks", "mel", "pitch"), load_config(BuildConfig, base=base), last)

    # 80 s of work each; landmarks alone are a network's. 4 GPUs all the time, and 4 for half of it.
    two = hosts_of(4, 4)
    assert (plan(1, two).cpus, plan(1, two).gpu_workers) == (24, 6)
    assert plan(1, two).seconds == pytest.approx(80 / 6)
    assert plan(0.4, two).gpu_workers == 12  # two to a GPU
    assert plan(2, two).gpu_workers == 3
    # With many workers the processors are what there is too little of.
    assert plan(0.25, two).seconds == pytest.approx(240 / 24)
    assert plan(0, two).gpu_workers == 0
    assert plan(0.5, hosts_of(0), max_gpus=3).gpu_workers == 6
    unknown = plan(0.5, hosts_of(0))
    assert (unknown.gpu_workers, unknown.seconds) == (0, pytest.approx(240 / 16))


def test_stages_whose_workers_hold_a_gpu() -> None:
    networks = {"faces", "landmarks", "identity", "expression", "speech", "segment", "codebook"}
    paper = load_config(BuildConfig, base={"profile": "paper", "run": {"gpus": 0.5}})
    assert gpu_stages(paper) == networks
    assert gpu_stages(BuildConfig()) == frozenset()


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


def test_refused_clips_are_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {"audio": StageRun(clips=90, refused=10), "faces": StageRun(clips=95, refused=5)}
    for refused, stages in ((10, both), (12, {**both, "pack": StageRun(tasks=1, clips=88, refused=12)})):
        record = RunRecord(outcome="done", begin="2030-01-01T00:00:00.000Z", stages=stages)
        folder = tmp_path / str(refused)
        write_run(Dataset(str(folder)), record)
        assert main(["status", str(folder), "--runs"]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[-4:-2] == ["100", str(refused)]


def test_records_that_cannot_be_read_stand_in_nobodys_way(
    tmp_path: Path,
    clock: Clock,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, name = an_hour(str(tmp_path), clock)
    assert name is not None
    dataset = Dataset(str(tmp_path))
    tree = json.loads((tmp_path / name).read_text())
    # A newer program knows more, an older one knew less.
    tree = {**tree, "outcome": "done", "planet": "Mars", "hosts": [{**tree["hosts"][0], "tpus": 1}]}
    del tree["poison"], tree["stages"]["faces"]["peak"]
    newer, cut, empty, gone = (f"runs/2040010{day}T000000Z-00000000.json" for day in range(1, 5))
    for other, text in ((newer, json.dumps(tree)), (cut, json.dumps(tree)[:100]), (empty, "{}"), (gone, "")):
        (tmp_path / other).write_text(text)
    read = type(dataset.store).read

    def deleted(store: Any, name: str) -> bytes:
        if name == gone:
            raise FileNotFoundError(name)
        return read(store, name)

    monkeypatch.setattr(type(dataset.store), "read", deleted)
    with pytest.warns(UserWarning, match=f"2 run records: .*{empty}"):
        last = last_run(dataset)
    assert last is not None
    assert (last.work, last.hosts[0].host, last.poison, last.stages["faces"].peak) == (20, "h0", [], 0)
    records, faults = list_runs(dataset)
    assert ([*records], {*faults}) == ([name, newer], {cut, empty})
    assert main(["status", str(tmp_path), "--runs"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert [line.split(": ")[1] for line in err.splitlines()] == ["left out"] * 2
    assert cut in err
    assert empty in err
    assert gone not in err


def test_a_record_that_the_storage_refuses_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset(str(tmp_path))
    name = write_run(dataset, RunRecord(outcome="done", begin="2030-01-01T00:00:00.000Z", work=1))

    def refused(*args: Any) -> bytes:
        raise StorageError("s3://b: access denied")

    monkeypatch.setattr(type(dataset.store), "read", refused)
    assert list_runs(dataset) == ({}, {name: "s3://b: access denied"})
    with pytest.warns(UserWarning, match="access denied"):
        assert last_run(dataset) is None
