"""From coded frames to pictures: whole frames instead of fields, square pixels, RGB, upright."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeVar

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import Interpolation, VideoReformatter

from pipeline.container import MAX_PIXELS, detail
from pipeline.stage import Reason, Reject

# Bit-exact scaling: the same pixels on every machine, whatever its vector units.
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
NEARLY_SQUARE = Fraction(1, 100)
"""Pixels whose sides differ by less stay as they are: scaling costs sharpness, and such values are rounding."""
_SQUEEZE = 4
"""Sides of a pixel that differ by more are a broken header: anamorphic material has at most 2:1."""
X = TypeVar("X")
Timed = tuple[Fraction | None, Fraction, Fraction | None, X]
"""Header length in seconds, time of a frame, its duration, the frame; None where the file does not tell."""


@dataclass(frozen=True)
class Coded:
    """A decoded frame, and width over height of one of its pixels (1 where the file does not tell)."""

    frame: av.VideoFrame
    aspect: Fraction


class Painter:
    """Turns coded frames of one film into RGB uint8 [H, W, 3]: square pixels, then the display matrix."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._reformatter = VideoReformatter()

    def paint(self, coded: Coded) -> np.ndarray:
        """One picture.

        Raises:
            Reject: UNREADABLE for a pixel format, pixel shape or display matrix that cannot be shown.
        """
        frame = coded.frame
        try:
            shown = self._reformatter.reformat(
                frame, width=self._width(coded), format="rgb24", interpolation=EXACT, threads=1
            )
            picture = shown.to_ndarray()
        except (av.FFmpegError, ValueError) as error:
            raise Reject(
                Reason.UNREADABLE, f"{self._uri}: pixel format {frame.format.name} ({detail(error)})"
            ) from None
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        return picture if matrix is None else upright(picture, np.frombuffer(matrix, np.int32), self._uri)

    def _width(self, coded: Coded) -> int:
        """Width with square pixels: all lines stay, the width is scaled."""
        width, height, aspect = coded.frame.width, coded.frame.height, coded.aspect
        if aspect == 1 or abs(aspect - 1) <= NEARLY_SQUARE:
            return width
        wanted = round(width * aspect)
        if not 1 / Fraction(_SQUEEZE) <= aspect <= _SQUEEZE or wanted < 1 or wanted * height > MAX_PIXELS:
            raise Reject(
                Reason.UNREADABLE,
                f"{self._uri}: pixels of shape {aspect.numerator}:{aspect.denominator}, which no camera has; "
                "re-encode the file with square pixels",
            )
        return wanted


def upright(picture: np.ndarray, matrix: np.ndarray, uri: str) -> np.ndarray:
    """Apply a display matrix: 3x3 row-major, points as row vectors; quarter turns and mirrors only.

    Raises:
        Reject: UNREADABLE for any other matrix.
    """
    (a, b), (c, d) = (matrix.reshape(3, 3)[:2, :2] / 65536.0).tolist()
    scale = max(abs(a), abs(b), abs(c), abs(d))
    turned = abs(b) > abs(a)
    small = (a, d) if turned else (b, c)
    if scale == 0 or max(map(abs, small)) > 0.02 * scale:
        raise Reject(Reason.UNREADABLE, f"{uri}: display matrix is no quarter turn; re-encode the file upright")
    import cv2

    across, down = (c, b) if turned else (a, d)  # turned: x' = c y, y' = b x
    turns = {
        (True, True, False): cv2.ROTATE_90_CLOCKWISE,
        (True, False, True): cv2.ROTATE_90_COUNTERCLOCKWISE,
        (False, True, True): cv2.ROTATE_180,
    }
    turn = turns.get((turned, across < 0, down < 0))
    if turn is not None:  # the same pixels as below, fifteen times faster
        return cv2.rotate(picture, turn)
    picture = picture.transpose(1, 0, 2) if turned else picture
    return np.ascontiguousarray(picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def progressive(frames: Iterator[Timed[Coded]], uri: str) -> Iterator[Timed[Coded]]:
    """Frames as they are, except that from the first interlaced one on fields are made whole (bwdif).

    One frame per coded frame, at its own time: lines of the earlier field stay where nothing moves, and are
    interpolated where something does. Frames that are not marked as interlaced pass the filter unchanged.

    Raises:
        Reject: UNREADABLE for frames that the filter refuses.
    """
    waiting: deque[Timed[Coded]] = deque()
    filtered: _Fields | None = None
    try:
        for timed in frames:
            frame = timed[3].frame
            if filtered is not None and filtered.shape != _shape(frame):
                yield from _rejoin(filtered.push(None), waiting)
                filtered = None
            if filtered is None and frame.interlaced_frame:
                filtered = _Fields(frame)
            if filtered is None:
                yield timed
            else:
                waiting.append(timed)
                yield from _rejoin(filtered.push(frame), waiting)
        if filtered is not None:
            yield from _rejoin(filtered.push(None), waiting)
    except (av.FFmpegError, ValueError) as error:
        raise Reject(Reason.UNREADABLE, f"{uri}: its fields cannot be made whole ({detail(error)})") from None


def _rejoin(frames: Iterator[av.VideoFrame], waiting: deque[Timed[Coded]]) -> Iterator[Timed[Coded]]:
    """Filtered frames with the times of the frames that they were made from: one out for one in, in order."""
    for frame in frames:
        header, at, step, coded = waiting.popleft()
        yield header, at, step, replace(coded, frame=frame)


def _shape(frame: av.VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


class _Fields:
    """The filter for frames of one size and format."""

    def __init__(self, frame: av.VideoFrame) -> None:
        self.shape = width, height, pixels = _shape(frame)
        base = Fraction(frame.time_base or 1)
        self._graph = Graph()
        self._graph.threads = 1
        source = self._graph.add(
            "buffer",
            f"video_size={width}x{height}:pix_fmt={pixels}:time_base={base.numerator}/{base.denominator}:"
            f"colorspace={int(frame.colorspace)}:range={int(frame.color_range)}",
        )
        fields = self._graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
        self._graph.link_nodes(source, fields, self._graph.add("buffersink")).configure()

    def push(self, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
        """The frames that are ready once `frame` is known; None asks for the rest."""
        self._graph.vpush(frame)
        while True:
            try:
                yield self._graph.vpull()
            except (BlockingIOError, EOFError):
                return
