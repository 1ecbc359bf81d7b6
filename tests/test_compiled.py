"""The store of compiled loops: processes that start at the same time on a new machine all get a sound one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.compiled import _store_name

CODE = """
import numpy as np
from pipeline.stages.pitch import Pitch, PitchConfig, track_pitch
Pitch(PitchConfig()).setup()
from pipeline import pyin_loops
loops = [loop for loop in vars(pyin_loops).values() if hasattr(loop, "signatures")]
known = [list(loop.signatures) for loop in loops]
tone = np.sin(np.arange(65 * 320) * (2 * np.pi * 200 / 16000)).astype(np.float32)
for clip in (tone[:320], 0 * tone, tone):
    pitch = track_pitch(clip, 65, 600)
# What setup did not compile would be written into a store that others read.
assert [list(loop.signatures) for loop in loops] == known and any(known)
print(round(float(np.nanmedian(pitch))))
"""


def test_workers_that_start_together_share_one_store(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)

    def together() -> list[str]:
        pipes = {"stdout": subprocess.PIPE, "text": True, "env": environment}
        started = [subprocess.Popen([sys.executable, "-c", CODE], **pipes) for _ in range(3)]  # type: ignore[call-overload]
        return [process.communicate(timeout=120)[0].strip() for process in started]

    assert together() == ["200"] * 3
    stores = [path for path in (tmp_path / "faces2voices").iterdir() if path.is_dir()]
    assert len(stores) == 1
    assert "partial" not in stores[0].name
    before = {path: path.stat().st_mtime_ns for path in stores[0].rglob("*")}
    assert before
    assert together() == ["200"] * 3
    assert {path: path.stat().st_mtime_ns for path in stores[0].rglob("*")} == before  # read, never written again


def test_loops_that_changed_get_a_store_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "loops_of_a_test.py"
    source.write_text("a = 1")
    os.utime(source, ns=(10**18, 10**18))

    def name() -> str:
        return _store_name("fill", ["loops_of_a_test"])

    first = name()
    assert name() == first
    source.write_text("a = 2")
    os.utime(source, ns=(10**18, 10**18))
    assert name() != first  # other bytes, same time and size
    source.write_text("a = 1")
    os.utime(source, ns=(10**18, 10**18 + 10**9))
    assert name() != first  # a later time alone makes numba compile again
    assert _store_name("fill otherwise", ["loops_of_a_test"]) != name()


def test_a_failed_filling_is_one_line_and_leaves_no_store(tmp_path: Path) -> None:
    code = "from pipeline.compiled import use_compiled_loops; use_compiled_loops('raise OSError(28, \"no room\")', [])"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("shards.errors.UserError: compiled loops")
    assert done.stderr.splitlines()[-1].endswith("no room")
    assert not [path for path in (tmp_path / "faces2voices").iterdir() if path.is_dir()]


def test_a_home_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "200"
