"""Which clips a worker has in hand, kept in files that outlive the process: whoever looks into its death reads them.

A clip can end the process that works on it (a crash in native code, a loop without end, more memory than there is), and
then nothing in that process is left to say which it was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import struct
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline import metrics
from pipeline.usage import usage

_HEAD = struct.Struct("<QH")
"""Bytes that the process holds, and the length of the task's name; the name follows, and a byte for each clip."""
_WAITING, _IN_HAND, _DONE = range(3)
_EVERY = 0.5
"""Seconds between looks at memory."""
_PREPARATION = 1800.0
"""Seconds within which networks are loaded, or a shard is packed or sent."""
_STALE = 3600.0
"""Seconds after which notes of a process that is gone may go, whether or not anybody read them."""
_WORKER = str(Path("pipeline", "worker.py"))
_TEXT = 6000
"""Characters kept of a traceback."""


@dataclass(frozen=True)
class Notes:
    """What is known of a process that died.

    Attributes:
        task: stage and shard that it was at; empty between tasks.
        in_hand: places, in the task's list of clips, of those that it had taken and not finished.
        rss: bytes that the process held.
        fault: what it left as last words, with the traceback; empty where it was killed.
    """

    task: str
    in_hand: tuple[int, ...]
    rss: int
    fault: str

    @property
    def why(self) -> str | None:
        """`hang`, `memory` or `crash`, as the process itself saw it; None where it saw nothing coming."""
        if self.fault.startswith("Timeout"):
            return "hang"
        if self.fault.startswith("Memory"):
            return "memory"
        return "crash" if self.fault.startswith("Fatal") else None


class Watch(Protocol):
    """Is told what a process is at, and ends it where it does not come on."""

    def take(self, place: int) -> None:
        """The clip at `place` of the task's list is worked on from now on."""

    def put(self, place: int, reason: str | None) -> None:
        """It is done, or refused for a reason."""

    def prepare(self) -> None:
        """Networks are loaded, or files read and written, which may take longer than a clip."""

    def rest(self) -> None:
        """Time does not count."""


class Hand:
    """Notes of this process, for one task at a time. A `Watch`.

    Ends the process where a clip takes longer than `timeout` seconds, even inside native code that holds Python's lock,
    or the process more than `memory` bytes.
    """

    def __init__(self, timeout: float, memory: float) -> None:
        self._timeout, self._memory = timeout, memory
        _sweep()
        # Containers may share the folder and have the same process numbers.
        self.path = _folder() / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.notes"
        self._file = open(self.path, "w+b")  # noqa: SIM115  # open as long as the process lives
        self._words = open(self.path.with_suffix(".fault"), "w", encoding="utf-8")  # noqa: SIM115
        self._map: mmap.mmap | None = None
        self._clips = _HEAD.size
        self.changed = self._last = time.monotonic()
        self._clear()
        faulthandler.enable(self._words, all_threads=False)
        threading.Thread(target=self._watch_memory, daemon=True).start()

    @contextlib.contextmanager
    def task(self, stage: str, shard: str, clips: int) -> Iterator[None]:
        """A task over so many clips.

        Raises:
            OSError: no room for the notes.
        """
        name = f"{stage} {shard}".encode()
        self._clips = _HEAD.size + len(name)
        size = self._clips + clips
        self._file.truncate(0)
        # Room is taken now: a page that cannot be had later would end the process without a word.
        os.posix_fallocate(self._file.fileno(), 0, size)
        self._map = mmap.mmap(self._file.fileno(), size)
        self._clear()
        _HEAD.pack_into(self._map, 0, usage().rss, len(name))
        self._map[_HEAD.size : self._clips] = name
        self.stage, self.shard, self.total = stage, shard, clips
        self.prepare()
        try:
            yield
        finally:
            self.rest()
            closed, self._map = self._map, None
            closed.close()
            self._file.truncate(0)
            self._clear()

    def take(self, place: int) -> None:
        """The clip at `place` of the task's list is worked on from now on."""
        self._mark(place, _IN_HAND)

    def put(self, place: int, reason: str | None) -> None:
        """It is done, or refused for a reason."""
        metrics.clip(self.stage, time.monotonic() - self._last, reason)
        self._last = time.monotonic()
        self.done += 1
        self.refused += reason is not None
        self._mark(place, _DONE)

    def beat(self) -> None:
        """A sign of life: the time that is allowed begins anew."""
        self._watch(self._timeout)

    def prepare(self) -> None:
        """Networks are loaded, or files read and written, which may take longer than a clip."""
        self._watch(max(self._timeout, _PREPARATION))

    def rest(self) -> None:
        """Time does not count."""
        faulthandler.cancel_dump_traceback_later()

    def _clear(self) -> None:
        self.stage = self.shard = ""
        self.done = self.total = self.refused = 0
        self.changed = time.monotonic()
        self._last = self.changed

    def _watch(self, seconds: float) -> None:
        self.changed = time.monotonic()
        # C code with a thread of its own, which needs no lock of Python's.
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._words)

    def _mark(self, place: int, state: int) -> None:
        if self._map is not None:
            self._map[self._clips + place] = state
        self.beat()

    def _watch_memory(self) -> None:
        while True:
            time.sleep(_EVERY)
            held = usage().rss
            notes = self._map
            with contextlib.suppress(ValueError):  # closed meanwhile
                if notes is not None:
                    struct.pack_into("<Q", notes, 0, held)
            if held > self._memory and notes is not None:
                self._words.write(f"Memory: {held / 1e9:.1f} GB, more than run.memory_gb = {self._memory / 1e9:g}\n")
                self._words.flush()
                faulthandler.dump_traceback(self._words)
                os._exit(1)


def read_notes(path: str) -> Notes:
    """The notes that a process on this machine left, and remove them.

    Raises:
        FileNotFoundError: there are none.
    """
    notes = Path(path)
    data = notes.read_bytes()
    words = notes.with_suffix(".fault")
    fault = words.read_text(encoding="utf-8", errors="replace") if words.exists() else ""
    _remove(notes)
    if len(data) < _HEAD.size:
        return Notes("", (), 0, _own_thread(fault))
    rss, length = _HEAD.unpack_from(data)
    name, states = data[_HEAD.size : _HEAD.size + length], data[_HEAD.size + length :]
    in_hand = tuple(place for place, state in enumerate(states) if state == _IN_HAND)
    return Notes(name.decode(), in_hand, rss, _own_thread(fault))


def _own_thread(fault: str) -> str:
    """Last words without the threads that only wait: the heading, and the thread in which the stage was at work."""
    head, *threads = fault.split("\n\n") if "Fatal" in fault[:5] else _split_threads(fault)
    working = [thread for thread in threads if _WORKER in thread] or threads[:1]
    return "\n".join([head, *working])[:_TEXT]


def _split_threads(fault: str) -> Sequence[str]:
    head, _, rest = fault.partition("\n")
    return [head, *(thread for thread in rest.split("\n\n") if thread)]


def _folder() -> Path:
    """Where the notes of all workers of this user on this machine lie."""
    folder = Path(tempfile.gettempdir(), f"f2v-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _sweep() -> None:
    """Remove what processes left that ended in peace or that nobody asked about."""
    if not Path("/proc/self").exists():
        return
    for notes in _folder().glob("*.notes"):
        with contextlib.suppress(OSError):
            old = time.time() - notes.stat().st_mtime > _STALE
            if old and not Path("/proc", notes.stem.partition("-")[0]).exists():
                _remove(notes)


def _remove(notes: Path) -> None:
    for path in (notes, notes.with_suffix(".fault")):
        path.unlink(missing_ok=True)
