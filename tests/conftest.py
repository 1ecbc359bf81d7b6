"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cli.main  # noqa: F401 - sets OpenMP's waiting before torch is loaded
from pipeline.build import Summary, build
from pipeline.config import BuildConfig
from pipeline.synthetic.corpus import write_corpus, write_faulty
from shards.config import load_config
from shards.dataset import Dataset
from tests.buckets import outside, proxy  # noqa: F401
from tests.seaweed import s3_server, s3_uri  # noqa: F401

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


def small_build(**sections: object) -> BuildConfig:
    """Configuration of a build that fits a test: small shards, few units."""
    base = {"pack": {"shard_clips": 6}, "speech": {"clusters": 20}, "run": {"cpus": 2}}
    return load_config(BuildConfig, base={**base, **sections})


@pytest.fixture(scope="session")
def built(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Summary]:
    """The corpus as a dataset."""
    folder = tmp_path_factory.mktemp("dataset")
    return Dataset(str(folder)), build(str(corpus), str(folder), small_build())
