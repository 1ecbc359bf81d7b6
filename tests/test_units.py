"""Fitting, storing and describing the unit inventory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.units import assign, describe_codebook, fit_codebook, load_codebook, sample_features, save_codebook
from shards.errors import UserError


def blobs(clusters: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Centres [clusters, 8] far apart, and `each` features around every centre."""
    rng = np.random.default_rng(seed)
    centres = 20 * rng.normal(size=(clusters, 8))
    return centres, (centres[:, None] + rng.normal(0, 0.1, (clusters, each, 8))).reshape(-1, 8).astype(np.float32)


def test_fit_finds_well_separated_clusters() -> None:
    centres, features = blobs(6, 200)
    found = fit_codebook(features, 6)
    assert found.shape == (6, 8)
    assert found.dtype == np.float32
    distance = np.linalg.norm(found[:, None] - centres[None], axis=2)
    assert distance.min(axis=0).max() < 0.1
    report = describe_codebook(features, found)
    assert (report.frames, report.clusters, report.dead) == (1200, 6, 0)
    assert report.perplexity == pytest.approx(6, rel=1e-3)
    assert report.inertia == pytest.approx(8 * 0.01, rel=0.1)


def test_fit_of_uneven_clusters_wastes_no_centroid() -> None:
    # Speech is like this: a few sounds, silence above all, take most of the frames.
    rng = np.random.default_rng(0)
    centres = 20 * rng.normal(size=(40, 8))
    sizes = np.r_[4000, 2000, 1000, np.full(37, 60)]
    features = np.repeat(centres, sizes, axis=0) + rng.normal(0, 1, (sizes.sum(), 8))
    found = fit_codebook(features.astype(np.float32), 40)
    report = describe_codebook(features.astype(np.float32), found)
    # The scatter within the clusters is 8; a few centroids may share one.
    assert report.inertia < 2 * 8


def test_fit_depends_on_the_seed_alone() -> None:
    features = np.random.default_rng(3).normal(size=(500, 8)).astype(np.float32)
    assert np.array_equal(fit_codebook(features, 20, seed=1), fit_codebook(features, 20, seed=1))
    assert not np.array_equal(fit_codebook(features, 20, seed=1), fit_codebook(features, 20, seed=2))


def test_too_few_frames_and_bad_features_are_named() -> None:
    with pytest.raises(UserError, match=r"9 frames .* 10 clusters"):
        fit_codebook(np.zeros((9, 4), np.float32), 10)
    with pytest.raises(UserError, match="finite"):
        fit_codebook(np.full((9, 4), np.nan, np.float32), 2)


def test_assignment_is_the_nearest_centroid() -> None:
    rng = np.random.default_rng(4)
    features = rng.normal(2, 1, (300, 5)).astype(np.float32)
    centroids = rng.normal(2, 1, (40, 5)).astype(np.float32)
    nearest = [min(range(40), key=lambda c: ((x - centroids[c]) ** 2).sum()) for x in features]
    units = assign(features, centroids)
    assert units.dtype == np.int16
    assert units.tolist() == nearest


def test_report_counts_dead_clusters() -> None:
    features = np.array([[0.0], [0.0], [0.0], [10.0]], np.float32)
    report = describe_codebook(features, np.array([[0.0], [10.0], [99.0]], np.float32))
    assert report.dead == 1
    assert report.inertia == 0
    assert report.variance == pytest.approx(75 / 4)
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert report.perplexity == pytest.approx(2**entropy)


def numbered(clips: int, frames: int) -> list[np.ndarray]:
    """Features of clips whose frames are numbered on through all clips."""
    return list(np.arange(clips * frames, dtype=np.float32).reshape(clips, frames, 1))


def test_sample_is_without_repeats_uniform_and_repeatable() -> None:
    clips = numbered(40, 100)
    sample = sample_features(clips, 500, seed=7)
    assert sample.shape == (500, 1)
    assert len(np.unique(sample)) == 500
    assert np.all(np.diff(sample[:, 0]) > 0)
    # Mean of a uniform sample of 0..3999: standard error 1155 / sqrt(500) = 52.
    assert abs(sample.mean() - 1999.5) < 4 * 52
    assert np.array_equal(sample, sample_features(iter(clips), 500, seed=7))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 60), st.integers(0, 5))
def test_sample_is_the_frames_with_the_smallest_draws_in_their_order(lengths: list[int], most: int, seed: int) -> None:
    total = sum(lengths)
    draws = np.random.default_rng(seed).random(total)
    wanted = sorted(sorted(range(total), key=lambda frame: draws[frame])[:most])
    frames = np.arange(total, dtype=np.float32)[:, None] * np.ones(130, np.float32)
    clips = np.split(frames, np.cumsum(lengths)[:-1])
    assert sample_features(clips, most, seed).tolist() == frames[wanted].tolist()


def test_a_sample_takes_little_more_than_itself() -> None:
    clips = (np.full((1000, 256), number, np.float32) for number in range(60))
    tracemalloc.start()
    sample = sample_features(clips, 20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * sample.nbytes


def test_the_report_does_not_depend_on_blocks() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(25_000, 3)).astype(np.float32)
    centroids = features[:7]
    report = describe_codebook(features, centroids)
    distances = ((features[:, None].astype(np.float64) - centroids) ** 2).sum(2)
    assert report.inertia == pytest.approx(distances.min(1).mean(), rel=1e-5)
    assert report.variance == pytest.approx(features.astype(np.float64).var(0).sum(), rel=1e-5)


def test_sample_keeps_everything_where_there_is_little() -> None:
    assert sample_features(numbered(3, 10), 500)[:, 0].tolist() == list(range(30))


def test_sample_of_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="no sound"):
        sample_features([], 500)


def test_codebook_survives_storage(tmp_path: Path) -> None:
    centroids = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    with open(tmp_path / "c.npy", "wb") as stream:
        save_codebook(stream, centroids)
    assert np.array_equal(load_codebook(tmp_path / "c.npy"), centroids)
    assert np.array_equal(np.load(tmp_path / "c.npy", allow_pickle=False), centroids)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 2), np.float64), "float32"),
        (np.zeros(3, np.float32), "float32"),
        (np.zeros((0, 2), np.float32), "float32"),
        (np.full((3, 2), np.inf, np.float32), "not finite"),
        (np.array([{"a": 1}], object), "not a plain npy"),
    ],
)
def test_wrong_codebooks_are_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "c.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=words):
        load_codebook(tmp_path / "c.npy")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran"])
def test_files_that_are_no_npy_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.npy").write_bytes(content)
    with pytest.raises(UserError, match="not a plain npy"):
        load_codebook(tmp_path / "c.npy")


def test_missing_codebook_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.npy"):
        load_codebook(tmp_path / "gone.npy")
