"""What this process uses of its machine, from the operating system alone."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache

GPU_EVERY = 2.0
"""Seconds that an answer of nvidia-smi is good for: asking takes a process of its own."""


@dataclass(frozen=True)
class Usage:
    """Of this process: `rss` bytes held in memory now, `peak` the most so far, `cpu` processor seconds of all its
    threads so far."""

    rss: int
    cpu: float
    peak: int


def usage() -> Usage:
    """Memory and processor time of this process."""
    rss, peak = _memory()
    return Usage(rss, time.process_time(), peak)


def gpu_share() -> float | None:
    """How much of the time the GPU of this process is busy now, by whomever, 0 to 1; None where there is none or
    nvidia-smi does not say (slices of a GPU have no figure of their own)."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if seen == "" else _ask((seen or "0").split(",")[0], int(time.monotonic() / GPU_EVERY))


def _memory() -> tuple[int, int]:
    """Bytes now, and the most so far."""
    try:
        with open("/proc/self/status", "rb", buffering=0) as stream:
            said = stream.read(1 << 13)
        rss, peak = (int(said[said.index(name) + len(name) :].split(maxsplit=1)[0]) for name in (b"VmRSS:", b"VmHWM:"))
        return rss << 10, peak << 10
    except (OSError, ValueError):
        # Other systems tell the most alone; macOS counts bytes, the BSDs kilobytes.
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = most if sys.platform == "darwin" else most << 10
        return peak, peak


@lru_cache(maxsize=1)
def _ask(device: str, _moment: int) -> float | None:
    """Share of time that a GPU is busy, by its number or UUID; asked once per moment."""
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        return float(said.strip()) / 100
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
