"""The dataset's own k-means centroids, fitted on the sound of its training clips."""

from __future__ import annotations
