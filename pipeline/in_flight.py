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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import metrics
from pipeline.usage import usage

_HEAD = struct.Struct("<ddQ")
"""Unix times of the task's begin and of the last sign of life, and bytes that the process holds."""
_WAITING, _IN_HAND, _DONE = range(3)
_EVERY = 0.5
"""Seconds between looks at memory."""
_PREPARATION = 1800.0
"""Seconds within which networks are loaded."""
_STALE = 3600.0
"""Seconds after which notes of a process that is gone may go, whether or not anybody read them."""
_WORKER = str(Path("pipeline", "worker.py"))
_TEXT = 6000
"""Characters kept of a traceback."""


@dataclass(frozen=True)
class Notes:
    """What is known of a process that died.

    Attributes:
        in_hand: places, in the task's list of clips, of those that it had taken and not finished.
        seconds: that the task had taken so far.
        rss: bytes that the process held.
        fault: what it left as last words, with the traceback; empty where it was killed.
    """

    in_hand: tuple[int, ...]
    seconds: float
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


class Hand:
    """Notes of this process, for one task at a time.

    Also ends the process where a clip takes longer than `timeout` seconds, even inside native code that holds Python's
    lock, or the process more than `memory` bytes.
    """

    def __init__(self, timeout: float, memory: float) -> None:
        self._timeout, self._memory = timeout, memory
        _sweep()
        self.path = _folder() / f"{os.getpid()}.notes"
        self._file = open(self.path, "w+b")  # noqa: SIM115  # open as long as the process lives
        self._words = open(self.path.with_suffix(".fault"), "w", encoding="utf-8")  # noqa: SIM115
        self._map: mmap.mmap | None = None
        self.changed = self._last = time.monotonic()
        self._clear()
        faulthandler.enable(self._words, all_threads=False)
        threading.Thread(target=self._watch_memory, daemon=True).start()

    @contextlib.contextmanager
    def task(self, stage: str, shard: str, clips: int) -> Iterator[None]:
        """A task over so many clips; the watch over each begins with `take`."""
        self._file.truncate(_HEAD.size + clips)
        self._map = mmap.mmap(self._file.fileno(), _HEAD.size + clips)
        self._map[:] = bytes(_HEAD.size + clips)
        now = time.time()
        self._clear()
        _HEAD.pack_into(self._map, 0, now, now, usage().rss)
        self.stage, self.shard, self.total = stage, shard, clips
        try:
            yield
        finally:
            self.rest()
            closed, self._map = self._map, None
            closed.close()
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
        """Networks are loaded, or columns looked for, which may take longer than a clip."""
        self._watch(max(self._timeout, _PREPARATION))

    def rest(self) -> None:
        """No clip is worked on: time does not count."""
        faulthandler.cancel_dump_traceback_later()

    def _clear(self) -> None:
        self.stage = self.shard = ""
        self.done = self.total = self.refused = 0
        self.changed = time.monotonic()
        self._last = self.changed

    def _watch(self, seconds: float) -> None:
        self.changed = time.monotonic()
        if self._map is not None:
            struct.pack_into("<d", self._map, 8, time.time())
        # C code with a thread of its own, which needs no lock of Python's.
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._words)

    def _mark(self, place: int, state: int) -> None:
        if self._map is not None:
            self._map[_HEAD.size + place] = state
        self.beat()

    def _watch_memory(self) -> None:
        while True:
            time.sleep(_EVERY)
            held = usage().rss
            notes = self._map
            with contextlib.suppress(ValueError):  # closed meanwhile
                if notes is not None:
                    struct.pack_into("<Q", notes, 16, held)
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
        return Notes((), 0.0, 0, fault)
    begin, last, rss = _HEAD.unpack_from(data)
    states = data[_HEAD.size :]
    in_hand = tuple(place for place, state in enumerate(states) if state == _IN_HAND)
    return Notes(in_hand, max(0.0, last - begin), rss, _own_thread(fault))


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
    for notes in _folder().glob("*.notes"):
        with contextlib.suppress(OSError, ValueError):
            old = time.time() - notes.stat().st_mtime > _STALE
            if old and not Path("/proc", notes.stem).exists():
                _remove(notes)


def _remove(notes: Path) -> None:
    for path in (notes, notes.with_suffix(".fault")):
        path.unlink(missing_ok=True)
