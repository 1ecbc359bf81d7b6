"""The unit inventory: k-means centroids of speech features, fitted, described, stored and loaded.

Recipe of fairseq's speech2unit: mini-batch k-means, batches of 10,000 frames, k-means++ starts. Only the centroids are
stored, as plain npy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.storage import open_store

Floats = NDArray[np.float32]

SEED = 1369
STARTS = 5


@dataclass(frozen=True)
class CodebookReport:
    """How a codebook fits features.

    Attributes:
        frames: how many features it was held against.
        inertia: mean squared distance to the nearest centroid; variance: mean squared distance to the mean, which a
            codebook of one centroid would reach.
        dead: centroids that no feature chose.
        perplexity: 2 to the entropy (bits) of the choice: how many clusters are in even use.
    """

    frames: int
    clusters: int
    inertia: float
    variance: float
    dead: int
    perplexity: float


def sample_features(clips: Iterable[Floats], max_frames: int, seed: int = SEED) -> Floats:
    """A uniform random sample of the frames of `clips`: float32 [at most max_frames, D], in the order given.

    One clip is taken at a time; memory stays at twice the sample. Each frame draws a number and the smallest
    `max_frames` stay, so the sample depends on the clips, their order and the seed alone.

    Args:
        clips: features, float32 [T, D] each.

    Raises:
        UserError: no clip at all.
    """
    rng = np.random.default_rng(seed)
    draws: list[NDArray[np.float64]] = []
    features: list[Floats] = []
    held = 0
    for clip in clips:
        draws.append(rng.random(len(clip)))
        features.append(clip)
        held += len(clip)
        if held > 2 * max_frames:
            draws, features = _smallest(draws, features, max_frames)
            held = max_frames
    if not features:
        raise UserError("units: no sound to fit centroids on; the training split has no usable clip")
    return _smallest(draws, features, max_frames)[1][0]


def _smallest(
    draws: list[NDArray[np.float64]], features: list[Floats], count: int
) -> tuple[list[NDArray[np.float64]], list[Floats]]:
    drawn, values = np.concatenate(draws), np.concatenate(features)
    chosen = np.sort(np.argsort(drawn, kind="stable")[:count])
    return [drawn[chosen]], [values[chosen]]


def fit_codebook(features: NDArray[Any], clusters: int, seed: int = SEED) -> Floats:
    """Fit k-means centroids, float32 [clusters, D], to features [N, D]; on one thread, so a seed gives one result.

    Raises:
        UserError: fewer frames than clusters, or features that are not finite.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    if features.ndim != 2 or not np.isfinite(features).all():
        raise UserError(f"units: expected finite features [frames, width], got shape {features.shape}")
    if len(features) < clusters:
        raise UserError(
            f"units: {len(features)} frames of sound are too few for {clusters} clusters; "
            "give more clips or lower speech.clusters"
        )
    kmeans = MiniBatchKMeans(
        n_clusters=clusters,
        init="k-means++",
        n_init=STARTS,
        max_iter=150,
        batch_size=10_000,
        tol=0.0,
        max_no_improvement=100,
        reassignment_ratio=0.5,
        random_state=seed,
        compute_labels=False,
    )
    with threadpool_limits(limits=1):
        kmeans.fit(features.astype(np.float32, copy=False))
    return np.ascontiguousarray(kmeans.cluster_centers_, np.float32)


def assign(features: Floats, centroids: Floats) -> NDArray[np.int16]:
    """Index of the nearest centroid of each feature [T, D]: argmin of |c|^2 - 2 x.c, int16 [T]."""
    scores = (centroids**2).sum(1) - 2 * (features @ centroids.T)
    return scores.argmin(1).astype(np.int16)


def describe_codebook(features: Floats, centroids: Floats) -> CodebookReport:
    """Hold a codebook against features [N, D]."""
    units = assign(features, centroids)
    counts = np.bincount(units, minlength=len(centroids))
    used = counts[counts > 0] / len(units)
    return CodebookReport(
        frames=len(units),
        clusters=len(centroids),
        inertia=float(((features - centroids[units]) ** 2).sum(1, dtype=np.float64).mean()),
        variance=float(features.var(axis=0, dtype=np.float64).sum()),
        dead=int((counts == 0).sum()),
        perplexity=float(2 ** -(used * np.log2(used)).sum()),
    )


def save_codebook(stream: IO[bytes], centroids: Floats) -> None:
    """Write centroids as npy, float32 [K, D]."""
    np.save(stream, np.ascontiguousarray(centroids, np.float32), allow_pickle=False)


def write_codebook(path: Path, centroids: Floats) -> None:
    """Write centroids to a file, npy, float32 [K, D]; the file is whole or not there."""
    buffer = BytesIO()
    save_codebook(buffer, centroids)
    open_store(str(path.absolute().parent)).write(path.name, buffer.getvalue())


def load_codebook(path: Path) -> Floats:
    """Read centroids, float32 [K, D], K at most 32767.

    Raises:
        UserError: the file is missing, no plain npy, or has another dtype or shape, or values that are not finite.
    """
    try:
        with open(path, "rb") as stream:
            centroids = np.lib.format.read_array(stream, allow_pickle=False)
    except OSError as error:
        raise UserError(f"centroids {path}: cannot be read ({error.strerror})") from None
    except (ValueError, EOFError, MemoryError) as error:
        raise UserError(f"centroids {path}: not a plain npy file ({' '.join(str(error).split())})") from None
    return check_centroids(centroids, path)


def check_centroids(centroids: NDArray[Any], path: Path) -> Floats:
    """Centroids from `path`, contiguous.

    Raises:
        UserError: not float32 [K, D] with K up to 32767, or values that are not finite.
    """
    if centroids.dtype != np.float32 or centroids.ndim != 2 or not 0 < len(centroids) <= np.iinfo(np.int16).max:
        raise UserError(
            f"centroids {path}: expected float32 [K, D] with K up to 32767, found {centroids.dtype} {centroids.shape}"
        )
    if not np.isfinite(centroids).all():
        raise UserError(f"centroids {path}: values are not finite")
    return np.ascontiguousarray(centroids)
