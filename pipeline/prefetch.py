"""Decode ahead on a second thread, so that a network and the decoder of its pictures run at the same time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

X = TypeVar("X")


def prefetched(items: Iterator[X], depth: int) -> Iterator[X]:
    """The same items in the same order, computed ahead by a thread of their own.

    The decoder, onnxruntime, torch and OpenCV let go of Python's lock while they work, so both advance. The thread
    begins with the first item asked for and holds at most `depth` finished items. When this iterator ends (used up,
    after an error, or early by `break` or garbage collection) the thread has closed `items` and ended.

    Args:
        depth: items held ready, at least 1; one more may be in the making.

    Raises:
        ValueError: a depth below 1.
        Exception: whatever `items` raises, after the items before it.
    """
    if depth < 1:
        raise ValueError(f"depth {depth}: at least 1")
    return _consume(items, depth)


def _consume(items: Iterator[X], depth: int) -> Iterator[X]:
    queue = _Queue[X](depth)
    thread = threading.Thread(target=_produce, args=(items, queue), name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            found = queue.take()
            if not found:
                break
            yield found.pop()
    finally:
        queue.stop()
        thread.join()
    if queue.error is not None:
        raise queue.error


def _produce(items: Iterator[X], queue: _Queue[X]) -> None:
    error: BaseException | None = None
    try:
        for item in items:
            if not queue.put(item):
                break
            del item  # a frame that was handed over is not kept alive here
    except BaseException as caught:
        error = caught
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()
        queue.finish(error)


class _Queue(Generic[X]):
    """Finished items between the two threads."""

    def __init__(self, depth: int) -> None:
        self.error: BaseException | None = None
        self._depth = depth
        self._ready: deque[X] = deque()
        self._changed = threading.Condition()
        self._finished = self._stopped = False

    def put(self, item: X) -> bool:
        """Hand an item over, once there is room; False when nobody wants any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
            if not self._stopped:
                self._ready.append(item)
                self._changed.notify_all()
            return not self._stopped

    def take(self) -> list[X]:
        """The next item, or nothing after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._finished or bool(self._ready))
            found = [self._ready.popleft()] if self._ready else []
            self._changed.notify_all()
            return found

    def finish(self, error: BaseException | None) -> None:
        """No more items come; `error` is why, if not because they are used up."""
        with self._changed:
            self.error = error
            self._finished = True
            self._changed.notify_all()

    def stop(self) -> None:
        """No more items are wanted."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
