"""`f2v build --json` in a process of its own, whose events are read as they come."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

POISON = Path(__file__).resolve().parent.parent / "tests" / "poison"
"""Its sitecustomize changes stages as the file in F2V_STAGES says."""


def stage_env(plan: Path) -> dict[str, str]:
    """Environment for a node or a driver whose workers change their stages as the file `plan` says."""
    paths = [str(POISON), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"F2V_STAGES": str(plan.absolute()), "PYTHONPATH": os.pathsep.join(paths)}


@dataclass(frozen=True)
class Ended:
    """How a build ended.

    Attributes:
        begin, end: Unix time of the process's start and end.
        events: JSON events, each with `at`, its Unix time.
        listed: Unix time when the media of the source had been read.
        said: other lines on standard error.
        peak: most bytes that the driver held.
    """

    status: int
    begin: float
    end: float
    summary: dict[str, Any]
    events: list[dict[str, Any]]
    listed: float
    said: str
    peak: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def of(self, event: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [one for one in self.events if one["event"] == event]


class WatchedBuild:
    """A build that runs.

    Args:
        settings: as `--set` takes them.
        options: further words of the command.
        env: on top of this process's environment.
        profile: where cProfile is to put what the driver did.
    """

    def __init__(
        self,
        source: Path,
        dataset: Path,
        settings: Sequence[str] = (),
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        profile: Path | None = None,
    ) -> None:
        profiler = ["-m", "cProfile", "-o", str(profile)] if profile else []
        command = [sys.executable, *profiler, "-m", "cli.main", "build", str(source), str(dataset), "--json", *options]
        command += [word for setting in settings for word in ("--set", setting)]
        self._events: list[dict[str, Any]] = []
        self._said: list[str] = []
        self._output: list[str] = []
        self._peak = 0
        self._begin = self._listed = time.time()
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._threads = [threading.Thread(target=work) for work in (self._listen, self._read, self._weigh)]
        for thread in self._threads:
            thread.start()

    def count(self, event: str) -> int:
        """Events of this kind so far."""
        return sum(one["event"] == event for one in self._events)

    def wait(self, event: str, count: int, timeout: float = 600) -> bool:
        """Wait for so many events of a kind; False where the build ended, or took longer, without them."""
        last = time.monotonic() + timeout
        while self.count(event) < count:
            if self.process.poll() is not None or time.monotonic() > last:
                return False
            time.sleep(0.05)
        return True

    def finish(self, timeout: float = 600) -> Ended:
        """Wait for its end; one that takes longer is killed, with status -9."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._said.append(f"still running after {timeout:.0f} s")
        finally:
            end = time.time()
            self.process.kill()
            self.process.wait()
        for thread in self._threads:
            thread.join()
        summary = json.loads(self._output[-1]) if self._output and self.process.returncode == 0 else {}
        said = "".join(self._said)
        return Ended(self.process.returncode, self._begin, end, summary, self._events, self._listed, said, self._peak)

    def _listen(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            if line.startswith('{"event"'):
                event = json.loads(line)
                self._events.append({**event, "at": _unix(event["time"])})
            else:
                self._said.append(line)
                if line.startswith("read source"):
                    self._listed = time.time()

    def _read(self) -> None:
        assert self.process.stdout
        self._output += list(self.process.stdout)

    def _weigh(self) -> None:
        status = Path("/proc", str(self.process.pid), "status")
        while self.process.poll() is None:
            with contextlib.suppress(OSError, StopIteration, ValueError):
                line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
                self._peak = int(line.split()[1]) << 10
            time.sleep(0.2)


def _unix(stamp: str) -> float:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
