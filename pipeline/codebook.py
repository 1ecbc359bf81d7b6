"""The dataset's own k-means centroids, fitted on the sound of its training clips."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.columns import Column, read_members
from pipeline.stages.speech import SpeechConfig
from shards.codec import decode
from shards.dataset import Dataset
from shards.schema import FIELDS
