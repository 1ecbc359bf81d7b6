"""Frames of a clip as one JPEG strip from which any range of frames can be decoded alone.

Frames lie below each other (long clips: in rows of several frames). The entropy coder restarts after each row, so a
range of rows is cut out of the file as bytes: header with another height, then the rows' own segments.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image
from simplejpeg import decode_jpeg

from shards.schema import SchemaError

QUALITY = 95
MAX_SIDE = 65_000
"""JPEG sides are 16-bit; longer clips take more columns."""
_BLOCK = 8
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_RESTARTS = [bytes((0xFF, 0xD0 + number)) for number in range(8)]
_SOF0, _SOS = 0xC0, 0xDA


def encode_strip(frames: np.ndarray, quality: int = QUALITY) -> bytes:
    """Baseline JPEG of frames uint8 [F, h, w] (grey) or [F, h, w, 3] (RGB); h and w are multiples of 8.

    Colour is stored at full resolution (4:4:4): the faces are small, and networks that read skin and lips lose more by
    halved chroma than the quarter of bytes it saves.
    """
    count, height, width = frames.shape[:3]
    columns = _columns(count, height)
    rows = -(-count // columns)
    if rows * columns > count:
        frames = np.concatenate([frames, np.repeat(frames[-1:], rows * columns - count, axis=0)])
    grid = frames.reshape(rows, columns, height, width, *frames.shape[3:])
    sheet = np.ascontiguousarray(grid.swapaxes(1, 2)).reshape(rows * height, columns * width, *frames.shape[3:])
    buffer = io.BytesIO()
    # One restart interval is one row of frames.
    interval = columns * (height // _BLOCK) * (width // _BLOCK)
    Image.fromarray(sheet).save(
        buffer, "JPEG", quality=quality, subsampling=0, restart_marker_blocks=interval, optimize=False
    )
    return buffer.getvalue()


def decode_strip(
    data: bytes | bytearray,
    frames: int,
    height: int,
    width: int,
    start: int = 0,
    stop: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Frames `start` to `stop` of a strip, uint8 [n, h, w] or [n, h, w, 3].

    Args:
        frames: how many the strip holds; together with `height` and `width` it must fit the file's own header.
        out: contiguous array of the result's shape to decode into, for a strip of grey frames.

    Raises:
        SchemaError: no strip of this geometry, or damaged. Nothing is allocated by what the file claims.
    """
    stop = frames if stop is None else stop
    if not 0 <= start < stop <= frames:
        raise SchemaError(f"frames {start} to {stop} of a strip of {frames}")
    columns = _columns(frames, height)
    rows = -(-frames // columns)
    size_at, scan_at = _headers(data)
    tall, wide, channels = struct.unpack_from(">HHB", data, size_at)
    if (tall, wide) != (rows * height, columns * width) or channels not in (1, 3):
        raise SchemaError(f"strip of {wide}x{tall}, expected {columns * width}x{rows * height} for {frames} frames")
    if not data.endswith(_EOI):
        raise SchemaError("JPEG strip without its end marker")
    first, last = start // columns, -(-stop // columns)
    part = data if (first, last) == (0, rows) else _cut(data, size_at, scan_at, rows, (first, last), height)
    grey = channels == 1
    shape = ((last - first) * height, columns * width, channels)
    direct = out if grey and columns == 1 else None
    try:
        sheet = decode_jpeg(
            part,
            colorspace="GRAY" if grey else "RGB",
            fastdct=False,
            fastupsample=False,
            buffer=None if direct is None else direct.reshape(shape),
        )
    except ValueError as error:
        raise SchemaError(f"damaged JPEG strip ({error})") from None
    if direct is not None:
        return direct
    if sheet.shape != shape:
        raise SchemaError(f"strip decodes to {sheet.shape}")
    rest = () if grey else (channels,)
    grid = sheet.reshape(last - first, height, columns, width, *rest).swapaxes(1, 2)
    flat = grid.reshape((last - first) * columns, height, width, *rest)
    cut = flat[start - first * columns : stop - first * columns]
    if out is None:
        return cut
    out[:] = cut
    return out


def _columns(frames: int, height: int) -> int:
    return max(1, -(-frames * height // MAX_SIDE))


def _headers(data: bytes | bytearray) -> tuple[int, int]:
    """Offsets of the frame header's size (height, width, channels) and of the entropy-coded data."""
    if data[:2] != _SOI:
        raise SchemaError("not a JPEG file")
    position, size_at = 2, 0
    while position + 4 <= len(data):
        marker, kind, length = (
            data[position],
            data[position + 1],
            int.from_bytes(data[position + 2 : position + 4], "big"),
        )
        if marker != 0xFF or length < 2:
            break
        if kind == _SOF0:
            size_at = position + 5
        elif 0xC1 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            raise SchemaError("JPEG strip is not baseline")
        position += 2 + length
        if kind == _SOS and size_at and position < len(data):
            return size_at, position
    raise SchemaError("JPEG strip without its headers")


def _cut(
    data: bytes | bytearray, size_at: int, scan_at: int, rows: int, wanted: tuple[int, int], height: int
) -> bytearray:
    """A strip of some rows of a strip: headers with another height, the rows' segments with restart markers counted
    from zero again, and an end marker."""
    first, last = wanted
    begins, position = [scan_at], scan_at
    # Inside coded data 0xFF is always followed by 0x00, so these bytes can only be the restart marker that is due.
    for row in range(min(last, rows - 1)):
        position = data.find(_RESTARTS[row % 8], position) + 2
        if position < 2:
            raise SchemaError(f"JPEG strip has {row} restart markers, expected {rows - 1}")
        begins.append(position)
    if last == rows:
        begins.append(len(data))
    part = bytearray(data[:scan_at])
    part[size_at : size_at + 2] = struct.pack(">H", (last - first) * height)
    shift = scan_at - begins[first]
    part += data[begins[first] : begins[last]]
    for row in range(first, last - 1):
        part[begins[row + 1] + shift - 1] = 0xD0 + (row - first) % 8
    part[-2:] = _EOI
    return part
