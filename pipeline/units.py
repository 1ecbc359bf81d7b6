"""The unit inventory: k-means centroids of speech features, fitted, described, stored and loaded.

Recipe of fairseq's k-means scripts: mini-batch k-means, batches of 10,000 frames, k-means++ starts. Only the centroids
are stored, as plain npy.
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
BLOCK = 10_000
"""Frames held against centroids at once."""
CHANNELS = 64
"""Channels put in order at once."""


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

    Each frame draws a number and the smallest `max_frames` stay, so the sample depends on the clips, their order and
    the seed alone. Memory is that of the sample and of the clip that is being taken.

    Args:
        clips: features, float32 [T, D] each.

    Raises:
        UserError: no clip at all.
    """
    rng = np.random.default_rng(seed)
    sample: Floats | None = None
    draws, place = np.zeros(max_frames), np.zeros(max_frames, np.int64)
    held = seen = 0
    for clip in clips:
        if sample is None:
            sample = np.empty((max_frames, clip.shape[1]), np.float32)  # of the machine's memory, what is filled
        drawn = rng.random(len(clip))
        room = min(max_frames - held, len(clip))
        rows, slots = np.arange(len(clip)), np.arange(held, held + room)
        if room < len(clip):
            both = np.concatenate([draws[:held], drawn])
            limit = np.partition(both, max_frames - 1)[max_frames - 1]
            rows = np.flatnonzero(drawn <= limit)
            slots = np.concatenate([slots, np.flatnonzero(draws[:held] > limit)])
        sample[slots], draws[slots], place[slots] = clip[rows], drawn[rows], seen + rows
        held, seen = held + room, seen + len(clip)
    if sample is None:
        raise UserError("units: no sound to fit centroids on; the training split has no usable clip")
    order = np.argsort(place[:held])
    for at in range(0, sample.shape[1], CHANNELS):  # in place, a few channels at a time
        sample[:held, at : at + CHANNELS] = sample[order, at : at + CHANNELS]
    return sample[:held]


def fit_codebook(features: NDArray[Any], clusters: int, seed: int = SEED, reassignment: float = 0.0) -> Floats:
    """Fit k-means centroids, float32 [clusters, D], to features [N, D]; on one thread, so a seed gives one result.

    Args:
        reassignment: centroids with fewer than this share of the largest cluster's frames are thrown elsewhere on the
            way (scikit-learn's `reassignment_ratio`).

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
        reassignment_ratio=reassignment,
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
    """Hold a codebook against features [N, D], in blocks."""
    counts = np.zeros(len(centroids), np.int64)
    near, far = 0.0, 0.0
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    for at in range(0, len(features), BLOCK):
        block = features[at : at + BLOCK]
        units = assign(block, centroids)
        counts += np.bincount(units, minlength=len(centroids))
        near += float(((block - centroids[units]) ** 2).sum(dtype=np.float64))
        far += float(((block - mean) ** 2).sum(dtype=np.float64))
    used = counts[counts > 0] / len(features)
    return CodebookReport(
        frames=len(features),
        clusters=len(centroids),
        inertia=near / len(features),
        variance=far / len(features),
        dead=int((counts == 0).sum()),
        perplexity=float(2 ** -(used * np.log2(used)).sum()),
    )


def save_codebook(stream: IO[bytes], centroids: Floats) -> None:
    """Write centroids as npy, float32 [K, D]."""
    np.save(stream, np.ascontiguousarray(centroids, np.float32), allow_pickle=False)


def check_output(path: Path, force: bool = False) -> None:
    """Raises UserError: centroids cannot be written under this name, or a file is there and not to be replaced."""
    if path.suffix != ".npy" or path.is_dir():
        raise UserError(f"{path}: name a file that ends in .npy")
    if path.exists() and not force:
        raise UserError(f"{path}: is there already; name another file, or add --force to replace it")


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
