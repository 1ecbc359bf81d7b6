"""`build`: from a source to a dataset. Does what is missing, keeps what is there, commits at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.codebook import FitTask, keep_given
from pipeline.columns import Task, load_column
from pipeline.commit import commit_build, commit_clips
from pipeline.config import BuildConfig
from pipeline.digests import Known, known_digests
from pipeline.estimate import estimate
from pipeline.fingerprint import recipe_key
from pipeline.pack import PackTask
from pipeline.plan import Plan
from pipeline.recipes import Recipes, missing_networks, plan_with, stage_recipes, supply
from pipeline.recordings import Scan, forget_refused
from pipeline.registry import STAGES
from pipeline.run_record import last_run
from pipeline.selection import Selection, refuse_waiting
from pipeline.stage import Reason
from pipeline.survey import Survey, Wanted, cut_words, survey
from pipeline.words import count
from pipeline.work import Crew, Site
from pipeline.worker import Work
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import Codebook, Manifest, Recipe
from shards.schema import VIDEO_RATE
from shards.storage import Conflict

ROUNDS = 8
"""How often a build takes up what other builds committed meanwhile."""


@dataclass(frozen=True)
class Summary:
    """What a build did.

    Attributes:
        scanned: recordings looked through for segments.
        tasks: columns computed; `kept` those that were there before.
        packed: packed shards written; `shards` all that the dataset has.
        pending: clips of shards that lack a column.
        quarantined: reason code -> clips.
        left: columns that are not up to date and were not chosen.
        changed: whether the dataset is another than before.
    """

    dataset: str
    clips: int
    seconds: float
    scanned: int
    tasks: int
    kept: int
    packed: int
    shards: int
    pending: int
    quarantined: dict[str, int]
    left: int
    changed: bool
    notes: list[str] = field(default_factory=list)


def build(
    source: str | None,
    uri: str,
    wanted: BuildConfig | Wanted,
    selection: Selection | None = None,
    drop_missing: bool = False,
    events: bool = False,
) -> Summary:
    """Build or complete the dataset at `uri`, or the selected part of it.

    Whatever another build commits meanwhile is kept: the result is as if one had run after the other.

    Args:
        source: where the clips are; None for where the dataset's last build found them.
        wanted: settings, whole or as the user gives them.
        drop_missing: take clips out of the dataset that the source no longer has.
        events: show what happens as JSON lines.

    Raises:
        UserError: unusable source, a dataset of another profile or schema, clips that are gone from the source, a task
            that failed for good.
    """
    selection = selection or Selection()
    known: Known = {}
    scans: dict[str, Scan] = {}
    with Site(uri, events) as site:
        if selection.requeue:
            forget_refused(Dataset(uri), selection.requeue)
        for _ in range(ROUNDS):
            there = survey(source, uri, wanted, known, scans, site)
            _refuse_losses(there, selection, drop_missing)
            _refuse_waiting(there, selection)
            if there.scans:
                # Shards are not known yet; and what was found in recordings goes by the detector's digest.
                if supply(there, replace(selection, shards=None)).fetched:
                    continue
                known = {**known, **known_digests(there.recordings)}
                scans |= _scan(there, site)
                continue
            try:
                recipes = supply(there, selection, _again(there, selection)[0])
                return _build(commit_clips(there), recipes, selection, len(scans), site)
            except Conflict:
                continue
    raise UserError(f"{uri}: other builds keep committing to this dataset; what is done is kept, build again")


def plan_build(there: Survey, selection: Selection) -> Plan:
    """What `build` would do, as far as it can be known before centroids are fitted; nothing is fetched.

    Raises:
        UserError: every chosen stage lacks what it reads, or the settings cannot be used.
    """
    _refuse_waiting(there, selection)
    again, _ = _again(there, selection)
    recipes = stage_recipes(there)
    plan = plan_with(there, recipes, selection, again)
    return replace(plan, missing=tuple(missing_networks(there, recipes, plan, selection)))


def _scan(there: Survey, site: Site) -> dict[str, Scan]:
    """What is in the recordings that nobody looked through yet, by task."""
    crew = Crew(site, there.config, {name: [recording] for name, (_, recording) in there.scans.items()})
    crew.run([task for task, _ in there.scans.values()], None)
    return crew.scans


def _build(there: Survey, recipes: Recipes, selection: Selection, scanned: int, site: Site) -> Summary:
    dataset, manifest, config = there.dataset, there.manifest, there.config
    again, notes = _again(there, selection)
    plan = plan_with(there, recipes, selection, again)
    crew = Crew(site, config, there.shards)
    if any(row for row in plan.cells.values()):
        site.board(config).expect(estimate(plan, there.shards, manifest, config, last_run(dataset)))

    def follow(book: Codebook | None) -> tuple[list[Work], str | None]:
        nonlocal recipes, plan
        # Without sound there is no clip that units could be made for: all are refused by the audio stage.
        known: dict[str, Recipe | None] = {name: recipe for name, recipe in recipes.known.items() if recipe}
        recipes = stage_recipes(there, book) if book else replace(recipes, known=known)
        plan = plan_with(there, recipes, selection, again)
        return [*plan.tasks(), *_packs(there, recipes, plan)], book.name if book else None

    given = keep_given(dataset, config.speech) if "speech" in selection.stages() else None
    if recipes.known["speech"] is None and "speech" in selection.stages():
        sound, fit = _fit(there, recipes)
        crew.run([*sound, fit, *plan.tasks()], None, follow)
    else:
        tasks: list[Work] = [*plan.tasks(), *_packs(there, recipes, plan)]
        used = given or recipes.book
        crew.run(tasks, used.name if used else None)
    site.dismiss()
    book = given or recipes.book or (manifest.codebook if manifest else None)
    after, changed = commit_build(there, plan, recipes.known, crew.columns, crew.packed, book)
    kept = sum(cell.state == "fresh" for row in plan.cells.values() for cell in row.values())
    return _summary(there, after, plan, crew, scanned, kept + len(plan.tasks()), changed, notes)


def _packs(there: Survey, recipes: Recipes, plan: Plan) -> list[PackTask]:
    packing = there.config.pack
    return [
        PackTask(
            shard=shard,
            inputs=pack.inputs,
            reads=pack.marks,
            recipes={stage: _recipe_key(plan, recipes.known, stage, shard) for stage in pack.marks},
            behind=pack.behind,
            fields=tuple(name for name in packing.fields if name != "meta"),
            raw=packing.raw,
        )
        for shard, pack in plan.packs.items()
        if pack.run
    ]


def _fit(there: Survey, recipes: Recipes) -> tuple[list[Task], FitTask]:
    """The fit of centroids, and what it needs: the whole dataset's sound, whatever was selected, since their bytes must
    not depend on that."""
    sound = {"audio": recipes.known["audio"], "speech": None}
    plan = plan_with(there, replace(recipes, known=sound), Selection())
    marks = {shard: cell.mark for shard, cell in plan.cells["audio"].items() if cell.mark}
    kept = {shard: cell.reuse for shard, cell in plan.cells["speech"].items() if cell.reuse}
    return plan.tasks(), FitTask(marks=marks, kept=kept)


def _recipe_key(plan: Plan, recipes: Mapping[str, Recipe | None], stage: str, shard: str) -> str:
    cell, recipe = plan.cells[stage][shard], recipes[stage]
    if cell.ref is not None and not cell.run:
        return cell.ref.recipe
    assert recipe is not None, f"{stage} runs without a recipe"
    return recipe_key(recipe)


def _refuse_losses(there: Survey, selection: Selection, drop_missing: bool) -> None:
    if not there.gone:
        return
    some = _some(there.gone)
    if not drop_missing:
        recut = set(there.recut)
        lost = [key for key in there.gone if key not in recut]
        words = []
        if lost:
            words.append(f"does not have, or cannot read, {_some(lost)}; name a source that has all clips")
        if there.recut:
            words.append(
                f"its recordings are {cut_words(there)}, without {_some(there.recut)}; go back to the settings, or the "
                "media, that they were cut by"
            )
        raise UserError(f"{there.source}: {', and '.join(words)}, or add --drop-missing to go on without them")
    if selection != Selection():
        raise UserError(f"--drop-missing takes out {some}; do that without narrowing the build")
    there.notes.append(f"taken out, as the source no longer has or cannot read them, or cuts otherwise: {some}")


def _refuse_waiting(there: Survey, selection: Selection) -> None:
    columns = there.manifest.columns if there.manifest else {}
    # While recordings are to be looked through, shards are not known yet. A wrong one is said before anything is done.
    picked = {shard for refs in columns.values() for shard in refs}
    picked = picked if there.scans else selection.pick_shards(list(there.shards))
    refuse_waiting(selection.stages(), [stage for stage, refs in columns.items() if picked & refs.keys()])


def _some(keys: Sequence[str]) -> str:
    return f"{count(len(keys), 'clip')} of the dataset, e.g. {keys[0]}"


def _again(there: Survey, selection: Selection) -> tuple[set[tuple[str, str]], list[str]]:
    """(stage, shard) that refused clips for the reasons to be tried again, and a note where there are none."""
    if not selection.requeue or there.manifest is None:
        return set(), []
    rows = [row for row in there.dataset.quarantine(there.manifest) if row.reason in selection.requeue]
    found: set[tuple[str, str]] = set()
    # Where stages disagreed on a clip's length, whoever found out, the ones that decode say it anew.
    decoding = [kind.name for kind in STAGES if kind.media]
    differ = [row for row in rows if row.reason == Reason.AUDIO_LENGTH and row.stage not in decoding]
    found |= {(name, row.shard) for row in differ for name in decoding}
    for shard in sorted({row.shard for row in rows} & set(there.shards)):
        for stage, refs in there.manifest.columns.items():
            ref = refs.get(shard)
            column = load_column(there.dataset, stage, shard, ref.fingerprint) if ref and ref.refused else None
            if column and any(refusal.reason.value in selection.requeue for refusal in column.refused):
                found.add((stage, shard))
    return found, [] if found else [f"no clip is in quarantine for {', '.join(selection.requeue)}"]


def _summary(
    there: Survey,
    manifest: Manifest,
    plan: Plan,
    crew: Crew,
    scanned: int,
    known: int,
    changed: bool,
    notes: list[str],
) -> Summary:
    notes = [*there.notes, *notes]
    for stage, reasons in plan.left().items():
        for why, shards in reasons.items():
            notes.append(f"left as it is: {stage} of {count(shards, 'shard')} ({why})")
    quarantined: Counter[str] = Counter()
    for pack in manifest.packs.values():
        quarantined.update(pack.refused)
    if quarantined and not any(pack.clips for pack in manifest.packs.values()):
        notes.append("no clip is usable: `f2v quarantine` says why")
    for reason in (reason.value for reason in Reason if reason.retriable and quarantined[reason.value]):
        faults = count(quarantined[reason], "clip")
        notes.append(f"{faults} failed by a fault of machine or code; --requeue {reason} tries again")
    packs = manifest.packs
    return Summary(
        dataset=there.dataset.uri,
        clips=sum(pack.clips for pack in packs.values()),
        seconds=sum(pack.frames for pack in packs.values()) / VIDEO_RATE,
        scanned=scanned,
        tasks=crew.ran,
        kept=max(0, known - crew.ran),
        packed=crew.packs,
        shards=sum(pack.name is not None for pack in packs.values()),
        pending=sum(count for shard, count in manifest.shards.items() if shard not in packs),
        quarantined=dict(sorted(quarantined.items())),
        left=sum(sum(reasons.values()) for reasons in plan.left().values()),
        changed=changed,
        notes=notes,
    )
