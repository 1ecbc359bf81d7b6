"""Alignment: gaps, smoothing and similarity transforms against plain formulas."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline import align


def test_gaps_are_linear_inside_and_constant_at_the_ends() -> None:
    a, b = np.array([[0.0, 10.0]]), np.array([[4.0, 30.0]])
    filled = align.fill_gaps([None, a, None, None, None, b, None])
    np.testing.assert_allclose(filled[:, 0, 0], [0, 0, 1, 2, 3, 4, 4])
    np.testing.assert_allclose(filled[:, 0, 1], [10, 10, 15, 20, 25, 30, 30])


@given(st.integers(1, 40), st.integers(0, 5))
def test_smoothing_is_the_published_window(frames: int, seed: int) -> None:
    """For frame t: mean over t-m..t+m with m = min(6, t, F-1-t), moved back onto the frame's own centroid."""
    points = np.random.default_rng(seed).normal(size=(frames, 68, 2)) * 20
    expected = []
    for t in range(frames):
        m = min(6, t, frames - 1 - t)
        mean = points[t - m : t + m + 1].mean(axis=0)
        expected.append(mean + points[t].mean(axis=0) - mean.mean(axis=0))
    np.testing.assert_allclose(align.smooth(points), expected, atol=1e-9)


transforms = st.tuples(st.floats(0.3, 3), st.floats(-3.1, 3.1), st.floats(-99, 99), st.floats(-99, 99))


def matrix(scale: float, angle: float, x: float, y: float) -> np.ndarray:
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[c, -s, x], [s, c, y]])


@given(transforms)
def test_similarities_recover_what_was_applied(parameters: tuple[float, float, float, float]) -> None:
    truth = matrix(*parameters)
    moved = np.array([truth @ [*point, 1] for point in align.CANONICAL])
    np.testing.assert_allclose(align.similarity(align.CANONICAL, moved), truth, atol=1e-6)
    np.testing.assert_allclose(align.robust_similarity(align.CANONICAL, moved), truth, atol=1e-3)
    np.testing.assert_allclose(align.transform(truth, align.CANONICAL), moved, atol=1e-9)


def test_one_wild_landmark_does_not_move_the_face() -> None:
    truth = matrix(0.8, 0.2, 5, -3)
    moved = align.transform(truth, align.CANONICAL)
    moved[6] += 60
    found = align.robust_similarity(align.CANONICAL, moved)
    good = np.arange(len(moved)) != 6
    assert np.abs(align.transform(found, align.CANONICAL) - moved)[good].max() < 1  # type: ignore[arg-type]


def test_a_frame_has_one_result_whatever_came_before() -> None:
    noisy = align.CANONICAL + np.random.default_rng(0).normal(size=align.CANONICAL.shape)
    first = align.robust_similarity(noisy, align.CANONICAL)
    for seed in range(5):
        align.robust_similarity(np.random.default_rng(seed).normal(size=(8, 2)), align.CANONICAL)
    np.testing.assert_array_equal(align.robust_similarity(noisy, align.CANONICAL), first)
