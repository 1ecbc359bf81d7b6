"""`verify`: read a dataset's packed shards whole and hold them against the index, the schema and the clip tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from shards.codec import decode
from shards.dataset import CLIPS, MANIFEST, QUARANTINE, Dataset, Index, PackedClip, PackedShard
from shards.progress import Progress
from shards.schema import FIELDS, SchemaError, check_value
from shards.tar import TarError, read_tar


@dataclass
class Verdict:
    """What was checked and what is off; `problems` are lines for the user."""

    shards: int = 0
    clips: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify(uri: str) -> Verdict:
    """Check sizes, checksums, members, dtypes, shapes, lengths, finiteness, counts and conservation.

    Raises:
        UserError: there is no dataset, or one of another schema.
    """
    dataset = Dataset(uri)
    manifest, index = dataset.manifest(), dataset.index()
    verdict = Verdict()
    if manifest.profile != index.profile:
        verdict.problems.append(f"{MANIFEST} says profile {manifest.profile}, the index says {index.profile}")
    widths = dict(index.widths)
    with Progress("verify", sum(len(shard.clips) for shard in index.shards), "clips") as progress:
        for shard in index.shards:
            verdict.problems += [f"{shard.name}: {problem}" for problem in _check_shard(dataset, index, shard, widths)]
            verdict.shards += 1
            verdict.clips += len(shard.clips)
            verdict.bytes += shard.bytes
            progress.advance(len(shard.clips), shard.name)
    verdict.problems += _check_tables(dataset, index)
    if widths != index.widths:
        verdict.problems.append(f"index: widths {index.widths}, the shards have {widths}")
    return verdict


def _check_shard(dataset: Dataset, index: Index, shard: PackedShard, widths: dict[str, int]) -> Iterator[str]:
    try:
        path = dataset.store.path(shard.name)
        size = path.stat().st_size
    except FileNotFoundError:
        yield "missing"
        return
    if size != shard.bytes:
        yield f"{size} bytes, the index says {shard.bytes}"
    if dataset.store.sha256(shard.name) != shard.sha256:
        yield "sha256 differs from the index"
    expected = {
        f"{clip.key}.{FIELDS[name].suffix}": (clip, name, place)
        for clip in shard.clips
        for name, place in clip.members.items()
        if name in FIELDS
    }
    seen: set[str] = set()
    try:
        with open(path, "rb") as stream:
            for member, data in read_tar(stream):
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
    missing = sorted(set(expected) - seen)
    if missing:
        yield f"{len(missing)} members missing, first {missing[0]}"
    short = [clip.key for clip in shard.clips if set(clip.members) != set(index.fields)]
    if short:
        yield f"{len(short)} clips without all of the fields {index.fields}, first {short[0]}"


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


def _check_tables(dataset: Dataset, index: Index) -> Iterator[str]:
    rows, refused = dataset.clips(), dataset.quarantine()
    packed = Counter(clip.key for shard in index.shards for clip in shard.clips)
    yield from (f"{key}: packed {count} times" for key, count in packed.items() if count > 1)
    lost = {row.key for row in refused}
    for row in rows:
        where = [place for place, keys in (("packed", packed), ("quarantined", lost)) if row.key in keys]
        if where != [row.state]:
            yield f"{row.key}: {CLIPS} says {row.state}, found {' and '.join(where) or 'nowhere'}"
    foreign = (set(packed) | lost) - {row.key for row in rows}
    yield from (f"{key}: in shards or {QUARANTINE} but not in {CLIPS}" for key in sorted(foreign))
    if len(rows) != len(packed) + len(lost):
        yield f"{len(rows)} clips in {CLIPS}, {len(packed)} packed and {len(lost)} quarantined"
