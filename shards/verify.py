"""`verify`: hold a dataset's objects against its manifest, and the packed shards against index, schema and tables."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from shards.codec import decode
from shards.dataset import ClipRow, Dataset, QuarantineRow
from shards.manifest import (
    CLIPS,
    COPIES,
    HISTORY,
    INDEX,
    MANIFEST,
    OWN,
    QUARANTINE,
    RUNS,
    SEGMENTS,
    Index,
    Manifest,
    PackedClip,
    PackedShard,
    column_record,
    column_tar,
    pack_record,
)
from shards.progress import Progress
from shards.schema import FIELDS, SchemaError, check_value, stored
from shards.storage import BLOCK, LOCK, StorageError
from shards.tar import Member, TarError, read_tar

Places = Mapping[str, tuple[int, int]]
REDO = "delete it and build again"


@dataclass
class Verdict:
    """What was checked and what is off; `problems` and `notes` are lines for the user."""

    shards: int = 0
    clips: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(uri: str, full: bool = True) -> Verdict:
    """Check a dataset.

    Quick: every object that the manifest names is there with its size, index and tables agree with the manifest,
    conservation holds, nothing foreign lies about. Full also reads every byte: checksums of tables, columns and packed
    shards, their records, and of every packed value dtype, shape, length and finiteness.

    Raises:
        UserError: there is no dataset, or one of another schema; a table is missing or damaged.
    """
    dataset = Dataset(uri)
    manifest = dataset.manifest()
    sizes = {found.name: found.size for found in dataset.store.list()}
    index, rows, refused = dataset.index(manifest), dataset.clips(manifest), dataset.quarantine(manifest)
    verdict = Verdict(
        shards=len(index.shards),
        clips=sum(len(shard.clips) for shard in index.shards),
        bytes=sum(shard.bytes for shard in index.shards),
        notes=_leftovers(manifest, sizes),
    )
    verdict.problems += _check_objects(manifest, sizes)
    verdict.problems += _check_index(manifest, index)
    verdict.problems += _check_tables(manifest, index, rows, refused)
    if full:
        verdict.problems += _check_copies(dataset, manifest, sizes)
        verdict.problems += _check_columns(dataset, manifest)
        verdict.problems += _check_packs(dataset, manifest)
        verdict.problems += _check_shards(dataset, index)
    return verdict


def _check_objects(manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[str]:
    for name, size in sorted(manifest.objects().items()):
        if name not in sizes:
            yield f"{name}: missing"
        elif size is not None and sizes[name] != size:
            yield f"{name}: {sizes[name]} bytes, the manifest says {size}"
    for name, ref in ((CLIPS, manifest.clips), (QUARANTINE, manifest.quarantine), (INDEX, manifest.index)):
        if sizes.get(name) != ref.bytes:
            yield f"{name}: not the current table (a build was stopped); build again to bring it up to date"
    foreign = sorted(name for name in sizes if not OWN.fullmatch(name))
    yield from (f"{name}: foreign object, no build made it" for name in foreign)


def _leftovers(manifest: Manifest, sizes: Mapping[str, int]) -> list[str]:
    known = {MANIFEST, LOCK, *COPIES, *manifest.objects()}
    ours = (name for name in sizes if OWN.fullmatch(name) and not name.startswith((HISTORY, RUNS, SEGMENTS)))
    old = [name for name in ours if name not in known]
    hint = "`f2v gc --delete` removes them after its grace period"
    return [f"{len(old)} objects of other builds, e.g. {min(old)}; {hint}"] if old else []


def _check_index(manifest: Manifest, index: Index) -> Iterator[str]:
    if manifest.profile != index.profile:
        yield f"index: profile {index.profile}, the manifest says {manifest.profile}"
    named = {pack.name: (shard, pack) for shard, pack in manifest.packs.items() if pack.name}
    for entry in index.shards:
        if entry.name not in named:
            yield f"{entry.name}: in the index but not in the manifest"
            continue
        shard, pack = named.pop(entry.name)
        frames = sum(clip.frames for clip in entry.clips)
        said = (entry.shard, entry.sha256, entry.bytes, len(entry.clips), frames, entry.raw)
        if said != (shard, pack.sha256, pack.bytes, pack.clips, pack.frames, pack.raw):
            yield f"{entry.name}: index and manifest disagree"
        short = [clip.key for clip in entry.clips if not set(index.fields) <= set(clip.members)]
        if short:
            yield f"{entry.name}: {len(short)} clips without all of the fields {index.fields}, first {short[0]}"
    yield from (f"{name}: not in the index" for name in sorted(named))


def _check_tables(
    manifest: Manifest, index: Index, rows: Sequence[ClipRow], refused: Sequence[QuarantineRow]
) -> Iterator[str]:
    """Every clip is in one place, the one that its row names, and the manifest counts the same."""
    places = {clip.key: (shard.shard, clip.frames) for shard in index.shards for clip in shard.clips}
    packed = Counter(clip.key for shard in index.shards for clip in shard.clips)
    lost = Counter(row.key for row in refused)
    known = Counter(row.key for row in rows)
    yield from (f"{key}: packed {count} times" for key, count in packed.items() if count > 1)
    yield from (f"{key}: {count} rows in {QUARANTINE}" for key, count in lost.items() if count > 1)
    yield from (f"{key}: {count} rows in {CLIPS}" for key, count in known.items() if count > 1)
    for row in rows:
        where = [place for place, keys in (("packed", packed), ("quarantined", lost)) if row.key in keys]
        if where != ([] if row.state == "pending" else [row.state]):
            yield f"{row.key}: {CLIPS} says {row.state}, found {' and '.join(where) or 'nowhere'}"
        elif row.key in places and places[row.key] != (row.shard, row.frames):
            shard, frames = places[row.key]
            yield f"{row.key}: {CLIPS} says {row.frames} frames in {row.shard}, the index {frames} in {shard}"
    foreign = {*packed, *lost} - set(known)
    yield from (f"{key}: in shards or {QUARANTINE} but not in {CLIPS}" for key in sorted(foreign))
    clips = Counter(row.shard for row in rows)
    for shard in sorted({*clips, *manifest.shards}):
        if clips[shard] != manifest.shards.get(shard, 0):
            yield f"{shard}: {clips[shard]} clips in {CLIPS}, the manifest counts {manifest.shards.get(shard, 0)}"
    reasons = Counter((row.shard, row.reason) for row in refused)
    for shard, pack in manifest.packs.items():
        if clips[shard] != pack.clips + sum(pack.refused.values()):
            yield f"{shard}: {clips[shard]} clips in, {pack.clips} packed, {sum(pack.refused.values())} quarantined"
        reasons.subtract({(shard, reason): count for reason, count in pack.refused.items()})
    for (shard, reason), extra in sorted(reasons.items()):
        if extra:
            sign = "more" if extra > 0 else "less"
            yield f"{shard}: {abs(extra)} {sign} {reason} in {QUARANTINE} than in the manifest"


def _check_copies(dataset: Dataset, manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[str]:
    """Checksums of the tables and of their copies, and of the centroids."""
    if manifest.codebook:
        book = manifest.codebook
        try:
            if dataset.store.sha256(book.name) != book.sha256:
                yield f"{book.name}: sha256 differs from the manifest; {REDO}"
        except (OSError, StorageError) as error:
            yield from (f"{book.name}: {problem}" for problem in _unreadable(error))
    for copy, ref in ((CLIPS, manifest.clips), (QUARANTINE, manifest.quarantine), (INDEX, manifest.index)):
        try:
            # One of another size is named already.
            whole = sizes.get(copy) == ref.bytes and dataset.store.sha256(copy) == ref.sha256
            if sizes.get(copy) == ref.bytes and not whole:
                yield f"{copy}: not the current table; build again to bring it up to date"
            if dataset.store.sha256(ref.name) != ref.sha256:
                mend = f"put its copy {copy} in its place" if whole else "its copy is not whole either"
                yield f"{ref.name}: sha256 differs from the manifest; {mend}"
        except (OSError, StorageError) as error:
            yield from (f"{ref.name}: {problem}" for problem in _unreadable(error))


def _check_columns(dataset: Dataset, manifest: Manifest) -> Iterator[str]:
    """What later builds start from: every column and its record against the manifest, and against each other."""
    columns = [(stage, shard, ref) for stage, refs in manifest.columns.items() for shard, ref in refs.items()]
    with Progress("verify columns", len(columns), "columns") as progress:
        for stage, shard, ref in columns:
            name = column_tar(stage, shard, ref.fingerprint, ref.sha256)
            record, problems = _record(dataset, column_record(stage, shard, ref.fingerprint), ref.record)
            yield from problems
            problems = []
            for _ in _members(dataset, name, ref.sha256, _places(record) if record else None, problems):
                pass
            yield from (f"{name}: {problem}" for problem in problems)
            progress.advance(1, name)


def _places(record: Any) -> Places:
    """Where the members of a column lie by its record."""
    return {
        f"{key}.{FIELDS[name].suffix}": (offset, size)
        for key, clip in record["clips"].items()
        for name, (offset, size) in clip["members"].items()
    }


def _check_packs(dataset: Dataset, manifest: Manifest) -> Iterator[str]:
    """Records of what became of each shard: later builds take them as they are."""
    for shard, pack in manifest.packs.items():
        yield from _record(dataset, pack_record(shard, pack.inputs), pack.record)[1]


def _record(dataset: Dataset, name: str, sha256: str) -> tuple[Any, list[str]]:
    """A record, or None and what is wrong with it."""
    try:
        data = dataset.store.read(name)
    except (OSError, StorageError) as error:
        return None, [f"{name}: {problem}" for problem in _unreadable(error)]
    if hashlib.sha256(data).hexdigest() != sha256:
        return None, [f"{name}: sha256 differs from the manifest; {REDO}"]
    return json.loads(data), []


def _check_shards(dataset: Dataset, index: Index) -> Iterator[str]:
    widths = dict(index.widths)
    with Progress("verify", sum(len(shard.clips) for shard in index.shards), "clips") as progress:
        for shard in index.shards:
            yield from (f"{shard.name}: {problem}" for problem in _check_shard(dataset, shard, widths))
            progress.advance(len(shard.clips), shard.name)
    if widths != index.widths:
        yield f"index: widths {index.widths}, the shards have {widths}"


def _check_shard(dataset: Dataset, shard: PackedShard, widths: dict[str, int]) -> list[str]:
    expected = {
        f"{clip.key}.{stored(name, shard.raw).suffix}": (clip, name)
        for clip in shard.clips
        for name in clip.members
        if name in FIELDS
    }
    places = {member: clip.members[name] for member, (clip, name) in expected.items()}
    problems: list[str] = []
    for member, data in _members(dataset, shard.name, shard.sha256, places, problems):
        problems += _check_member(*expected[member.name], data, shard, widths)
    return problems


def _check_member(
    clip: PackedClip, name: str, data: bytes, shard: PackedShard, widths: dict[str, int]
) -> Iterator[str]:
    try:
        value = decode(stored(name, shard.raw), data, clip.frames)
        check_value(FIELDS[name], value, clip.frames, widths)
    except SchemaError as error:
        yield f"{clip.key}: {error}"
        return
    if name == "meta" and (value.get("key"), value.get("split"), value.get("frames")) != (
        clip.key,
        shard.split,
        clip.frames,
    ):
        yield f"{clip.key}: meta says {value}, the index says split {shard.split}, {clip.frames} frames"


class _Hashed:
    """A stream that takes the digest of what is read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def read(self, size: int) -> bytes:
        # In pieces: a header may claim more than the archive holds, and memory is taken for what is asked.
        parts = []
        while size > 0 and (data := self._stream.read(min(size, BLOCK))):
            self.digest.update(data)
            parts.append(data)
            size -= len(data)
        return b"".join(parts)


def _members(
    dataset: Dataset, name: str, sha256: str, places: Places | None, problems: list[str]
) -> Iterator[tuple[Member, bytes]]:
    """Members of a tar that are where `places` says (None: not known); all that is off goes to `problems`."""
    seen: set[str] = set()
    try:
        with dataset.store.open(name) as opened:
            stream = _Hashed(opened)
            try:
                for member, data in read_tar(stream):  # type: ignore[arg-type]
                    if member.name in seen:
                        problems.append(f"{member.name}: twice in the archive")
                    seen.add(member.name)
                    if places is None:
                        continue
                    if member.name not in places:
                        problems.append(f"{member.name}: not in the index")
                        continue
                    if places[member.name] != (member.offset, member.size):
                        place = (member.offset, member.size)
                        problems.append(f"{member.name}: lies at {place}, the index says {places[member.name]}")
                    yield member, data
            except TarError as error:
                problems.append(str(error))
            while stream.read(BLOCK):
                pass
            if stream.digest.hexdigest() != sha256:
                problems.append(f"sha256 differs from the manifest; {REDO}")
    except (OSError, StorageError) as error:
        problems += _unreadable(error)
        return
    missing = sorted(set(places or ()) - seen)
    if missing:
        problems.append(f"{len(missing)} members missing, first {missing[0]}")


def _unreadable(error: OSError | StorageError) -> list[str]:
    if isinstance(error, FileNotFoundError):
        return []  # named by the check of objects
    return [f"cannot be read ({error.strerror if isinstance(error, OSError) else error})"]
