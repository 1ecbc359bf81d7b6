"""`verify`: hold a dataset's objects against its manifest, and the packed shards against index, schema and tables."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from shards.codec import decode
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import CLIPS, INDEX, OWN, QUARANTINE, Index, Manifest, PackedClip, PackedShard, column_tar
from shards.progress import Progress
from shards.schema import FIELDS, SchemaError, check_value
from shards.storage import StorageError
from shards.tar import TarError, read_tar


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
    conservation holds, nothing foreign lies about. Full also reads every byte: checksums of columns and tables, and of
    each packed shard its members, dtypes, shapes, lengths and finiteness.

    Raises:
        UserError: there is no dataset, or one of another schema; a table is missing or damaged.
    """
    dataset = Dataset(uri)
    manifest = dataset.manifest()
    sizes = {found.name: found.size for found in dataset.store.list()}
    verdict = Verdict()
    verdict.problems += _check_objects(manifest, sizes)
    verdict.notes += _leftovers(manifest, sizes)
    index = dataset.index(manifest)
    verdict.problems += _check_index(manifest, index)
    verdict.problems += _check_tables(dataset, manifest, index)
    for shard in index.shards:
        verdict.shards += 1
        verdict.clips += len(shard.clips)
        verdict.bytes += shard.bytes
    if full:
        verdict.problems += _check_columns(dataset, manifest)
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
    ours = [name for name in sizes if OWN.fullmatch(name) and "/" in name and name != INDEX]
    old = [name for name in ours if not name.startswith("manifests/") and name not in manifest.objects()]
    return [f"{len(old)} objects of other builds, e.g. {min(old)}; `f2v gc` lists and deletes them"] if old else []


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
        said, known = (entry.shard, entry.sha256, entry.bytes, len(entry.clips), frames), (shard, pack.sha256)
        if said != (*known, pack.bytes, pack.clips, pack.frames):
            yield f"{entry.name}: index and manifest disagree"
        short = [clip.key for clip in entry.clips if not set(index.fields) <= set(clip.members)]
        if short:
            yield f"{entry.name}: {len(short)} clips without all of the fields {index.fields}, first {short[0]}"
    yield from (f"{name}: not in the index" for name in sorted(named))


def _check_columns(dataset: Dataset, manifest: Manifest) -> Iterator[str]:
    """Checksums of columns and tables: what later builds start from."""
    refs = [(ref.name, ref.sha256) for ref in (manifest.clips, manifest.quarantine, manifest.index)]
    refs += [(copy, refs[number][1]) for number, copy in enumerate((CLIPS, QUARANTINE, INDEX))]
    refs += [
        (column_tar(stage, shard, ref.fingerprint, ref.sha256), ref.sha256)
        for stage, columns in manifest.columns.items()
        for shard, ref in columns.items()
    ]
    with Progress("verify columns", len(refs), "objects") as progress:
        for name, sha256 in refs:
            try:
                if dataset.store.sha256(name) != sha256:
                    yield f"{name}: sha256 differs from the manifest; delete it and build again"
            except FileNotFoundError:
                pass  # named by the check of objects
            except StorageError as error:
                yield str(error)
            progress.advance(1, name)


def _check_shards(dataset: Dataset, index: Index) -> Iterator[str]:
    widths = dict(index.widths)
    with Progress("verify", sum(len(shard.clips) for shard in index.shards), "clips") as progress:
        for shard in index.shards:
            yield from (f"{shard.name}: {problem}" for problem in _check_shard(dataset, shard, widths))
            progress.advance(len(shard.clips), shard.name)
    if widths != index.widths:
        yield f"index: widths {index.widths}, the shards have {widths}"


class _Hashed:
    """A stream that takes the digest of what is read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        return data


def _check_shard(dataset: Dataset, shard: PackedShard, widths: dict[str, int]) -> Iterator[str]:
    expected = {
        f"{clip.key}.{FIELDS[name].suffix}": (clip, name, place)
        for clip in shard.clips
        for name, place in clip.members.items()
        if name in FIELDS
    }
    seen: set[str] = set()
    try:
        with dataset.store.open(shard.name) as opened:
            stream = _Hashed(opened)
            try:
                for member, data in read_tar(stream):  # type: ignore[arg-type]
                    if member.name in seen:
                        yield f"{member.name}: twice in the archive"
                    seen.add(member.name)
                    if member.name not in expected:
                        yield f"{member.name}: not in the index"
                        continue
                    clip, name, place = expected[member.name]
                    if place != (member.offset, member.size):
                        yield f"{member.name}: lies at {(member.offset, member.size)}, the index says {place}"
                    yield from _check_member(clip, name, data, shard, widths)
            except TarError as error:
                yield str(error)
            while stream.read(1 << 20):
                pass
            if stream.digest.hexdigest() != shard.sha256:
                yield "sha256 differs from the index; delete it and build again"
    except FileNotFoundError:
        return  # named by the check of objects
    except StorageError as error:
        yield str(error)
    missing = sorted(set(expected) - seen)
    if missing:
        yield f"{len(missing)} members missing, first {missing[0]}"


def _check_member(
    clip: PackedClip, name: str, data: bytes, shard: PackedShard, widths: dict[str, int]
) -> Iterator[str]:
    try:
        value = decode(FIELDS[name], data, clip.frames)
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


def _check_tables(dataset: Dataset, manifest: Manifest, index: Index) -> Iterator[str]:
    try:
        rows, refused = dataset.clips(manifest), dataset.quarantine(manifest)
    except UserError as error:
        yield str(error)
        return
    packed = Counter(clip.key for shard in index.shards for clip in shard.clips)
    yield from (f"{key}: packed {count} times" for key, count in packed.items() if count > 1)
    lost = Counter(row.key for row in refused)
    yield from (f"{key}: {count} rows in {QUARANTINE}" for key, count in lost.items() if count > 1)
    for row in rows:
        where = [place for place, keys in (("packed", packed), ("quarantined", lost)) if row.key in keys]
        if where != ([] if row.state == "pending" else [row.state]):
            yield f"{row.key}: {CLIPS} says {row.state}, found {' and '.join(where) or 'nowhere'}"
    foreign = (set(packed) | set(lost)) - {row.key for row in rows}
    yield from (f"{key}: in shards or {QUARANTINE} but not in {CLIPS}" for key in sorted(foreign))
    clips = Counter(row.shard for row in rows)
    if clips != Counter(manifest.shards):
        yield f"{CLIPS}: {len(rows)} clips, the manifest counts {sum(manifest.shards.values())}"
    for shard, pack in manifest.packs.items():
        if clips[shard] != pack.clips + sum(pack.refused.values()):
            yield f"{shard}: {clips[shard]} clips in, {pack.clips} packed, {sum(pack.refused.values())} quarantined"
