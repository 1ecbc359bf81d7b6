"""Open media containers and decode one stream of them, safely and on one thread.

Nothing but the named file is ever opened: formats that point to other files (playlists, image sequences, session
descriptions) are refused, and the decoder is given bytes, not a path. Unusable media raise `Reject`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from typing import Any, BinaryIO, NoReturn

import av
from av.container import InputContainer
from av.stream import Disposition

from pipeline.stage import Reason, Reject
from shards.storage import is_remote, local_path, open_uri

FORMATS = ",".join(
    (
        # Containers of picture and sound. mov is also mp4, 3gp and f4v; matroska webm; mpeg vob; mpegts m2ts; asf wmv.
        "mov,matroska,avi,mpeg,mpegts,flv,live_flv,kux,ogg,asf,asf_o,mxf,lxf,dv,rm,ivr,wtv,ty,pva,nut,nuv,nsv,swf",
        "dhav,amv,smjpeg,cine,r3d,wav",
        # Streams without a container, and moving images.
        "mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,vc1,vc1test,cavsvideo,avs2,avs3,mjpeg,mpjpeg,dnxhd,yuv4mpegpipe",
        "gif,apng",
    )
)
"""Demuxers that may run: those that hold their streams in themselves. Left out: what names other files or addresses
(playlists, image sequences, session descriptions), devices, games' own formats, and what takes any bytes for its."""
INDEXED = ("mov", "matroska")
"""Demuxers whose seek lands on a key frame by an index, so that a seek never changes what is decoded."""
MAX_PIXELS = 7680 * 4320
"""Largest picture decoded: 100 MB as RGB. A header may claim more than any memory holds."""
MAX_FETCH = 128 << 20
"""Objects in a bucket up to this size are fetched whole before they are decoded."""
MAX_JUMP = 10
"""Seconds between timestamps of neighbours beyond which the clock of a file is taken as broken."""
_MAX_MISSING = Fraction(1, 4)
"""Seconds, plus 2 % of the length, that a stream may end before its header says."""


def _refuse(url: str, flags: int, options: dict[str, Any]) -> NoReturn:
    raise PermissionError(errno.EACCES, "media must not open other files", url)


def _open_file(uri: str) -> BinaryIO:
    """Byte stream of a file on disk or in a bucket. Raises StorageError: the bucket refuses or does not answer."""
    try:
        if is_remote(uri):
            return _fetch(uri)
        if not stat.S_ISREG(os.stat(local_path(uri)).st_mode):
            raise Reject(Reason.UNREADABLE, f"{uri}: not a regular file")
        return open(local_path(uri), "rb")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError) as error:
        raise Reject(Reason.UNREADABLE, f"{uri}: cannot be read ({detail(error)}); check the path") from None


def _fetch(uri: str) -> BinaryIO:
    """An object whole, since a stage opens a clip several times and demuxers jump about; a large one by ranges."""
    store, name = open_uri(uri)
    found = store.find(name)
    if found is None:
        raise FileNotFoundError("no such object")
    return BytesIO(_bytes(uri, found.stamp)) if found.size <= MAX_FETCH else store.open(name)


@lru_cache(maxsize=1)
def _bytes(uri: str, stamp: str) -> bytes:
    store, name = open_uri(uri)
    return store.read(name)


@contextmanager
def open_container(uri: str) -> Iterator[InputContainer]:
    """Open a container through a byte stream of ours, so that the decoder has no path to start from.

    Raises:
        Reject: UNREADABLE.
    """
    with _open_file(uri) as stream:
        try:
            container = av.open(
                stream,
                mode="r",
                container_options={"format_whitelist": FORMATS, "protocol_whitelist": "none"},
                io_open=_refuse,
                metadata_errors="replace",
            )
        except (av.FFmpegError, ValueError, OSError) as error:
            raise Reject(
                Reason.UNREADABLE,
                f"{uri}: no readable media file ({detail(error)}); expected mp4, mov, mkv, webm, avi, mpeg, ts, "
                "mxf, wmv, flv, ogg or another video container, complete with its index",
            ) from None
        with container:
            yield container


def detail(error: Exception) -> str:
    """The library's own words for an error, without the file name."""
    return (getattr(error, "strerror", None) or str(error)).strip()


def video_stream(container: InputContainer, uri: str) -> av.VideoStream:
    """The first video stream that is no cover picture, set to decode on one thread.

    Raises:
        Reject: NO_VIDEO, or UNREADABLE for a picture size beyond `MAX_PIXELS`.
    """
    for stream in container.streams.video:
        if stream.codec_context is None or stream.disposition & Disposition.attached_pic:
            continue
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            size = f"{stream.codec_context.width}x{stream.codec_context.height}"
            raise Reject(Reason.UNREADABLE, f"{uri}: picture of {size} pixels; scale it to at most 7680x4320")
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        stream.codec_context.thread_count = 1
        return stream
    raise Reject(Reason.NO_VIDEO, f"{uri}: has no video stream that can be decoded")


def header_length(container: InputContainer, stream: av.VideoStream | av.AudioStream) -> Fraction | None:
    """Seconds that the header promises for the stream, None where it does not say.

    A container's own length counts for the picture (the shorter one where both are told), not for the sound, which
    may well end before it.
    """
    if isinstance(stream, av.VideoStream) and container.format.name == "avi" and stream.frames and stream.average_rate:
        return stream.frames / stream.average_rate  # the demuxer shortens its durations to what a cut file holds
    told = []
    if stream.duration and stream.duration > 0 and stream.time_base:
        told.append(stream.duration * stream.time_base)
    if stream.type == "video" and container.duration and container.duration > 0:
        told.append(Fraction(container.duration, av.time_base) - _late(container, stream))
    return min(told) if told else None


def _late(container: InputContainer, stream: av.VideoStream | av.AudioStream) -> Fraction:
    """Seconds by which a stream begins after what the container's length is counted from."""
    if stream.start_time is None or stream.time_base is None:
        return Fraction(0)
    # Matroska counts from zero, the others from their first stream.
    matroska = container.format.name.startswith("matroska")
    origin = Fraction(0) if matroska else Fraction(container.start_time or 0, av.time_base)
    return max(stream.start_time * stream.time_base - origin, Fraction(0))


def check_length(uri: str, what: str, have: Fraction, promised: Fraction | None, source: str) -> None:
    """Compare the seconds decoded with those promised by `source`.

    Raises:
        Reject: TRUNCATED.
    """
    if promised is not None and promised - have > _MAX_MISSING + promised / 50:
        raise Reject(
            Reason.TRUNCATED,
            f"{uri}: {what} ends at {float(have):.2f} s, {source} {float(promised):.2f} s; fetch the file again",
        )


def damaged(uri: str, what: str, at: Fraction | None, error: Exception | None) -> Reject:
    """The rejection for a stream that breaks off `at` seconds."""
    where = "at its beginning" if at is None else f"near {float(at):.2f} s"
    words = f" ({detail(error)})" if error is not None else ""
    return Reject(Reason.TRUNCATED, f"{uri}: {what} is cut or damaged {where}{words}; fetch the file again")


def decode_stream(container: Any, stream: Any, uri: str, what: str) -> Iterator[Any]:
    """Frames of one stream in the decoder's order of output. Errors before the first good frame (a cut group of
    pictures, a tag in front of the sound) are passed over.

    Raises:
        Reject: TRUNCATED at the first error after a good frame.
    """
    at: Fraction | None = None
    packets = container.demux(stream)
    made_up = container.format.name == "avi"  # it stores no times of display: the demuxer's are guesses
    while True:
        try:
            packet = next(packets)
            if made_up:
                packet.pts = packet.dts
            frames = packet.decode()
        except StopIteration:
            return
        except (av.FFmpegError, ValueError) as error:
            if at is not None:
                raise damaged(uri, what, at, error) from None
            continue
        for frame in frames:
            if frame.is_corrupt:
                if at is not None:
                    raise damaged(uri, what, at, None)
                continue
            if frame.pts is not None:
                at = frame.pts * frame.time_base
            yield frame
