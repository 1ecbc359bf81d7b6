"""A small dataset with made-up values: every field packed, and the column of one stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.columns import Column, ColumnClip, Task
from pipeline.pack import Packed
from shards.codec import decode, encode
from shards.dataset import ClipRow, Dataset, QuarantineRow
from shards.manifest import (
    ColumnRef,
    Index,
    Manifest,
    PackedClip,
    PackedShard,
    PackRef,
    Recipe,
    column_record,
    pack_record,
)
from shards.reader import read_fields
from shards.schema import FIELDS, SCHEMA_VERSION, stored
from shards.tar import write_tar

WIDTHS = {"D_identity": 8, "D_expression": 6, "D_timbre": 5, "D_features": 3}
CLUSTERS = 11
RECIPES = {
    "speech": Recipe(version=1, settings={"clusters": CLUSTERS}, weights="s"),
    "mel": Recipe(version=1, settings={"filterbank": "htk"}, weights=""),
}
ENERGY = Recipe(version=1, settings={}, weights="")


def toy_values(key: str, frames: int, split: str = "train") -> dict[str, Any]:
    """Every field of a clip. `mel[:, 0]` counts acoustic frames and the lips' grey level counts video frames."""
    random = np.random.default_rng(frames)
    steps = np.arange(2 * frames, dtype=np.float32)
    mel = random.normal(size=(2 * frames, 80)).astype(np.float32)
    mel[:, 0] = steps
    lips = np.broadcast_to((np.arange(frames, dtype=np.uint8) * 2)[:, None, None], (frames, 96, 96)).copy()
    return {
        "meta": {"key": key, "split": split, "speaker": "", "text": "", "frames": frames, "source": ""},
        "boxes": random.random((frames, 4), np.float32),
        "points5": random.random((frames, 5, 2), np.float32),
        "face": random.integers(0, 255, (frames, 112, 112, 3), np.uint8),
        "track": {"by": "only", "chosen": 0},
        "landmarks": random.random((frames, 68, 2), np.float32),
        "lips": lips,
        "identity": random.random((frames, WIDTHS["D_identity"])).astype(np.float16),
        "expression": random.random((frames, WIDTHS["D_expression"])).astype(np.float16),
        "wav": random.integers(-999, 999, 640 * frames).astype(np.int16),
        "sync": {"offset_ms": None, "confidence": 0.0},
        "mel": mel,
        "pitch": np.where(steps % 3 == 0, np.nan, 100 + steps).astype(np.float32),
        "energy": steps,
        "units": random.integers(0, CLUSTERS, 2 * frames).astype(np.int16),
        "timbre": random.random(WIDTHS["D_timbre"], np.float32),
        "features": random.random((2 * frames, WIDTHS["D_features"])).astype(np.float16),
    }


def toy_dataset(
    folder: Path | str,
    shards: list[list[int]],
    profile: str = "offline",
    recipes: dict[str, Recipe] = RECIPES,
    raw: bool = False,
    fields: Collection[str] = tuple(FIELDS),
    speakers: Sequence[str] = (),
) -> Dataset:
    """A dataset whose shard `i` has one clip of each length in `shards[i]`; keys are `s<shard>c<clip>`.

    With `raw`, lips are stored as `npy`, with the pixels that they have in the JPEG of a dataset without.
    `fields` are packed besides `meta`; `speakers` are those of the shards.
    """
    dataset = Dataset(str(folder))
    plain = ["lips"] if raw else []
    suffixes = {name: stored(name, plain).suffix for name in FIELDS}
    packed, rows, packs, energy = [], [], {}, {}
    for number, lengths in enumerate(shards):
        shard = f"train-{number:06d}"
        samples = {
            f"s{number}c{position}": toy_values(f"s{number}c{position}", frames)
            for position, frames in enumerate(lengths)
        }
        whole = samples
        samples = {
            key: {name: value for name, value in values.items() if name in ("meta", *fields)}
            for key, values in whole.items()
        }
        for values in samples.values() if raw else ():
            values["lips"] = decode(FIELDS["lips"], encode(FIELDS["lips"], values["lips"]), values["meta"]["frames"])
        encoded = {
            f"{key}.{suffixes[name]}": encode(stored(name, plain), value)
            for key, values in samples.items()
            for name, value in values.items()
        }
        with dataset.store.draft() as draft:
            written = write_tar(draft.stream, sorted(encoded.items()))
            name = f"train/{shard}-{written.sha256[:12]}.tar"
            draft.publish(name)
        places = {member.name: (member.offset, member.size) for member in written.members}
        clips = [
            PackedClip(
                key=key,
                frames=values["meta"]["frames"],
                members={field: places[f"{key}.{suffixes[field]}"] for field in values},
            )
            for key, values in samples.items()
        ]
        facts = {"name": name, "sha256": written.sha256, "bytes": written.bytes}
        keys = dict.fromkeys(recipes, "0")
        packed.append(PackedShard(**facts, shard=shard, split="train", recipes=keys, behind=[], raw=plain, clips=clips))
        record = Packed(
            schema_version=SCHEMA_VERSION,
            shard=shard,
            inputs=f"{number:016x}",
            behind=[],
            packed=packed[-1],
            lost={},
            widths=WIDTHS,
            seconds=1,
        )
        dataset.store.write(pack_record(shard, record.inputs), record.model_dump_json().encode())
        packs[shard] = record.ref()
        energy[shard] = toy_column(dataset, shard, f"{number:016x}", whole)
        who = speakers[number] if speakers else ""
        rows += [ClipRow(c.key, "", 0, "", "", "train", who, "", None, None, c.frames, shard, "packed") for c in clips]
    common = {
        "schema_version": SCHEMA_VERSION,
        "profile": profile,
        "recipes": {stage: {"0": recipe} for stage, recipe in recipes.items()},
    }
    index = Index(**common, fields=[name for name in FIELDS if name in ("meta", *fields)], widths=WIDTHS, shards=packed)
    commit_toy(dataset, index, rows, common, packs, {"energy": energy})
    return dataset


def toy_column(dataset: Dataset, shard: str, fingerprint: str, samples: dict[str, dict[str, Any]]) -> ColumnRef:
    """The energy column of a shard: its tar and its record."""
    field = FIELDS["energy"]
    with dataset.store.draft() as draft:
        members = [(f"{key}.{field.suffix}", encode(field, values["energy"])) for key, values in samples.items()]
        written = write_tar(draft.stream, members)
        task = Task(stage="energy", shard=shard, fingerprint=fingerprint, recipe=ENERGY, reads={}, media="", attempt=1)
        column = Column(
            schema_version=SCHEMA_VERSION,
            task=task,
            clips={
                key: ColumnClip(frames=values["meta"]["frames"], members={"energy": (place.offset, place.size)})
                for (key, values), place in zip(samples.items(), written.members, strict=True)
            },
            refused=[],
            widths={},
            sha256=written.sha256,
            bytes=written.bytes,
            seconds=1,
        )
        draft.publish(column.tar)
    dataset.store.write(column_record("energy", shard, fingerprint), column.model_dump_json().encode())
    return column.ref("0")


def commit_toy(
    dataset: Dataset,
    index: Index,
    rows: list[ClipRow],
    common: dict[str, Any],
    packs: dict[str, PackRef],
    columns: dict[str, dict[str, ColumnRef]],
) -> None:
    """Commit tables and index as a build would."""
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        profile=common["profile"],
        source="",
        config={},
        codebook=None,
        columns=columns,
        recipes={**common["recipes"], "energy": {"0": ENERGY}},
        shards=dict(Counter(row.shard for row in rows)),
        packs=packs,
        clips=dataset.put_rows(ClipRow, rows),
        quarantine=dataset.put_rows(QuarantineRow, []),
        index=dataset.put_index(index),
    )
    dataset.commit(manifest, dataset.current()[1])
    dataset.refresh_copies(manifest)


def tars(dataset: Dataset) -> dict[str, bytes]:
    """Name -> bytes of every packed shard."""
    return {shard.name: dataset.store.read(shard.name) for shard in dataset.index().shards}


def digests(dataset: Dataset) -> dict[str, str]:
    """Name -> sha256 of every packed shard, as the index says."""
    return {shard.name: shard.sha256 for shard in dataset.index().shards}


def everything(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Key -> all packed fields of every packed clip."""
    fields = dataset.index().fields
    return {
        clip.key: read_fields(dataset, shard, clip, fields) for shard in dataset.index().shards for clip in shard.clips
    }
