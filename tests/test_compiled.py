"""The store of compiled loops: processes that start at the same time on a new machine all get a sound one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import numpy as np
from pipeline.stages.pitch import Pitch, PitchConfig, track_pitch
Pitch(PitchConfig()).setup()
tone = np.sin(np.arange(16000) * (2 * np.pi * 200 / 16000)).astype(np.float32)
print(round(float(np.nanmedian(track_pitch(tone, 65, 600)))))
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


def test_a_home_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "200"
