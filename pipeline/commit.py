"""The commit of a build: new tables, index and manifest from what was there and what was made, checked for losses."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import BuildConfig
from pipeline.fingerprint import recipe_key
from pipeline.pack import Packed
from pipeline.plan import Plan
from pipeline.stage import Clip
from pipeline.survey import Survey
from shards.dataset import ClipRow, Dataset, QuarantineRow
from shards.errors import UserError
from shards.manifest import Codebook, ColumnRef, Index, Manifest, PackedShard, PackRef, Recipe
from shards.schema import FIELDS, SCHEMA_VERSION
from shards.storage import Conflict


def commit_clips(survey: Survey) -> Survey:
    """Enter clips that the dataset does not know yet, as pending, so that their shards and digests are settled whatever
    happens to the build; everything else stays as it was.

    Raises:
        Conflict: another build committed meanwhile.
    """
    known = {row.key for row in survey.rows}
    fresh = [
        _row(clip, shard, "pending", 0)
        for shard, clips in survey.shards.items()
        for clip in clips
        if clip.key not in known
    ]
    if not fresh:
        return survey
    dataset, old, config = survey.dataset, survey.manifest, survey.config
    rows = sorted([*survey.rows, *fresh], key=lambda row: row.key)
    clips = dataset.put_rows(ClipRow, rows)
    counts = dict(sorted(Counter(row.shard for row in rows).items()))
    if old is None:
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            profile=config.profile,
            source=survey.source,
            config=recorded(config),
            codebook=None,
            recipes={},
            columns={},
            shards=counts,
            packs={},
            clips=clips,
            quarantine=dataset.put_rows(QuarantineRow, []),
            index=dataset.put_index(make_index(dataset, config, {}, {}, {}, None)),
        )
    else:
        manifest = old.model_copy(update={"clips": clips, "shards": counts})
    dataset.commit(manifest, survey.version)
    current, version = dataset.current()
    if current != manifest:
        raise Conflict(dataset.uri)
    dataset.refresh_copies(manifest)
    return replace(survey, manifest=manifest, version=version, rows=rows)


def commit_build(
    survey: Survey,
    plan: Plan,
    recipes: Mapping[str, Recipe | None],
    columns: Mapping[tuple[str, str], ColumnRef],
    packed: Mapping[str, Packed],
    codebook: Codebook | None,
) -> tuple[Manifest, bool]:
    """Make the result of a plan current, unless it is so already; returns the manifest and whether it changed.

    Args:
        columns: (stage, shard) -> what was made.
        packed: shard -> what was made.

    Raises:
        Conflict: another build committed meanwhile.
        UserError: networks of different widths were mixed, or a narrowed build left out shards that lost clips.
        RuntimeError: a clip would be lost.
    """
    dataset, old, config = survey.dataset, survey.manifest, survey.config
    current: dict[str, dict[str, ColumnRef]] = {}
    for stage, row in plan.cells.items():
        refs = {shard: columns[stage, shard] if cell.run else cell.ref for shard, cell in row.items()}
        current[stage] = {shard: ref for shard, ref in refs.items() if ref is not None}
    packs: dict[str, PackRef] = {}
    for shard in survey.shards:
        if shard in packed:
            packs[shard] = packed[shard].ref()
        elif old and shard in old.packs:
            packs[shard] = old.packs[shard]
    clips, quarantine = _tables(survey, packs, packed)
    _check(survey.shards, packs, clips, quarantine)
    known = _recipes(current, recipes, old)
    index = make_index(dataset, config, packs, packed, known, old)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        profile=config.profile,
        source=survey.source,
        config=recorded(config),
        codebook=codebook,
        recipes=known,
        columns=current,
        shards={shard: len(members) for shard, members in survey.shards.items()},
        packs=packs,
        clips=dataset.put_rows(ClipRow, clips),
        quarantine=dataset.put_rows(QuarantineRow, quarantine),
        index=dataset.put_index(index),
    )
    changed = manifest != old
    if changed:
        dataset.commit(manifest, survey.version)
    dataset.refresh_copies(manifest)
    return manifest, changed


def recorded(config: BuildConfig) -> dict[str, Any]:
    """The configuration as stored: what decides content, not how it ran. Files are named so that the settings mean the
    same from another folder."""
    tree = config.model_dump(mode="json", exclude={"run"})
    for section, key in (("source", "valid_ids"), ("speech", "centroids")):
        if tree[section][key] is not None:
            tree[section][key] = str(Path(tree[section][key]).absolute())
    return tree


def make_index(
    dataset: Dataset,
    config: BuildConfig,
    packs: Mapping[str, PackRef],
    packed: Mapping[str, Packed],
    recipes: Mapping[str, Mapping[str, Recipe]],
    old: Manifest | None,
) -> Index:
    """The index of the packed shards `packs`: those just made, and the others from the index before.

    Raises:
        UserError: shards disagree on the width of a feature.
    """
    before = dataset.index(old) if old else None
    entries = {shard.name: shard for shard in before.shards} if before else {}
    widths: dict[str, int] = {}
    shards: list[PackedShard] = []
    for shard, ref in sorted(packs.items()):
        made = packed.get(shard)
        for name, width in (made.widths if made else before.widths if before else {}).items():
            if widths.setdefault(name, width) != width:
                raise UserError(f"{shard}: {name} is {width} there and {widths[name]} in shards before it")
        entry = made.packed if made else entries[ref.name] if ref.name else None
        if entry is not None:
            shards.append(entry)
    fields = ["meta", *(name for name in FIELDS if name in config.pack.fields and name != "meta")]
    if shards:
        fields = [name for name in FIELDS if all(name in shard.clips[0].members for shard in shards)]
    used: dict[str, dict[str, Recipe]] = defaultdict(dict)
    for entry in shards:
        for stage, key in entry.recipes.items():
            used[stage][key] = recipes.get(stage, {}).get(key) or _before(before, stage, key)
    return Index(
        schema_version=SCHEMA_VERSION,
        profile=config.profile,
        fields=fields,
        widths=widths,
        recipes=dict(used),
        shards=shards,
    )


def _before(index: Index | None, stage: str, key: str) -> Recipe:
    assert index is not None, f"{stage}: unknown recipe {key}"
    return index.recipes[stage][key]


def _recipes(
    current: Mapping[str, Mapping[str, ColumnRef]], recipes: Mapping[str, Recipe | None], old: Manifest | None
) -> dict[str, dict[str, Recipe]]:
    known: dict[str, dict[str, Recipe]] = {}
    for stage, refs in current.items():
        recipe = recipes[stage]
        ours = {recipe_key(recipe): recipe} if recipe else {}
        theirs = old.recipes.get(stage, {}) if old else {}
        known[stage] = {key: ours.get(key) or theirs[key] for key in sorted({ref.recipe for ref in refs.values()})}
    return known


def _tables(
    survey: Survey, packs: Mapping[str, PackRef], packed: Mapping[str, Packed]
) -> tuple[list[ClipRow], list[QuarantineRow]]:
    """A row per clip, and a row per refused clip."""
    old = survey.manifest
    before = {row.key: row for row in survey.rows}
    lost = {row.key: row for row in survey.dataset.quarantine(old)} if old else {}
    clips: list[ClipRow] = []
    refused: list[QuarantineRow] = []
    for shard, members in survey.shards.items():
        record = packed.get(shard)
        frames = {clip.key: clip.frames for clip in record.packed.clips} if record and record.packed else {}
        for clip in members:
            if record is not None and clip.key in record.lost:
                loss = record.lost[clip.key]
                detail = (loss.stage, loss.reason.value, loss.message, loss.traceback, loss.attempt)
                refused.append(QuarantineRow(clip.key, clip.uri, clip.split, shard, *detail, loss.reason.retriable))
                clips.append(_row(clip, shard, "quarantined", 0))
            elif record is not None:
                clips.append(_row(clip, shard, "packed", frames[clip.key]))
            elif shard not in packs:
                clips.append(_row(clip, shard, "pending", 0))
            else:
                row = before.get(clip.key)
                if row is None or row.shard != shard:
                    raise UserError(f"{clip.key}: is new in {shard}, which was left out; build without --shards")
                same = row.digest == clip.digest
                clips.append(_row(clip, shard, row.state, row.frames) if same else row)
                if clip.key in lost:
                    refused.append(replace(lost[clip.key], uri=clips[-1].uri))
    return sorted(clips, key=lambda row: row.key), sorted(refused, key=lambda row: row.key)


def _row(clip: Clip, shard: str, state: str, frames: int) -> ClipRow:
    media = (clip.uri, clip.bytes, clip.stamp, clip.digest)
    return ClipRow(clip.key, *media, clip.split, clip.speaker, clip.text, clip.start, clip.end, frames, shard, state)


def _check(
    shards: Mapping[str, Sequence[Clip]],
    packs: Mapping[str, PackRef],
    clips: Sequence[ClipRow],
    quarantine: Sequence[QuarantineRow],
) -> None:
    """Clips in = clips packed + clips quarantined, in every shard that is built and in the tables."""
    states = Counter((row.shard, row.state) for row in clips)
    rows = Counter(row.shard for row in quarantine)
    for shard, members in shards.items():
        if shard not in packs:
            continue
        kept, refused = packs[shard].clips, sum(packs[shard].refused.values())
        said = (states[shard, "packed"], states[shard, "quarantined"], rows[shard])
        if len(members) != kept + refused and said == (kept, refused, refused):
            raise UserError(f"{shard}: lost clips since it was built and was left out; build without --shards")
        if len(members) != kept + refused or said != (kept, refused, refused):
            raise RuntimeError(f"{shard}: {len(members)} clips in, {kept} packed, {refused} refused; tables say {said}")
