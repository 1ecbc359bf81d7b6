"""Figures for Prometheus, the dashboard that shows them, and what a process says of itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import metrics, usage
from tests.seaweed import free_ports

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_count", "_sum")}
"""What Ray's export puts after a name."""
EXPORTED = {f"ray_{name}{suffix}" for name, (kind, _, _) in metrics.METRICS.items() for suffix in SUFFIXES[kind]}


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads((ROOT / "deploy" / "grafana.json").read_text(encoding="utf-8"))


def expressions(dashboard: Any) -> Iterator[str]:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def test_the_dashboard_asks_for_figures_that_exist(dashboard: Any) -> None:
    asked = set(re.findall(r"\b\w*f2v_\w+", " ".join(expressions(dashboard))))
    assert asked <= EXPORTED, asked - EXPORTED
    counters = {f"ray_{name}" for name in metrics.METRICS}
    assert {re.sub("_(total|bucket)$", "", name) for name in asked} == counters, "a figure that no panel shows"


def test_the_dashboard_groups_by_tags_that_the_figures_have(dashboard: Any) -> None:
    for expression in expressions(dashboard):
        for tags, rest in re.findall(r"by \(([\w, ]+)\) \((.*?)\)", expression):
            (name,) = set(re.findall(r"ray_(f2v_\w+?)(?:_total|_bucket)?\{", rest))
            assert set(tags.split(", ")) <= {*metrics.METRICS[name][1], "le"}, expression


def test_the_dashboard_can_be_imported_anywhere(dashboard: Any) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    names = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert names["datasource"]["type"] == "datasource"
    sources = [panel["datasource"] for panel in panels] + [names["session"]["datasource"]]
    sources += [target["datasource"] for panel in panels for target in panel["targets"]]
    assert {source["uid"] for source in sources} == {"${datasource}"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        places = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not places & taken
        assert at["x"] + at["w"] <= 24
        taken |= places


def test_the_documentation_names_every_figure() -> None:
    text = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `ray_(f2v_\w+?)(?:_total)?` \| ([^|]*) \|", text, re.MULTILINE))
    assert set(rows) == set(metrics.METRICS)
    for name, (_, tags, _) in metrics.METRICS.items():
        assert tuple(re.findall(r"`(\w+)`", rows[name])) == tags, name


def test_nothing_is_counted_without_ray() -> None:
    code = (
        "import sys; from pipeline import metrics; from pipeline.cost import Cost\n"
        "metrics.clip('mel', 0.1, None); metrics.clip('mel', 0.1, 'silent'); metrics.lost('node')\n"
        "metrics.task('mel', Cost(1.0, 1.0, 0.0, 1, 1, 1, '', '', 1, 0)); metrics.workers(2)\n"
        "metrics.waiting('mel', 1); metrics.running('mel', 1); metrics.node_lost('cpu')\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_a_process_uses() -> None:
    before = usage.usage()
    held = np.ones(60 << 20, np.uint8)
    begin = time.process_time()
    while time.process_time() < begin + 0.05:
        held.sum()
    after = usage.usage()
    assert 55 << 20 < after.rss - before.rss < 80 << 20
    assert after.peak >= after.rss
    assert 0.05 <= after.cpu - before.cpu < 2
    del held
    assert usage.usage().peak > after.rss - (5 << 20)


def test_the_share_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/asked\necho 37\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-12ab,GPU-34cd")
    moment = [100.0]
    monkeypatch.setattr("pipeline.usage.time.monotonic", lambda: moment[0])
    usage._ask.cache_clear()
    assert [usage.gpu_share() for _ in range(3)] == [0.37] * 3
    moment[0] += 2
    assert usage.gpu_share() == 0.37
    assert (tmp_path / "asked").read_text().split() == ["--id=GPU-12ab"] * 2  # every two seconds at most
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert usage.gpu_share() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho '[N/A]'\n")
    usage._ask.cache_clear()
    assert usage.gpu_share() is None
    tool.unlink()
    usage._ask.cache_clear()
    assert usage.gpu_share() is None


@pytest.mark.nightly
def test_ray_exports_the_figures(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    code = f"""
import os, time
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_UV_RUN_RUNTIME_ENV="0", RAY_AUTH_MODE="disabled")
import ray
ray.init(address="local", num_cpus=1, object_store_memory=80 << 20, include_dashboard=False,
         _metrics_export_port={port})

@ray.remote
class Worker:
    def work(self):
        from pipeline import metrics
        from pipeline.cost import Cost
        for number in range(5):
            metrics.clip("mel", 0.2, "silent" if number == 4 else None)
        metrics.task("mel", Cost(2.0, 1.5, 0.25, 100, 300, 1, "h", "n", 4, 1))

from pipeline import metrics
worker = Worker.remote()
ray.get(worker.work.remote())
metrics.lost("crash"), metrics.node_lost("cpu"), metrics.waiting("mel", 3), metrics.running("mel", 1)
metrics.workers(1)
time.sleep(25)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        found: dict[str, float] = {}
        end = time.monotonic() + 60
        while len(found) < len(EXPORTED) + len(metrics.SECONDS) and time.monotonic() < end and process.poll() is None:
            time.sleep(1)
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            except OSError:
                continue
            samples = re.findall(r"^(ray_f2v_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
            found = {name + "".join(re.findall('le="[^"]+"', tags)): float(value) for name, tags, value in samples}
    finally:
        process.terminate()
        process.wait(30)
    assert {re.sub("le=.*", "", name) for name in found} == EXPORTED
    assert (found["ray_f2v_clips_total"], found["ray_f2v_quarantined_total"]) == (4, 1)
    assert (found["ray_f2v_clip_seconds_count"], found["ray_f2v_clip_seconds_sum"]) == (5, pytest.approx(1))
    assert (found['ray_f2v_clip_seconds_bucketle="0.1"'], found['ray_f2v_clip_seconds_bucketle="0.3"']) == (0, 5)
    assert (found["ray_f2v_task_seconds_total"], found["ray_f2v_written_bytes_total"]) == (2, 300)
    assert (found["ray_f2v_waiting"], found["ray_f2v_nodes_lost_total"]) == (3, 1)
