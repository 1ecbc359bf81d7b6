"""The computing part of a build: the codebook, then every column that is missing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import BuildConfig
from pipeline.plan import Plan, Task, columns_of, make_plan, weights_digest
from pipeline.registry import STAGES
from pipeline.stage import Clip
from pipeline.stages.speech import Speech
from shards.dataset import Dataset, Manifest
from shards.progress import Progress
from shards.storage import local_path


class Work:
    """The computing part of a build: starts Ray only when there is something to run."""

    def __init__(self, dataset: Dataset, config: BuildConfig, shards: dict[str, list[Clip]]) -> None:
        self.dataset, self.config, self.shards = dataset, config, shards
        self.ran = 0

    def codebook(self, previous: Manifest | None) -> dict[str, str] | None:
        """The dataset's own k-means centroids: those it has, or new ones fitted on its training sound.

        Returns object name and hash of the fit's settings; None where the configuration names a file of centroids, or
        where no clip has usable sound to fit on.
        """
        speech = self.config.speech
        if speech.centroids is not None:
            return None
        # A codebook stays while its settings stay, so that adding clips does not change the units of the others.
        weights = weights_digest(Speech(speech).weights())
        settings = {**speech.model_dump(exclude={"centroids"}), "weights": weights}
        fit = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        known = previous.codebook if previous else None
        if known and known["fit"] == fit and self.dataset.store.exists(known["name"]):
            return known
        stages = tuple(kind for kind in STAGES if kind.name == "audio")
        plan = make_plan(self.dataset, self.config, self.shards, None, only=stages)
        self._execute(plan.tasks, None)
        name = self._fit(plan, fit)
        return {"name": name, "fit": fit} if name else None

    def run(self, codebook: dict[str, str] | None) -> Plan:
        """Run whatever column is missing."""
        centroids = self.dataset.store.path(codebook["name"]).resolve() if codebook else None
        # Without centroids there is no clip that units could be made for: all are refused by then.
        stages = STAGES if centroids or self.config.speech.centroids else tuple(k for k in STAGES if k is not Speech)
        plan = make_plan(self.dataset, self.config, self.shards, centroids, only=stages)
        self._execute(plan.tasks, centroids)
        return plan

    def _fit(self, plan: Plan, fit: str) -> str | None:
        from pipeline.codebook import fit_from_columns

        every = [column for shard in self.shards for column in columns_of(self.dataset, plan, shard, ["audio"])]
        usable = [column for column in every if column.clips]
        columns = [column for column in usable if column.shard.startswith("train-")] or usable
        if not columns:
            return None
        inputs = hashlib.sha256("".join([fit, *(column.sha256 for column in columns)]).encode()).hexdigest()[:16]
        name = f"codebooks/units-{inputs}.npy"
        if not self.dataset.store.exists(name):
            fit_from_columns(self.dataset, columns, self.config.speech, name)
        return name

    def _execute(self, tasks: Sequence[Task], centroids: Path | None) -> None:
        if not tasks:
            return
        from pipeline.runner import Runner, ray_session

        total = sum(len(self.shards[task.shard]) for task in tasks)
        with ray_session(self.config.run), Progress("build", total, "clip stages") as progress:
            arguments = (os.path.abspath(local_path(self.dataset.uri)), self.config, centroids)
            runner = Runner(arguments, self.shards, self.config.run.retries)
            runner.execute(
                tasks,
                lambda task, kept, refused: progress.advance(
                    len(self.shards[task.shard]), f"{task.stage} {task.shard}"
                ),
            )
        self.ran += len(tasks)
