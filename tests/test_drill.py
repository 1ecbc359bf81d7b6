"""Nodes, workers and clips that kill workers: the build ends by itself, with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.drill import Drill, shards_of, undisturbed
from benchmarks.drill_scenarios import SCENARIOS, Scenario
from benchmarks.watched_build import POISON, Ended, WatchedBuild, stage_env
from pipeline.synthetic.corpus import write_corpus
from shards.dataset import Dataset
from shards.verify import verify

KEY = "clip4"


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    folder = tmp_path_factory.mktemp("drill")
    write_corpus(folder / "source", clips=18, voices=2, seed=1)
    with Drill(folder / "source", folder) as drill:
        yield drill


@pytest.mark.nightly
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_build_comes_through(drill: Drill, scenario: Scenario) -> None:
    outcome = drill.run(scenario)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert outcome.wrong == []


def test_a_scenario_that_disturbed_nothing_is_no_success() -> None:
    ended = Ended(0, 0, 1, {}, [], 0, "", 0)
    for scenario in SCENARIOS:
        if scenario.blows or any(fault.once for fault in scenario.faults):
            assert undisturbed(scenario, ended, ()), scenario.name


def trivial_build(source: Path, folder: Path, what: str) -> WatchedBuild:
    """A build with a Ray of its own and stages that take no time, one of which does something to a clip."""
    folder.mkdir()
    fault = {"stage": "energy", "key": KEY, "what": what}
    (folder / "stages.json").write_text(json.dumps({"trivial": True, "faults": [fault]}))
    np.save(folder / "centroids.npy", np.zeros((2, 384), np.float32))
    settings = ["pack.shard_clips=3", "run.cpus=1", "run.retries=1"]
    settings += [f"speech.centroids={folder / 'centroids.npy'}", "speech.clusters=2"]
    return WatchedBuild(source, folder / "dataset", settings, env=stage_env(folder / "stages.json"))


def test_a_clip_that_crashes_native_code_costs_itself_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(6):
        (source / f"clip{number}.mp4").write_bytes(b"%d" % number)
    builds = {what: trivial_build(source, tmp_path / what, what) for what in ("reject", "segfault")}
    ended = {what: build.finish(timeout=120) for what, build in builds.items()}
    for build in ended.values():
        assert build.status == 0, build.said
    undisturbed, crashed = (Dataset(str(tmp_path / what / "dataset")) for what in ended)
    assert len(shards_of(undisturbed)) == 2
    assert shards_of(crashed) == shards_of(undisturbed)
    (row,) = crashed.quarantine()
    assert (row.key, row.stage, row.reason, row.retriable) == (KEY, "energy", "crash", True)
    assert "Segmentation fault" in row.message + row.traceback
    assert "sitecustomize.py" in row.traceback  # where it was when it died
    assert verify(crashed.uri).problems == []
    assert [event["why"] for event in ended["segfault"].of("lost")] == ["crash"] * 2
    assert [event["key"] for event in ended["segfault"].of("poison")] == [KEY]


def test_poison_leaves_the_sitecustomize_of_the_environment_in_place(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.environment_was_here = True")
    path = os.pathsep.join([str(POISON), str(tmp_path)])
    check = "import sys; assert sys.environment_was_here"
    subprocess.run([sys.executable, "-c", check], env={**os.environ, "PYTHONPATH": path}, check=True)
