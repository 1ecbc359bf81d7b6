"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def clips() -> Path:
    """Folder of real talking-face clips: `F2V_CLIPS`, or `../shared/clips` beside the checkout."""
    folder = Path(os.environ.get("F2V_CLIPS", ROOT.parent / "shared" / "clips"))
    if not (folder / "MANIFEST.csv").is_file():
        pytest.skip(f"no real clips in {folder}: set F2V_CLIPS to a folder with MANIFEST.csv")
    return folder
