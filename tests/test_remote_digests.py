"""Digests of media that machines of a cluster read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import digests, work
from pipeline.config import BuildConfig, RunConfig
from pipeline.digests import Facts, Files
from pipeline.sources import SourceConfig, list_clips
from pipeline.work import Site
from tests.conftest import cluster


def no_files(files: Files) -> Iterator[tuple[str, Facts]]:
    assert not files
    return iter(())


def test_a_cluster_reads_many_media_and_the_process_that_asks_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {f"clip{number:03}": os.urandom(2000 + number) for number in range(70)}
    for name, data in words.items():
        (tmp_path / f"{name}.mp4").write_bytes(data)
    # Pickled by name, so only this process cannot read.
    monkeypatch.setattr(digests, "_facts", lambda *file: pytest.fail("read here"))
    monkeypatch.setattr(work, "LITTLE", 1000)
    monkeypatch.setattr(work, "read_here", lambda files: pytest.fail("read here"))
    config = BuildConfig(run=RunConfig(ray_address=cluster()))
    with Site(str(tmp_path / "ds")) as site:
        found = list_clips(str(tmp_path), SourceConfig(), None, site.reader(config))
        assert {clip.key: clip.digest for clip in found.clips} == {
            name: hashlib.sha256(data).hexdigest() for name, data in words.items()
        }
        assert {clip.bytes for clip in found.clips} == {len(data) for data in words.values()}
        # What is known is not read again, by whomever.
        known = digests.known_digests(found.clips)
        again = list_clips(str(tmp_path), SourceConfig(), known, no_files)
    assert again.clips == found.clips


def test_without_a_cluster_media_are_read_here() -> None:
    assert Site("nowhere").reader(BuildConfig()) is None
