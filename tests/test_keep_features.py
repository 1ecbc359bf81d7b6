"""Kept features: another codebook without the encoder, to the same bytes, and plans that say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.build
from pipeline.build import build, plan_build
from pipeline.columns import load_column, read_members
from pipeline.config import BuildConfig
from pipeline.estimate import estimate
from pipeline.plan import Cell
from pipeline.selection import Selection
from pipeline.stage import Resources
from pipeline.survey import Survey, survey
from pipeline.units import load_codebook
from pipeline.work import Crew
from pipeline.worker import Order, Worker
from shards.codec import decode
from shards.config import load_config
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import ColumnRef
from shards.schema import FIELDS

SOUND = Selection(only=("audio", "speech"))


class Here(Crew):
    """Does tasks in this process."""

    def _execute(self, orders: list[Order], on_done: Any) -> None:
        worker = Worker(Resources(), self._site.uri, self._config)
        while orders:
            order = orders.pop(0)
            orders += on_done(order.task, worker.run(order))


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.build, "Crew", Here)


def config(**speech: Any) -> BuildConfig:
    speech = {"clusters": 20, "fit_frames": 2000, "keep_features": True, **speech}
    return load_config(BuildConfig, base={"pack": {"shard_clips": 6}, "speech": speech})


def speech_refs(dataset: Dataset) -> dict[str, ColumnRef]:
    return dataset.manifest().columns["speech"]


def cells(uri: str, wanted: BuildConfig, selection: Selection = SOUND) -> tuple[Survey, dict[str, Cell]]:
    there = survey(None, uri, wanted)
    return there, plan_build(there, selection).cells["speech"]


@pytest.fixture(scope="module")
def kept(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Sound and speech of the corpus, with features."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.build, "Crew", Here)
        build(str(corpus), str(folder), config(), SOUND)
    return Dataset(str(folder))


def test_units_are_assigned_from_what_is_stored(kept: Dataset) -> None:
    manifest = kept.manifest()
    assert manifest.codebook is not None
    centroids = load_codebook(Path(kept.uri) / manifest.codebook.name).astype(np.float64)
    for shard, ref in speech_refs(kept).items():
        column = load_column(kept, "speech", shard, ref.fingerprint)
        assert column is not None
        names = ("units", "features")
        for key, raw in zip(column.clips, read_members(kept, column, list(column.clips), names), strict=True):
            units, features = (decode(FIELDS[name], raw[name], column.clips[key].frames) for name in names)
            assert features.dtype == np.float16
            distance = ((features.astype(np.float64)[:, None] - centroids) ** 2).sum(2)
            chosen = distance[np.arange(len(units)), units]
            np.testing.assert_allclose(chosen, distance.min(1), rtol=1e-5)


def test_another_codebook_needs_no_encoder_and_gives_the_same_bytes(
    corpus: Path, kept: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = config(clusters=24, seed=3)
    build(str(corpus), str(tmp_path / "anew"), other, SOUND)
    there, planned = cells(kept.uri, other)
    refs = speech_refs(kept)
    assert {shard: cell.reuse for shard, cell in planned.items()} == {
        shard: ref.fingerprint for shard, ref in refs.items()
    }
    assert {cell.why for cell in planned.values()} == {
        "clusters 20 -> 24; seed 1369 -> 3; centroids are fitted first; kept features are reused"
    }
    cost = estimate(plan_build(there, SOUND), there.shards, there.manifest, there.config)
    assert cost.work.get("speech", 0) == 0
    assert "codebook" not in cost.work

    def refuse(*args: Any) -> None:
        raise AssertionError("the encoder is not needed")

    monkeypatch.setattr("pipeline.stages.speech.make_encoder", refuse)
    monkeypatch.setattr("pipeline.codebook.make_encoder", refuse)
    # On a copy of the manifest's state: the fixture stays as it is for the other tests.
    import shutil

    shutil.copytree(kept.uri, tmp_path / "again")
    again, anew = Dataset(str(tmp_path / "again")), Dataset(str(tmp_path / "anew"))
    assert build(None, again.uri, other, SOUND).tasks == len(refs)
    for shard, ref in speech_refs(again).items():
        full = speech_refs(anew)[shard]
        assert (ref.fingerprint, ref.sha256, ref.clips) == (full.fingerprint, full.sha256, full.clips)
        assert (ref.reuse, full.reuse) == (refs[shard].fingerprint, None)
    book, fitted = again.manifest().codebook, anew.manifest().codebook
    assert book is not None
    assert book == fitted
    # And from these again, as their features were carried on.
    there, planned = cells(again.uri, config(clusters=24, seed=4))
    assert all(cell.reuse for cell in planned.values())


def test_given_centroids_reuse_too_and_say_what_differs(kept: Dataset, tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.random.default_rng(0).normal(size=(20, 384)).astype(np.float32))
    _, planned = cells(kept.uri, config(centroids=str(tmp_path / "c.npy")))
    assert {cell.why for cell in planned.values()} == {"centroids differ; kept features are reused"}
    assert all(cell.task and cell.task.reuse for cell in planned.values())


@pytest.mark.parametrize(
    ("changed", "selection"),
    [
        ({"layer": 2}, SOUND),
        ({"precision": "bfloat16"}, SOUND),
        ({"keep_features": False}, SOUND),
        ({"seed": 2}, Selection(only=("speech",), force=True)),
    ],
)
def test_other_features_are_not_reused(kept: Dataset, changed: dict[str, Any], selection: Selection) -> None:
    _, planned = cells(kept.uri, config(**changed), selection)
    assert all(cell.reuse is None and cell.run for cell in planned.values())


def test_other_sound_is_not_reused(kept: Dataset) -> None:
    wanted = config(seed=2).model_copy(update={"audio": config().audio.model_copy(update={"silence_dbfs": -50.0})})
    _, planned = cells(kept.uri, wanted)
    assert all(cell.reuse is None for cell in planned.values())


def test_features_that_are_gone_are_computed(kept: Dataset, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(kept.uri, tmp_path / "cut")
    cut = Dataset(str(tmp_path / "cut"))
    wanted = config(seed=2)
    shard, ref = next(iter(speech_refs(cut).items()))
    (lost,) = Path(cut.uri, "columns", "speech").glob(f"{shard}-{ref.fingerprint}-*.tar")
    lost.unlink()
    _, planned = cells(cut.uri, wanted)
    assert [name for name, cell in planned.items() if cell.reuse is None] == [shard]
    build(None, cut.uri, wanted, SOUND)
    assert [name for name, ref in speech_refs(cut).items() if ref.reuse is None] == [shard]


def test_without_kept_features_the_plan_says_what_a_codebook_costs(corpus: Path, tmp_path: Path) -> None:
    uri = str(tmp_path / "plain")
    build(str(corpus), uri, config(keep_features=False), SOUND)
    there, planned = cells(uri, config(keep_features=False, clusters=24))
    words = "clusters 20 -> 24; centroids are fitted first; its network runs again, no features were kept"
    assert {cell.why for cell in planned.values()} == {words}
    cost = estimate(plan_build(there, SOUND), there.shards, there.manifest, there.config)
    took = sum(ref.seconds for ref in speech_refs(Dataset(uri)).values())
    assert cost.work["speech"] >= took  # per clip of the shards, some of which have no usable sound
    assert 0 < cost.work["codebook"] <= cost.work["speech"]
    # The fit is one thread's work, and the rest waits for it.
    shared = sum(cost.work.values()) - cost.work["codebook"]
    assert cost.seconds == pytest.approx(cost.work["codebook"] + shared / cost.cpus)


def test_packing_features_that_are_not_kept_is_refused() -> None:
    with pytest.raises(UserError, match=r"^pack\.fields names features, .*speech\.keep_features=true$"):
        load_config(BuildConfig, None, ["pack.fields=[wav, features]"])
    load_config(BuildConfig, None, ["pack.fields=[wav, features]", "speech.keep_features=true"])
