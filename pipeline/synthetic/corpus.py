"""A seeded corpus of talking faces: portraits that speak GRID-like sentences with the voices of espeak-ng."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.mux import write_video
from pipeline.synthetic.face import Look, render
from pipeline.synthetic.visemes import mouth_track
from shards.errors import UserError
from shards.schema import SAMPLE_RATE, VIDEO_RATE

REST = 0.25
"""Seconds of silence and rest before and after the sentence."""
ROOM = 10 ** (-58 / 20)
"""Level of the noise under every clip, RMS of full scale."""

# The grammar of the GRID corpus (Cooke et al. 2006).
COMMANDS = ("bin", "lay", "place", "set")
COLOURS = ("blue", "green", "red", "white")
PREPOSITIONS = ("at", "by", "in", "with")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVXYZ")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ADVERBS = ("again", "now", "please", "soon")
SLOTS = (COMMANDS, COLOURS, PREPOSITIONS, LETTERS, DIGITS, ADVERBS)


@dataclass(frozen=True)
class Speaker:
    """A voice of espeak-ng and the face that goes with it."""

    name: str
    voice: str
    rate: int
    pitch: int
    look: Look


SPEAKERS = (
    Speaker("s1", "en-us+f2", 155, 55, Look()),
    Speaker("s2", "en-us+m3", 148, 42, Look(True, (1.07, 0.97), 0.10, (0.88, 0.82, 0.78), 1.15)),
    Speaker("s3", "gmw/en+f5", 160, 50, Look(False, (0.93, 1.05), -0.10, (1.0, 0.96, 1.06), 0.9)),
    Speaker("s4", "en-gb-x-rp+m7", 146, 52, Look(True, (0.95, 1.0), 0.05, (1.04, 0.98, 0.86), 1.0)),
    Speaker("s5", "en-gb-scotland+f3", 152, 48, Look(True, (1.05, 0.95), -0.04, (0.86, 0.72, 0.62), 1.3)),
    Speaker("s6", "en-us+m1", 155, 60, Look(False, (1.0, 1.06), 0.12, (0.92, 0.92, 0.96), 1.05)),
    Speaker("s7", "en-us+f1", 150, 40, Look(False, (1.08, 1.0), 0.0, (1.1, 1.0, 0.94), 0.85)),
    Speaker("s8", "gmw/en+m5", 158, 45, Look(True, (0.92, 0.96), -0.08, (0.8, 0.78, 0.8), 1.2)),
)


@dataclass(frozen=True)
class Take:
    """One clip to be made."""

    split: str
    speaker: Speaker
    words: tuple[str, ...]
    seed: tuple[int, int]

    @property
    def name(self) -> str:
        """The sentence's short name as GRID writes it: `bbaf2n`, with `z` for zero."""
        *letters, digit, adverb = self.words
        number = DIGITS.index(digit)
        return "".join(w[0].lower() for w in letters) + (str(number) if number else "z") + adverb[0]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def plan(clips: int, voices: int, seed: int, held_out_voices: int = 0) -> list[Take]:
    """Draw sentences, all different, and deal them to speakers and splits.

    The first `voices` of `SPEAKERS` take part in turn, one clip in ten for `test`, one for `valid` (at least one
    each). The `held_out_voices` after them speak one clip in sixteen each (at least one), in `test` alone.

    Raises:
        UserError: too few clips, more than there are sentences, or more voices than there are.
    """
    total = int(np.prod([len(slot) for slot in SLOTS]))
    fewest = 3 + held_out_voices
    if not fewest <= clips <= total:
        raise UserError(f"synthetic corpus: {clips} clips asked for, {fewest} to {total} are possible")
    if not 1 <= voices <= len(SPEAKERS):
        raise UserError(f"synthetic corpus: {voices} voices asked for, 1 to {len(SPEAKERS)} are possible")
    if not 0 <= held_out_voices <= len(SPEAKERS) - voices:
        raise UserError(
            f"synthetic corpus: {held_out_voices} held-out voices asked for, beside {voices} others"
            f" 0 to {len(SPEAKERS) - voices} are possible"
        )
    apart = held_out_voices * max(1, clips // 16)
    drawn = np.random.default_rng(seed).choice(total, size=clips, replace=False)
    known = clips - apart
    held = max(1, known // 10)
    takes = []
    for i, number in enumerate(drawn):
        indices = np.unravel_index(int(number), [len(slot) for slot in SLOTS])
        words = tuple(slot[int(j)] for slot, j in zip(SLOTS, indices, strict=True))
        speaker = i % voices if i < known else voices + (i - known) % held_out_voices
        split = "test" if i < held or i >= known else "valid" if i < 2 * held else "train"
        takes.append(Take(split, SPEAKERS[speaker], words, (seed, i)))
    return takes


def make_take(take: Take, size: int = 192) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture, sound and mouth shapes of one clip, about 1.7 to 2.6 s.

    Returns:
        frames uint8 (F, size, size, 3) RGB, samples float32 (640F,), mouth track float32 (F, 6).
    """
    from pipeline.synthetic.espeak import speak

    rng = np.random.default_rng(take.seed)
    speaker = take.speaker
    *before, letter, digit, adverb = take.words
    # "A" before a number would be read as the article.
    spoken = " ".join([*before, "[['eI]]" if letter == "A" else letter, digit, adverb])
    speech = speak(
        spoken,
        speaker.voice,
        rate=speaker.rate + int(rng.integers(-8, 9)),
        pitch=speaker.pitch + int(rng.integers(-4, 5)),
        seed=int(rng.integers(1, 2**31)),
    )
    seconds = REST + len(speech.samples) / SAMPLE_RATE + REST
    count = int(np.ceil(seconds * VIDEO_RATE))
    # A quiet room: with digital silence, a fifth of all log-mels would lie at the floor and stretch their scale.
    samples = rng.normal(0, ROOM, count * SAMPLE_RATE // VIDEO_RATE).astype(np.float32)
    start = int(REST * SAMPLE_RATE)
    samples[start : start + len(speech.samples)] += speech.samples * (0.5 / max(1e-3, np.abs(speech.samples).max()))
    mouths = mouth_track(speech.phonemes, count, REST)
    return render(mouths, speaker.look, rng, size), samples, mouths


def write_corpus(
    folder: Path,
    clips: int = 100,
    voices: int = 4,
    seed: int = 0,
    size: int = 192,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    held_out_voices: int = 0,
) -> list[Path]:
    """Write `<split>/<speaker>/<sentence>.mp4` with the sentence beside it in `.txt`.

    25 fps H.264 and 16 kHz mono AAC of equal length. The same arguments but `workers` give the same clips.

    Args:
        folder: made if missing.
        clips: number of clips, those of held-out voices included; no sentence occurs twice.
        voices: number of speakers, 1 to 8, who speak in all splits: one clip in ten each for `valid` and `test`.
        size: width and height, even, 128 to 512 pixels.
        workers: processes; 1 works in this one.
        progress: called with (done, clips) after each clip.
        held_out_voices: number of further speakers, those after the first `voices`, who speak in `test` alone.

    Returns:
        The videos, in the order of the plan.

    Raises:
        UserError: a number is out of range, or a package of the `demo` extra is missing.
    """
    if size % 2 or not 128 <= size <= 512:
        raise UserError(f"synthetic corpus: size {size}, expected an even number from 128 to 512")
    jobs = [(folder, take, size) for take in plan(clips, voices, seed, held_out_voices)]
    paths = []
    for path in _each(jobs, workers):
        paths.append(path)
        if progress is not None:
            progress(len(paths), clips)
    return paths


def _each(jobs: list[tuple[Path, Take, int]], workers: int) -> Iterator[Path]:
    if workers <= 1:
        yield from map(_write_take, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_write_take, jobs, chunksize=4)


def _write_take(job: tuple[Path, Take, int]) -> Path:
    folder, take, size = job
    frames, samples, _ = make_take(take, size)
    path = folder / take.split / take.speaker.name / f"{take.name}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, samples)
    path.with_suffix(".txt").write_text(take.text + "\n", encoding="utf-8")
    return path


def write_faulty(folder: Path, size: int = 192) -> list[Path]:
    """Write six files that a build must refuse, for demonstrations: their names say what is wrong.

    `no_face.mp4`, `no_audio.mp4`, `truncated.mp4` (its first 60 %), `silent.mp4`, `too_short.mp4` (0.2 s) and
    `playlist.mp4` (a text that points to another file).
    """
    folder.mkdir(parents=True, exist_ok=True)
    frames, samples, _ = make_take(Take("train", SPEAKERS[0], ("set", "red", "by", "K", "six", "now"), (0, 0)), size)
    noise = np.random.default_rng(0).uniform(0, 255, (12, 12 + len(frames) // 4, 3)).astype(np.uint8)
    texture = np.stack([_texture(noise, i, size) for i in range(len(frames))])
    write_video(folder / "no_face.mp4", texture, samples)
    write_video(folder / "no_audio.mp4", frames, None)
    write_video(folder / "silent.mp4", frames, np.zeros_like(samples))
    write_video(folder / "too_short.mp4", frames[20:25], samples[20 * 640 : 25 * 640])
    write_video(folder / "truncated.mp4", frames, samples)
    whole = (folder / "truncated.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: int(len(whole) * 0.6)])
    (folder / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:2,\nno_audio.mp4\n#EXT-X-ENDLIST\n", encoding="utf-8")
    names = ("no_face", "no_audio", "truncated", "silent", "too_short", "playlist")
    return [folder / f"{name}.mp4" for name in names]


def _texture(noise: np.ndarray, i: int, size: int) -> np.ndarray:
    import cv2

    wide = cv2.resize(noise, (noise.shape[1] * size // 12, size), interpolation=cv2.INTER_CUBIC)
    return wide[:, 4 * i : 4 * i + size] if 4 * i + size <= wide.shape[1] else wide[:, -size:]
