"""Corpus values and their intervals, against plain formulas and data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.evaluation import bootstrap
from model.evaluation.bootstrap import paired, summarise
from model.evaluation.figures import Sums

PAIRS = st.tuples(st.floats(0, 100), st.integers(1, 50).map(float))


def rows(name: str, values: np.ndarray) -> list[Sums]:
    return [{name: (float(value), 1.0)} for value in values]


def test_values_are_ratios_of_sums_and_roots_of_them() -> None:
    found = summarise([{"wer": (1.0, 2.0), "rmse_f0": (8.0, 1.0)}, {"wer": (0.0, 6.0), "rmse_f0": (28.0, 3.0)}])
    assert found["wer"].value == 0.125
    assert found["rmse_f0"].value == 3.0
    assert (found["rmse_f0"].low, found["rmse_f0"].high) == pytest.approx((math.sqrt(8), math.sqrt(28 / 3)))
    assert found["wer"].clips == 2


def test_figures_that_clips_lack_are_not_counted() -> None:
    found = summarise([{"wer": (1.0, 4.0)}, {"secs": (0.5, 1.0)}, {"wer": (0.0, 0.0)}])
    assert (found["wer"].value, found["wer"].clips) == (0.25, 2)
    assert (found["secs"].value, found["secs"].low, found["secs"].high, found["secs"].clips) == (0.5, 0.5, 0.5, 1)
    assert "wer" not in summarise([{"wer": (0.0, 0.0)}])
    assert summarise([]) == {}


def test_interval_of_a_mean_is_that_of_the_normal_theory() -> None:
    values = np.random.default_rng(7).normal(3, 2, 400)
    found = summarise(rows("utmos", values))["utmos"]
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_of_a_ratio_is_that_of_another_bootstrap() -> None:
    random = np.random.default_rng(3)
    words = random.integers(3, 20, 60)
    wrong = random.binomial(words, 0.3)
    found = summarise([{"wer": (float(e), float(n))} for e, n in zip(wrong, words, strict=True)])["wer"]
    ratios = []
    for _ in range(4000):
        chosen = random.choice(60, 60)
        ratios.append(wrong[chosen].sum() / words[chosen].sum())
    assert (found.low, found.high) == pytest.approx(np.percentile(ratios, (2.5, 97.5)), abs=0.006)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(11)
    held = 0
    for _ in range(200):
        found = summarise(rows("secs", random.normal(0.5, 0.2, 40)))["secs"]
        held += found.low <= 0.5 <= found.high
    # 95 %, less what percentiles lose with 40 clips; three standard errors of 200 trials either side.
    assert 0.89 <= held / 200 <= 0.985


def test_memory_does_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = rows("secs", np.random.default_rng(1).normal(size=33))
    whole = summarise(values)
    monkeypatch.setattr(bootstrap, "BLOCK", 100)
    assert summarise(values) == whole


@given(st.lists(PAIRS, min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_value_lies_in_its_interval_and_that_among_the_clips(pairs: list[tuple[float, float]]) -> None:
    found = summarise([{"cer": pair} for pair in pairs])["cer"]
    assert found.value == pytest.approx(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
    low, high = min(a / b for a, b in pairs), max(a / b for a, b in pairs)
    assert low - 1e-9 <= found.low <= found.high <= high + 1e-9


def test_a_system_does_not_differ_from_itself() -> None:
    random = np.random.default_rng(2)
    system = {
        str(key): {"wer": (float(random.integers(9)), 9.0), "rmse_f0": (random.random(), 2.0)} for key in range(20)
    }
    for found in paired(system, system).values():
        assert (found.value, found.low, found.high, found.clips) == (0.0, 0.0, 0.0, 20)


def test_what_makes_clips_hard_for_both_falls_out_of_a_paired_difference() -> None:
    random = np.random.default_rng(5)
    hard = random.normal(3, 1, 100)
    a = {str(key): {"utmos": (value + 0.1, 1.0)} for key, value in enumerate(hard)}
    b = {str(key): {"utmos": (value + random.normal(0, 0.05), 1.0)} for key, value in enumerate(hard)}
    found = paired(a, b)["utmos"]
    assert 0 < found.low < 0.1 < found.high < 0.2
    one, other = summarise([*a.values()])["utmos"], summarise([*b.values()])["utmos"]
    assert one.low < other.high  # apart, their intervals tell nothing
    assert found.value == pytest.approx(-paired(b, a)["utmos"].value)


def test_differences_are_of_common_clips_alone() -> None:
    a: dict[str, Sums] = {"x": {"wer": (1, 2), "secs": (1, 1)}, "y": {"wer": (2, 2)}, "only a": {"wer": (9, 9)}}
    b: dict[str, Sums] = {"y": {"wer": (0, 2), "secs": (1, 1)}, "x": {"wer": (0, 2)}}
    found = paired(a, b)
    assert set(found) == {"wer"}
    assert (found["wer"].value, found["wer"].clips) == (0.75, 2)
    assert paired(a, {"z": {"wer": (1.0, 1.0)}}) == {}
