"""A Ray cluster of several nodes on this machine, whose nodes can be lost.

The head has no processors, so it runs no work, as on a real cluster. Every node is a raylet with its agents and
workers, under an address of its own in the loopback network, and is found by a mark in its processes' environment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.seaweed import free_ports

MARK = "F2V_TEST_RUN"
"""In the environment of a node's processes: <run>/<name of the node>."""
AT_WORK = "ray::Worker.run"
"""In the command line of a worker that has a task."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_AUTH_MODE": "disabled",
    # A lost node is noticed within two seconds.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
STORE_BYTES = 80 << 20
HEAD = "127.0.0.2"
"""Ray takes 127.0.0.1 for a word for the machine's address outside; the rest of 127.0.0.0/8 stays what it is."""


@dataclass(frozen=True)
class Size:
    """What a node says that it has; a GPU need not be there. `memory`: bytes, 0 for what Ray finds."""

    cpus: int = 1
    gpus: int = 0
    memory: int = 0


def marked(mark: str, word: str = "") -> list[int]:
    """Processes whose environment has the variable MARK begin with `mark`, and their children (whoever gives itself a
    title may write over its environment), as far as their command lines have `word`."""
    ours: set[int] = set()
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(OSError):
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if pid != os.getpid() and b"\0" + f"{MARK}={mark}".encode() in b"\0" + (folder / "environ").read_bytes():
                ours.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sorted(pid for pid in ours if word in _line(pid))


def _line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def end(mark: str) -> None:
    """SIGKILL to all processes with this mark, and to those that they started meanwhile."""
    while found := [pid for pid in marked(mark) if _line(pid)]:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


class Cluster:
    """A head without processors, and the nodes that are added; use as a context manager.

    Args:
        sizes: of the nodes to begin with.
        env: further environment of all nodes, and so of their workers.

    Attributes:
        address: what `run.ray_address` is to be.
        nodes: names of the nodes that are up, besides the head.
    """

    def __init__(self, sizes: Sequence[Size] = (Size(), Size()), env: Mapping[str, str] | None = None) -> None:
        self._sizes, self._env = sizes, {**os.environ, **SETTINGS, **(env or {})}
        self._folder = Path(tempfile.mkdtemp(prefix="f2v"))  # short: the path of a socket has room for 107 characters
        self._mark = self._folder.name
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._count = 0
        self.address = f"{HEAD}:{free_ports(1)[0]}"
        self.nodes: list[str] = []

    def __enter__(self) -> Cluster:
        try:
            head = ["--head", f"--port={self.address.rpartition(':')[2]}", "--num-cpus=0", "--include-dashboard=false"]
            self._start("head", HEAD, head)
            self._wait("head")
            self.add(*self._sizes)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, *sizes: Size) -> list[str]:
        """Start nodes and wait until they are up; returns their names."""
        names = []
        for size in sizes:
            self._count += 1
            names.append(f"node{self._count}")
            options = [f"--address={self.address}", f"--num-cpus={size.cpus}", f"--num-gpus={size.gpus}"]
            options += [f"--memory={size.memory}"] if size.memory else []
            self._start(names[-1], f"127.0.0.{self._count + 2}", options)
        for name in names:
            self._wait(name)
        self.nodes += names
        return names

    def processes(self, node: str = "", word: str = "") -> list[int]:
        """Processes of a node, or of all, whose command line has `word`."""
        return marked(f"{self._mark}/{node}" + ("\0" if node else ""), word)

    def kill_worker(self, patience: float = 10) -> bool:
        """SIGKILL to a worker that has a task; False where none has one for `patience` seconds."""
        last = time.monotonic() + patience
        while time.monotonic() < last:
            for pid in self.processes(word=AT_WORK)[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)  # so that the task does not end between a look and the blow
                    at_work = AT_WORK in _line(pid)
                    os.kill(pid, signal.SIGKILL if at_work else signal.SIGCONT)
                    if at_work:
                        return True
            time.sleep(0.02)
        return False

    def lose(self, node: str, word: str = "", patience: float = 30) -> bool:
        """End a node as a power cut does: all its processes, none of which can say anything. As for `freeze`, once the
        command line of one of them has `word`."""
        if not self.freeze(node, word, patience):  # so that none sees another one's end
            return False
        self._signal(node, signal.SIGKILL)
        end(f"{self._mark}/{node}\0")
        return True

    def freeze(self, node: str, word: str = "", patience: float = 30) -> bool:
        """Let a node stand still, as one that the network has lost: it does not answer, and knows nothing of it.

        Returns:
            False where the command line of none of its processes had `word` for `patience` seconds: it goes on.
        """
        last = time.monotonic() + patience
        while time.monotonic() < last:
            if self.processes(node, word):
                self._signal(node, signal.SIGSTOP)
                if self.processes(node, word):
                    self.nodes.remove(node)
                    return True
                self._signal(node, signal.SIGCONT)
            time.sleep(0.02)
        return False

    def thaw(self, node: str) -> None:
        """Let a node that stood still go on."""
        self._signal(node, signal.SIGCONT)

    def _signal(self, node: str, number: int) -> None:
        for pid in self.processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """End all nodes and remove their files."""
        end(f"{self._mark}/")
        for process in self._processes.values():
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, name: str, ip: str, options: list[str]) -> None:
        listen, grpc, metrics, client = free_ports(4)
        ray = str(Path(sys.executable).parent / "ray")
        command = [ray, "start", "--block", "--disable-usage-stats", "--log-color=false", f"--node-ip-address={ip}"]
        command += [f"--object-store-memory={STORE_BYTES}", f"--dashboard-agent-listen-port={listen}"]
        command += [f"--dashboard-agent-grpc-port={grpc}", f"--metrics-export-port={metrics}"]
        command += [f"--ray-client-server-port={client}"] if "--head" in options else []
        # A folder each: nodes that start at the same time in one give their sockets the same name.
        command += [f"--temp-dir={self._folder / name}"]
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [*command, *options],
                env={**self._env, MARK: f"{self._mark}/{name}"},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _wait(self, name: str, seconds: float = 90) -> None:
        log, last = self._folder / f"{name}.log", time.monotonic() + seconds
        while "Ray runtime started" not in (said := log.read_text(errors="replace")):
            if time.monotonic() > last or self._processes[name].poll() is not None:
                raise RuntimeError(f"ray did not start {name}:\n{said}")
            time.sleep(0.1)
