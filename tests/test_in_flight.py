"""What a worker leaves when a clip ends it: which clips it had in hand, why, and where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.in_flight import Notes, read_notes

WORKER = """
import ctypes, os, sys, time
from pipeline.in_flight import Hand

def ruin(how):
    if how == "segfault":
        ctypes.string_at(0)
    while how == "hang":  # native code that keeps Python's lock
        ctypes.PyDLL(None).sleep(1)
    held = []
    while how == "memory":
        held.append(b"1" * (16 << 20))
        time.sleep(0.02)
    os.kill(os.getpid(), 9)

hand = Hand(timeout=1.0, memory=0.4e9)
print(hand.path, flush=True)
with hand.task("speech", "train-000000", 5):
    for place in range(3):
        hand.take(place)
        time.sleep(0.4)  # all three together take longer than one may
    hand.put(0, None)
    hand.put(1, "silent")
    hand.take(4)
    ruin(sys.argv[1])
"""


def death(how: str, folder: Path) -> Notes:
    """Notes of a process that came to its end in this way."""
    script = folder / "pipeline" / "worker.py"
    script.parent.mkdir()
    script.write_text(WORKER)
    process = subprocess.run(
        [sys.executable, str(script), how],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=60,
    )
    assert process.returncode != 0, process.stderr
    notes = read_notes(process.stdout.split()[0])
    assert not [*folder.rglob("*.notes"), *folder.rglob("*.fault")]
    return notes


@pytest.mark.parametrize(
    ("how", "why", "word"),
    [("segfault", "crash", "Segmentation fault"), ("hang", "hang", "Timeout"), ("memory", "memory", "run.memory_gb")],
)
def test_the_notes_of_a_dead_process_say_what_it_was_at(how: str, why: str, word: str, tmp_path: Path) -> None:
    notes = death(how, tmp_path)
    assert notes.why == why
    assert notes.in_hand == (2, 4)
    assert word in notes.fault
    assert "in ruin" in notes.fault
    assert notes.task == "speech train-000000"
    if how == "memory":
        assert notes.rss > 0.4e9


def test_a_process_that_was_killed_leaves_no_last_words(tmp_path: Path) -> None:
    notes = death("kill", tmp_path)
    assert (notes.why, notes.fault, notes.in_hand) == (None, "", (2, 4))
