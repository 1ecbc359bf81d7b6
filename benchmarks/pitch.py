"""Our pYIN against librosa's: speed and agreement on a folder of sound, both in this process on one core.

    python -m benchmarks.pitch --audio FOLDER --json

Reads audio files (wav, flac, ogg, mp3) and the sound of videos, mono at 16 kHz, framed as the `pitch` stage does. Both
run in turns, over 65 to 2093 Hz and 65 to 600 Hz; a speedup is the ratio of the times over the whole folder, each
file's being the median of its runs. A frame counts as mismatched where f0 or the voiced flag differ in any bit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.stage import Reject
from shards.errors import UserError
from shards.mel import N_FFT, PAD
from shards.schema import HOP, SAMPLE_RATE

Wave = NDArray[np.float32]
RANGES = {"wide": (65.0, 2093.0), "narrow": (65.0, 600.0)}


def read_sound(path: Path) -> Wave:
    """Mono sound at 16 kHz: the mean of the channels, resampled by a polyphase filter.

    Raises:
        Reject: the file is neither audio that soundfile reads nor a video with sound.
    """
    import soundfile
    from scipy.signal import resample_poly

    from pipeline.media import decode_audio

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        return decode_audio(str(path))
    mono = samples.mean(axis=1, dtype=np.float32)
    ratio = Fraction(SAMPLE_RATE, rate)
    return mono if ratio == 1 else resample_poly(mono, ratio.numerator, ratio.denominator).astype(np.float32)


def read_folder(folder: Path) -> tuple[dict[str, Wave], dict[str, str]]:
    """Sounds that give at least one frame, and why other files are left out, by name.

    Raises:
        UserError: no such folder, or nothing in it can be used.
    """
    if not folder.is_dir():
        raise UserError(f"--audio {folder}: no such folder")
    sounds: dict[str, Wave] = {}
    skipped: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            wave = read_sound(path)
        except (Reject, OSError) as error:
            skipped[name] = str(error)
            continue
        if len(wave) + 2 * PAD < N_FFT:
            skipped[name] = f"{len(wave)} samples at 16 kHz are less than one frame of {N_FFT - 2 * PAD}"
        elif not np.isfinite(wave).all():
            skipped[name] = "has samples that are not finite"
        else:
            sounds[name] = np.pad(wave, PAD)
    if not sounds:
        found = "; ".join(f"{name}: {why}" for name, why in skipped.items()) or "it holds no file"
        raise UserError(f"--audio {folder}: nothing to measure ({found})")
    return sounds, skipped


def compare(sounds: dict[str, Wave], runs: int) -> dict[str, Any]:
    """Seconds of both, mismatched frames and frames, over both ranges."""
    import librosa

    from pipeline.pyin import pyin

    def ours(wave: Wave, fmin: float, fmax: float) -> Any:
        return pyin(wave, fmin=fmin, fmax=fmax, sr=SAMPLE_RATE, frame_length=N_FFT, hop_length=HOP)

    def theirs(wave: Wave, fmin: float, fmax: float) -> Any:
        return librosa.pyin(
            wave, fmin=fmin, fmax=fmax, sr=SAMPLE_RATE, frame_length=N_FFT, hop_length=HOP, center=False
        )

    facts: dict[str, Any] = {"mismatched_frames": 0, "frames": 0}
    for label, limits in RANGES.items():
        for length in (N_FFT, 4 * SAMPLE_RATE):  # one frame is another array layout, so another compilation
            tone = np.sin(np.arange(length) / 20).astype(np.float32)
            ours(tone, *limits)
            theirs(tone, *limits)
        total = {"ours": 0.0, "librosa": 0.0}
        for wave in sounds.values():
            times: dict[str, list[float]] = {"ours": [], "librosa": []}
            results: dict[str, Any] = {}
            for _ in range(runs):
                for name, track in (("librosa", theirs), ("ours", ours)):
                    results[name], seconds = timed(track, wave, *limits)
                    times[name].append(seconds)
            for name in total:
                total[name] += median(times[name])
            (f0, voiced, _), (f0_theirs, voiced_theirs, _) = results["ours"], results["librosa"]
            same = (f0 == f0_theirs) | (np.isnan(f0) & np.isnan(f0_theirs))
            facts["mismatched_frames"] += int(np.count_nonzero(~same | (voiced != voiced_theirs)))
            facts["frames"] += len(f0)
        facts[f"speedup_{label}"] = total["librosa"] / total["ours"]
        facts[f"seconds_{label}"] = total
    return facts


def timed(track: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = track(*arguments)
    return result, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--audio", type=Path, required=True, metavar="DIR", help="folder of audio or video files")
    parser.add_argument("--runs", type=int, default=3, help="runs per file, of which the median counts (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    try:
        sounds, skipped = read_folder(args.audio)
    except UserError as error:
        sys.exit(f"error: {error}")
    seconds = sum(len(wave) - 2 * PAD for wave in sounds.values()) / SAMPLE_RATE
    with threadpool_limits(1):
        measured = compare(sounds, args.runs)
    facts = {**measured, "files": len(sounds), "audio_seconds": seconds, "skipped": skipped}
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    print(f"{facts['files']} files, {seconds:.1f} s of sound, milliseconds per second of sound:")
    print(f"{'range':<16}{'librosa':>9}{'ours':>8}{'speedup':>9}")
    for label, (fmin, fmax) in RANGES.items():
        spent = facts[f"seconds_{label}"]
        cells = [f"{spent[name] / seconds * 1000:.2f}" for name in ("librosa", "ours")]
        print(f"{f'{fmin:g}-{fmax:g} Hz':<16}{cells[0]:>9}{cells[1]:>8}{facts[f'speedup_{label}']:>8.1f}x")
    print(f"{facts['mismatched_frames']} of {facts['frames']} frames differ (both ranges together)")
    for name, why in skipped.items():
        print(f"left out: {name}: {why}")


if __name__ == "__main__":
    main()
