"""Write a video file: H.264 picture at 25 Hz and AAC sound at 16 kHz, the same bytes for the same input."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from shards.errors import UserError
from shards.schema import SAMPLE_RATE, VIDEO_RATE

# With its macroblock tree and B frames x264 gave different bytes for the same frames, now and then; so both are off.
_X264 = {"preset": "veryfast", "crf": "18", "bf": "0", "x264-params": "mbtree=0"}


def write_video(path: Path, frames: Iterable[np.ndarray], samples: np.ndarray | None) -> None:
    """Encode frames and sound into an MP4 file, which appears whole or not at all.

    Args:
        frames: RGB uint8 [H, W, 3] each, all of one size; an odd last row or column is dropped (H.264).
        samples: mono float32 in -1..1 at 16 kHz, or None for a file without a sound stream.

    Raises:
        UserError: the file cannot be written.
    """
    partial = path.with_name(f".writing-{path.name}")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            video: Any = container.add_stream("libx264", rate=VIDEO_RATE, options=_X264)
            video.pix_fmt = "yuv420p"
            video.codec_context.thread_count = 1  # the number of threads changes the bytes
            sound: Any = None
            if samples is not None:
                sound = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
                sound.bit_rate = 64_000
            for number, frame in enumerate(frames):
                height, width = frame.shape[0] & ~1, frame.shape[1] & ~1
                if number == 0:
                    video.height, video.width = height, width
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
                picture.pts, picture.time_base = number, Fraction(1, VIDEO_RATE)
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
            if samples is not None:
                block = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
                block.sample_rate, block.pts, block.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
                container.mux(sound.encode(block))
                container.mux(sound.encode(None))
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)
