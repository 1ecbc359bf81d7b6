"""GPUs: who sees one, what is said where there is none, and float32 that is float32."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from pydantic import ValidationError

from pipeline import codebook
from pipeline.build import build
from pipeline.config import BuildConfig, RunConfig
from pipeline.networks.device import compute_type
from pipeline.session import actor_options, check_room
from pipeline.stage import Resources
from shards.errors import UserError
from tests.conftest import cluster, small_build


def test_float32_is_not_rounded_to_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert compute_type("float32") is torch.float32
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert compute_type("bfloat16") is torch.bfloat16


def test_workers_without_a_gpu_see_none_whatever_the_environment() -> None:
    class Look:
        def gpus(self) -> str | None:
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    gpu: Any = {"env_vars": {"CUDA_VISIBLE_DEVICES": "0"}}
    ray.init(address=cluster(), runtime_env=gpu, log_to_driver=False)
    try:
        worker: Any = ray.remote(Look).options(**actor_options(Resources(cpus=1, gpus=0))).remote()
        assert ray.get(worker.gpus.remote()) == ""
    finally:
        ray.shutdown()
    given = actor_options(Resources(cpus=1, gpus=0.5))
    assert given["num_gpus"] == 0.5
    assert "CUDA_VISIBLE_DEVICES" not in given["runtime_env"]["env_vars"]  # Ray says which one it is


@pytest.mark.parametrize(("share", "kind"), [(0.0, "cpu"), (0.5, "cuda")])
def test_a_fit_of_centroids_follows_the_settings(share: float, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked: list[torch.device] = []

    def refuse(*args: Any) -> None:
        asked.append(args[4])
        raise UserError("enough")

    monkeypatch.setattr(codebook, "make_encoder", refuse)
    clip: Any = (SimpleNamespace(task=SimpleNamespace(shard="train-0")), "key")
    nowhere: Any = None
    with pytest.raises(UserError, match="enough"):
        next(codebook._features(nowhere, [clip], {}, BuildConfig(run=RunConfig(gpus=share)), nowhere))
    assert [device.type for device in asked] == [kind]


def test_a_gpu_that_the_cluster_lacks_is_said_before_anything_runs(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^run\.gpus = 0\.25, but the cluster has no GPU; run\.gpus=0 keeps networks on"
    ):
        build(str(corpus), str(tmp_path / "ds"), small_build(run={"ray_address": cluster(), "gpus": 0.25}))
    assert not [*tmp_path.rglob("*.tar")]


def test_a_worker_needs_one_machine_that_has_all_it_asks_for() -> None:
    small, large, bare = {"CPU": 2.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}
    for order in itertools.permutations([small, large, bare]):
        check_room([Resources(1, 0), Resources(1, 0.5), Resources(1, 2)], order)
    for gpus, machines, words in (
        (2, [small, small], r"run\.gpus = 2, but no machine of the cluster has more than 1;"),
        (0.5, [bare], r"run\.gpus = 0\.5, but the cluster has no GPU"),
        (0, [{"GPU": 1.0}], "needs 1 processor, but no machine of the cluster has more than 0"),
        (0.5, [{"GPU": 1.0}, bare], r"1 processor and 0\.5 GPU \(run\.gpus\), but no machine has both"),
    ):
        with pytest.raises(UserError, match=words):
            check_room([Resources(1, gpus)], machines)


@pytest.mark.parametrize("gpus", [0, 0.25, 1, 2])
def test_a_worker_gets_a_share_of_a_gpu_or_whole_ones(gpus: float) -> None:
    assert RunConfig(gpus=gpus).gpus == gpus
    with pytest.raises(ValidationError, match="whole number of GPUs"):
        RunConfig(gpus=gpus + 1.5)
