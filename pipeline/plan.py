"""What a build has to do: for every stage and shard, whether its column is up to date, and if not, why.

Nothing here touches storage: the plan follows from the manifest, a listing of objects, the clips and the settings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.columns import Task
from pipeline.fingerprint import fingerprint, media_digest, pack_inputs, recipe_key
from pipeline.networks.weights import MissingCheckpoint
from pipeline.registry import KINDS, STAGES, upstream, writers
from pipeline.selection import Selection
from pipeline.stage import Clip
from shards.manifest import (
    ColumnRef,
    Manifest,
    PackRef,
    Recipe,
    column_record,
    column_tar,
    difference,
    pack_record,
)

State = Literal["fresh", "stored", "stale", "missing"]


@dataclass(frozen=True)
class Cell:
    """One stage over one shard.

    Attributes:
        state: `fresh` is current and right; `stored` was computed by a build that did not come to its commit.
        why: in words, where it is not fresh.
        task: what would be run; None where it cannot be known yet.
        run: whether this build runs it.
        ref: the column that is current now.
        reuse: fingerprint of the column whose kept fields spare the network; also where the task is not known yet.
    """

    state: State
    why: str
    task: Task | None
    run: bool
    ref: ColumnRef | None
    reuse: str | None = None

    @property
    def mark(self) -> str | None:
        """Fingerprint of the column that is current after the build; None for none, or one not known yet."""
        if self.run or self.state == "fresh":
            return self.task.fingerprint if self.task else None
        return self.ref.fingerprint if self.ref else None

    @property
    def reads(self) -> dict[str, str]:
        """Upstream stage -> fingerprint, of the column that is current after the build."""
        if (self.run or self.state == "fresh") and self.task:
            return self.task.reads
        return self.ref.reads if self.ref else {}


@dataclass(frozen=True)
class Pack:
    """What a shard is packed from; `run` where that is not there yet.

    Attributes:
        marks: stage -> fingerprint of its column.
        behind: stages whose column read another one than that in `marks`.
        why: in words, where it is run although no column changes.
    """

    inputs: str
    marks: dict[str, str]
    behind: tuple[str, ...]
    run: bool
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """Cells by stage and shard, and packs by shard; a shard that lacks a column after the build has no pack.

    Attributes:
        missing: files that what is to be run needs and that are not at hand.
    """

    cells: dict[str, dict[str, Cell]]
    packs: dict[str, Pack] = field(default_factory=dict)
    missing: tuple[MissingCheckpoint, ...] = ()

    def tasks(self) -> list[Task]:
        """What to run, in an order in which everything comes after what it reads."""
        return [cell.task for row in self.cells.values() for cell in row.values() if cell.run and cell.task]

    def left(self) -> dict[str, dict[str, int]]:
        """Stage -> reason -> shards that are not up to date and stay so."""
        found: dict[str, dict[str, int]] = {}
        for stage, row in self.cells.items():
            for cell in row.values():
                if cell.state != "fresh" and not cell.run:
                    reasons = found.setdefault(stage, {})
                    reasons[cell.why] = reasons.get(cell.why, 0) + 1
        return found


def make_plan(
    recipes: Mapping[str, Recipe | None],
    shards: Mapping[str, Sequence[Clip]],
    manifest: Manifest | None,
    sizes: Mapping[str, int],
    fields: Sequence[str],
    selection: Selection,
    again: Collection[tuple[str, str]] = (),
    unfitted: Mapping[str, Recipe] | None = None,
    raw: Sequence[str] = (),
) -> Plan:
    """Compare what is wanted with what is there.

    Args:
        recipes: of the stages in dependency order; None for one whose networks are not known yet.
        shards: shard -> its clips, ordered by key.
        sizes: name -> size of every stored object.
        fields: to be packed.
        again: (stage, shard) whose work was asked for again.
        unfitted: recipes without their codebook, of the stages whose recipe is None for want of it.
        raw: those of `fields` that the schema stores as `jpg` and that are to be packed as `npy`.
    """
    made = writers(STAGES)
    stages, picked = selection.stages(), selection.pick_shards(list(shards))
    media = {shard: media_digest(clips) for shard, clips in shards.items()}
    cells: dict[str, dict[str, Cell]] = {}
    for stage, recipe in recipes.items():
        cells[stage] = {}
        sources = upstream(KINDS[stage], made)
        for shard in shards:
            reads = {name: cells[name][shard].mark for name in sources}
            unknown = [name for name in sources if cells[name][shard].run and not cells[name][shard].task]
            chosen = stage in stages and shard in picked
            anew = chosen and (selection.force or (stage, shard) in again)
            ref = manifest.columns.get(stage, {}).get(shard) if manifest else None
            missing = [name for name, mark in reads.items() if mark is None and name not in unknown]
            known = {name: mark for name, mark in reads.items() if mark}
            source = media[shard] if KINDS[stage].media else ""
            like = recipe or (unfitted or {}).get(stage)
            saving = None
            if like and ref and manifest and not anew and (ref.reads, ref.media) == (known, source):
                saving = _saving(stage, shard, like, ref, manifest, sizes)
            if missing:
                cells[stage][shard] = Cell("missing", f"waits for {' and '.join(missing)}", None, False, ref)
            elif recipe is None or unknown:
                why = f"follows {' and '.join(unknown)}"
                if recipe is None:
                    words = []
                    if like and ref and manifest:  # all but the centroids
                        like = like.model_copy(update={"codebook": manifest.recipes[stage][ref.recipe].codebook})
                        words = _reasons(_task(stage, shard, like, known, source, ref, anew), ref, manifest, anew)
                    why = "; ".join([*words, "centroids are fitted first"])
                cells[stage][shard] = _cell("stale" if ref else "missing", why, None, chosen, ref, saving)
            else:
                task = _task(stage, shard, recipe, known, source, ref, anew)
                state, why = _state(task, ref, manifest, sizes, anew)
                needed = saving if state in ("stale", "missing") else None
                cells[stage][shard] = _cell(state, why, task, chosen and state != "fresh", ref, needed)
    packs = {}
    for shard, clips in shards.items():
        marks = {stage: row[shard].mark for stage, row in cells.items()}
        whole = {stage: mark for stage, mark in marks.items() if mark is not None}
        if len(whole) == len(marks):
            inputs = pack_inputs(whole, fields, clips, raw)
            old = manifest.packs.get(shard) if manifest else None
            behind = tuple(
                stage
                for stage, row in cells.items()
                if any(whole[name] != mark for name, mark in row[shard].reads.items())
            )
            run = shard in picked and not _is_packed(shard, old, inputs, sizes)
            follows = any(row[shard].run for row in cells.values())
            why = _why_packed(old, inputs, raw, follows) if run and old else ""
            packs[shard] = Pack(inputs, whole, behind, run, why)
    return Plan(cells, packs)


def _task(
    stage: str, shard: str, recipe: Recipe, reads: dict[str, str], media: str, ref: ColumnRef | None, anew: bool
) -> Task:
    attempt = (ref.attempt if ref else 1) + anew
    mark = fingerprint(stage, recipe, reads, media, attempt)
    return Task(stage=stage, shard=shard, fingerprint=mark, recipe=recipe, reads=reads, media=media, attempt=attempt)


def _state(
    task: Task, ref: ColumnRef | None, manifest: Manifest | None, sizes: Mapping[str, int], anew: bool
) -> tuple[State, str]:
    if ref is not None and ref.fingerprint == task.fingerprint:
        if _is_whole(task.stage, task.shard, ref, sizes):
            return "fresh", ""
        return "stale", "its tar or record is missing or cut"
    words = ["not built yet"] if ref is None or manifest is None else _reasons(task, ref, manifest, anew)
    if column_record(task.stage, task.shard, task.fingerprint) in sizes:
        return "stored", f"{'; '.join(words)} (computed before, not committed)"
    return "missing" if ref is None else "stale", "; ".join(words)


def _is_whole(stage: str, shard: str, ref: ColumnRef, sizes: Mapping[str, int]) -> bool:
    whole = sizes.get(column_tar(stage, shard, ref.fingerprint, ref.sha256)) == ref.bytes
    return whole and column_record(stage, shard, ref.fingerprint) in sizes


def _saving(
    stage: str, shard: str, recipe: Recipe, ref: ColumnRef, manifest: Manifest, sizes: Mapping[str, int]
) -> bool | None:
    """Whether fields kept in the current column spare the network, where a new codebook is all that is new; None where
    more than that is."""
    old = manifest.recipes[stage][ref.recipe]
    if not KINDS[stage].differ_in_codebook(old, recipe):
        return None
    return KINDS[stage].keeps(old) and _is_whole(stage, shard, ref, sizes)


def _cell(state: State, why: str, task: Task | None, run: bool, ref: ColumnRef | None, saving: bool | None) -> Cell:
    """A cell whose reason also says whether its network runs; `saving` as `_saving` gives it."""
    if saving is None or ref is None:
        return Cell(state, why, task, run, ref)
    if not saving:
        return Cell(state, f"{why}; its network runs again, no features were kept", task, run, ref)
    task = task.model_copy(update={"reuse": ref.fingerprint}) if task else None
    return Cell(state, f"{why}; kept features are reused", task, run, ref, ref.fingerprint)


def _reasons(task: Task, ref: ColumnRef, manifest: Manifest, anew: bool) -> list[str]:
    """Why a column is no longer what is wanted, in words."""
    words = []
    if recipe_key(task.recipe) != ref.recipe:
        words += difference(manifest.recipes[task.stage][ref.recipe], task.recipe)
    if task.media != ref.media:
        words.append("source clips changed")
    changed = [name for name, mark in task.reads.items() if ref.reads.get(name) != mark]
    if changed:
        words.append(f"follows {' and '.join(changed)}")
    if anew:
        words.append("asked for again")
    return words


def _why_packed(old: PackRef, inputs: str, raw: Sequence[str], follows: bool) -> str:
    """Why a shard is packed again, in words; empty where changed columns say it."""
    if old.inputs == inputs:
        return "its tar or record is missing or cut"
    words = [f"{name} npy -> jpg" for name in old.raw if name not in raw]
    words += [f"{name} jpg -> npy" for name in raw if old.name and name not in old.raw]
    return "; ".join(words) or ("" if follows else "fields, speakers or texts changed")


def _is_packed(shard: str, old: PackRef | None, inputs: str, sizes: Mapping[str, int]) -> bool:
    if old is None or old.inputs != inputs or pack_record(shard, inputs) not in sizes:
        return False
    return old.name is None or sizes.get(old.name) == old.bytes
