"""Shared fixtures."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import pytest

import cli.main  # noqa: F401 - sets OpenMP's waiting before torch is loaded
from pipeline.build import Summary, build
from pipeline.config import BuildConfig
from pipeline.synthetic.corpus import write_corpus, write_faulty
from shards.config import load_config
from shards.dataset import Dataset
from tests.buckets import outside, proxy  # noqa: F401
from tests.seaweed import free_ports, s3_server, s3_uri  # noqa: F401
from tests.streams import toy_folder  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def clips() -> Path:
    """Folder of real talking-face clips: `F2V_CLIPS`, or `../shared/clips` beside the checkout."""
    folder = Path(os.environ.get("F2V_CLIPS", ROOT.parent / "shared" / "clips"))
    if not (folder / "MANIFEST.csv").is_file():
        pytest.skip(f"no real clips in {folder}: set F2V_CLIPS to a folder with MANIFEST.csv")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve synthetic talking faces (two voices) and six faulty files."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, clips=12, voices=2, seed=1)
    write_faulty(folder / "faulty")
    return folder


@lru_cache
def cluster() -> str:
    """Address of one Ray for all builds in this process: starting one takes longer than most of them."""
    port = free_ports(1)[0]
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += ["--object-store-memory=268435456", "--include-dashboard=false", "--disable-usage-stats"]
    # Ray tries its usual port for seconds where another Ray has it, and that of a test with its own would wait so too.
    command += [f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        command, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, start_new_session=True, **quiet
    )

    def stop() -> None:
        process.terminate()
        process.wait()

    atexit.register(stop)
    for _ in range(600):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return f"127.0.0.1:{port}"
        time.sleep(0.1)
    raise RuntimeError("ray did not start")


def small_build(**sections: object) -> BuildConfig:
    """Configuration of a build that fits a test: small shards, few units, a Ray that runs already."""
    base = {"pack": {"shard_clips": 6}, "speech": {"clusters": 20}}
    run = {} if "run" in sections else {"run": {"ray_address": cluster()}}
    return load_config(BuildConfig, base={**base, **run, **sections})


@pytest.fixture(scope="session")
def built(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Summary]:
    """The corpus as a dataset."""
    folder = tmp_path_factory.mktemp("dataset")
    return Dataset(str(folder)), build(str(corpus), str(folder), small_build())
