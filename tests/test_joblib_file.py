"""Centroids out of pickled k-means objects, and pickles that want to do something else."""

from __future__ import annotations

import os
import pickle
import zlib
from pathlib import Path

import joblib
import numpy as np
import pytest
from sklearn.cluster import KMeans, MiniBatchKMeans

from pipeline.joblib_file import read_kmeans
from shards.errors import UserError


@pytest.fixture(scope="module")
def fitted() -> MiniBatchKMeans:
    features = np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32)
    return MiniBatchKMeans(5, n_init=1, random_state=np.random.RandomState(3)).fit(features)


@pytest.mark.parametrize("compress", [0, "zlib", "gzip", "bz2", "xz", "lzma"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_joblib_wrote_is_read(fitted: MiniBatchKMeans, tmp_path: Path, compress: int | str, protocol: int) -> None:
    joblib.dump(fitted, tmp_path / "u.km", compress=compress, protocol=protocol)
    found = read_kmeans(tmp_path / "u.km")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, fitted.cluster_centers_.astype(np.float32))


def test_other_forms(fitted: MiniBatchKMeans, tmp_path: Path) -> None:
    double = KMeans(3, n_init=1, random_state=0).fit(np.random.default_rng(1).normal(size=(50, 4)))
    (tmp_path / "plain.km").write_bytes(pickle.dumps(double))
    np.testing.assert_array_equal(read_kmeans(tmp_path / "plain.km"), double.cluster_centers_.astype(np.float32))
    # A class that is not installed here, as in a file of another scikit-learn.
    data = pickle.dumps(fitted, 0).replace(b"sklearn.cluster._kmeans", b"sklearn.cluster.k_means_")
    (tmp_path / "old.km").write_bytes(data)
    np.testing.assert_array_equal(read_kmeans(tmp_path / "old.km"), fitted.cluster_centers_)
    joblib.dump(np.asfortranarray(fitted.cluster_centers_), tmp_path / "array.km")
    np.testing.assert_array_equal(read_kmeans(tmp_path / "array.km"), fitted.cluster_centers_)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("wrap", [bytes, zlib.compress])
def test_nothing_in_the_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: type) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.km").write_bytes(wrap(pickle.dumps({"cluster_centers_": _Evil()})))
    with pytest.raises(UserError, match="no fitted k-means"):
        read_kmeans(Path("evil.km"))
    joblib.dump(np.array([_Evil()], dtype=object), "objects.km")
    assert not Path("ran").exists()
    with pytest.raises(UserError, match="Python objects"):
        read_kmeans(Path("objects.km"))
    assert not Path("ran").exists()


def test_damage_is_one_line(fitted: MiniBatchKMeans, tmp_path: Path) -> None:
    joblib.dump(fitted, tmp_path / "u.km")
    whole = (tmp_path / "u.km").read_bytes()
    unfitted = pickle.dumps(MiniBatchKMeans(5))
    cases = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello", "zip": b"\x78\x9cxx", "unfit": unfitted}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name) as caught:
            read_kmeans(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "u.lz4").write_bytes(b"\x04\x22\x4d\x18" + bytes(20))
    with pytest.raises(UserError, match=r"lz4.*compress=0"):
        read_kmeans(tmp_path / "u.lz4")
    for array in (np.array([["a", "b"]]), np.ones((2, 2), complex), np.zeros((2, 2), "M8[s]")):
        joblib.dump(array, tmp_path / "other.km")
        with pytest.raises(UserError, match="expected real numbers"):
            read_kmeans(tmp_path / "other.km")
    with pytest.raises(UserError, match="cannot be read"):
        read_kmeans(tmp_path / "absent")
