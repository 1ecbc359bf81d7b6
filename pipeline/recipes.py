"""What the stages are in a build: their recipes, with the networks that these need at hand."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from pipeline.codebook import check_given_centroids, usable_codebook
from pipeline.fingerprint import likely_recipe
from pipeline.networks.weights import MissingCheckpoint, fetch_all
from pipeline.plan import Plan, make_plan
from pipeline.registry import STAGES, make_stage
from pipeline.selection import Selection
from pipeline.stages.faces import Faces
from pipeline.stages.speech import Speech
from pipeline.survey import Survey
from shards.local_store import local_copy
from shards.manifest import Codebook, Recipe


@dataclass(frozen=True)
class Recipes:
    """What the stages are.

    Attributes:
        known: recipe of each stage; None for units whose centroids are not fitted yet.
        unfitted: recipe of these, without centroids.
        missing: stage -> its network, where that is not at hand and was assumed.
        book: the dataset's own centroids.
        fetched: whether a network was fetched for them.
    """

    known: dict[str, Recipe | None]
    unfitted: dict[str, Recipe]
    missing: dict[str, MissingCheckpoint]
    book: Codebook | None
    fetched: bool = False


def stage_recipes(there: Survey, book: Codebook | None = None) -> Recipes:
    """The recipe of each stage, without fetching any network.

    Args:
        book: centroids that were just fitted; None for those that the dataset has, if they are of these settings.

    Raises:
        UserError: a network that cannot be read, centroids that do not fit.
    """
    config = there.config
    check_given_centroids(config.speech)
    book = book or usable_codebook(there.dataset, there.manifest, config)
    centroids = local_copy(there.dataset.store, book.name) if book else None
    recipes = Recipes({}, {}, {}, book)
    for kind in STAGES:
        recipe, missing = likely_recipe(make_stage(kind, config, centroids), there.manifest)
        unfitted = kind is Speech and not (config.speech.centroids or centroids)
        recipes.known[kind.name] = None if unfitted else recipe
        if unfitted:
            recipes.unfitted[kind.name] = recipe
        if missing:
            recipes.missing[kind.name] = missing
    return recipes


def missing_networks(there: Survey, recipes: Recipes, plan: Plan, selection: Selection) -> list[MissingCheckpoint]:
    """Networks that the build needs and that are not at hand."""
    needed = {stage for stage, row in plan.cells.items() if any(cell.run for cell in row.values())}
    needed |= recipes.unfitted.keys() & selection.stages()
    if there.scans:  # clips will come that nobody knows yet
        needed |= selection.stages() | {Faces.name}
    return [missing for stage, missing in recipes.missing.items() if stage in needed]


def supply(there: Survey, selection: Selection, again: Collection[tuple[str, str]] = ()) -> Recipes:
    """The recipe of each stage, with the networks of those that are to be run at hand: all are fetched, or none.

    Raises:
        UserError: names all that are missing.
    """
    fetched = False
    while True:
        recipes = stage_recipes(there)
        plan = plan_with(there, recipes, selection, again)
        missing = missing_networks(there, recipes, plan, selection)
        if not missing:
            return replace(recipes, fetched=fetched)
        fetch_all(missing)
        fetched = True


def plan_with(there: Survey, recipes: Recipes, selection: Selection, again: Collection[tuple[str, str]] = ()) -> Plan:
    """What the selection has to run, with these recipes."""
    packing = there.config.pack
    return make_plan(
        recipes.known,
        there.shards,
        there.manifest,
        there.sizes,
        packing.fields,
        selection,
        again,
        recipes.unfitted,
        packing.raw,
    )
