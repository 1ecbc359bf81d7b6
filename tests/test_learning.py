"""Words in the proof of learning: what counts as an error, against examples counted by hand."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("espeakng_loader", reason="needs the demo extra")

from benchmarks.learning_eval import summarise, word_sums
from benchmarks.learning_words import prompt, words
from pipeline.synthetic.corpus import SLOTS, plan


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Set White by H7, please.", "set white by h seven please"),
        (" Lay blew at B 2 again!", "lay blue at b two again"),
        ("bin read in queue for now", "bin red in q four now"),
        ("Play screen with my 7th clean", "play screen with my seven th clean"),
    ],
)
def test_words_are_compared_as_they_sound(text: str, expected: str) -> None:
    assert words(text) == expected.split()


@pytest.mark.parametrize(
    ("said", "heard", "all_errors", "without_letter"),
    [
        ("set white by H seven now", "Set white by H seven now.", 0, 0),
        ("set white by H seven now", "Set white by A seven now.", 1, 0),
        ("set white by H seven now", "Set white by seven now.", 1, 0),
        ("set white by H seven now", "Set right by my age seven now.", 3, 2),
        ("set white by H seven now", "", 6, 5),
    ],
)
def test_errors_of_a_sentence(said: str, heard: str, all_errors: int, without_letter: int) -> None:
    sums = word_sums(said, heard, "x")
    assert sums["wer_x"] == (all_errors, 6)
    assert sums["wer_without_letter_x"] == (without_letter, 5)


def test_figures_are_ratios_of_sums_and_rmse_is_their_root() -> None:
    rows = [{"a": (1.0, 2.0), "b_rmse_hz": (8.0, 1.0)}, {"a": (0.0, 6.0), "b_rmse_hz": (10.0, 1.0)}, {"a": (3.0, 8.0)}]
    found = summarise(rows)
    assert found["a"]["value"] == 0.25
    assert 0 <= found["a"]["low"] < 0.25 < found["a"]["high"] <= 0.5
    assert found["b_rmse_hz"]["value"] == 3.0
    assert (found["b_rmse_hz"]["low"], found["b_rmse_hz"]["high"]) == (math.sqrt(8), math.sqrt(10))


def test_prompt_holds_every_word_and_no_sentence_of_the_corpus() -> None:
    sentences = [sentence.strip().split() for sentence in prompt().lower().split(".") if sentence.strip()]
    for place, slot in enumerate(SLOTS):
        assert {sentence[place] for sentence in sentences} == {word.lower() for word in slot}
    corpus = {take.text.lower() for take in plan(640, 4, 1, held_out_voices=1)}
    assert not corpus & {" ".join(sentence) for sentence in sentences}
