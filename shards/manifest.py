"""What a dataset says about itself: the manifest, the index of packed shards, and the names of their objects."""

from __future__ import annotations

import re
from typing import Any

from shards.config import Config
from shards.errors import UserError

MANIFEST = "dataset.json"
CLIPS = "clips.parquet"
QUARANTINE = "quarantine.parquet"
INDEX = "train/index.json"
HISTORY = "manifests/"
"""Copies of manifests that were replaced; the time of a copy says when."""
SEGMENTS = "segments/"
"""What was found in recordings that are cut into clips. Every build reads these; no manifest names them."""
RUNS = "runs/"
"""What builds were like: settings, machines, times and costs. No manifest names them, and they are never garbage."""
COPIES = (CLIPS, QUARANTINE, INDEX)
"""Copies of the current tables for people and other programs, made after each commit."""

OWN = re.compile(
    r"columns/\w+/\w+-\d{6,}-[0-9a-f]{16}(-[0-9a-f]{12}\.tar|\.json)"
    r"|packs/\w+-\d{6,}-[0-9a-f]{16}\.json"
    r"|train/(\w+-\d{6,}-[0-9a-f]{12}\.tar|index-[0-9a-f]{12}\.json)"
    r"|tables/(clips|quarantine)-[0-9a-f]{12}\.parquet"
    r"|manifests/[0-9a-f]{12}\.json"
    r"|codebooks/units-[0-9a-f]{16}\.npy"
    r"|segments/[0-9a-f]{16}-[0-9a-f]{16}\.json"
    r"|runs/\d{8}T\d{6}Z-[0-9a-f]{8}\.json"
    r"|dataset\.json|clips\.parquet|quarantine\.parquet|train/index\.json|\.lock|\.writing-[0-9A-Za-z_]+"
)
"""Names that a build gives; an object of another name is not ours to judge or to delete."""


class Recipe(Config):
    """What a stage was when it ran.

    Attributes:
        version: of its code.
        settings: its section of the configuration, without paths.
        weights: digest of its network files; empty for none.
        codebook: digest of the centroids that its network's features are held against; empty for none.
    """

    version: int
    settings: dict[str, Any]
    weights: str
    codebook: str = ""


class ColumnRef(Config):
    """The current column of a stage and shard.

    Attributes:
        recipe: key in the manifest's recipes of that stage.
        reads: upstream stage -> fingerprint of the column that was read.
        media: digest of the shard's clips, for stages that decode media; else empty.
        attempt: 1, and one more each time that the work was asked for again.
        sha256, bytes: of its tar; `record`: sha256 of its record.
        clips, refused: how many clips are in and how many were refused.
        seconds: that a worker took.
        reuse: fingerprint of the column whose kept fields spared it the network; None where the network ran.
    """

    fingerprint: str
    recipe: str
    reads: dict[str, str]
    media: str
    attempt: int
    record: str
    sha256: str
    bytes: int
    clips: int
    refused: int
    seconds: float
    reuse: str | None = None


class PackRef(Config):
    """What became of a shard.

    Attributes:
        inputs: hash of all that it was packed from.
        record: sha256 of the record.
        name: of the packed shard; None where no clip survived.
        behind: stages whose column was made from another column than the one packed beside it.
        refused: reason -> clips.
        raw: fields that the schema stores as `jpg` and the packed shard as `npy`.
    """

    inputs: str
    record: str
    name: str | None
    behind: list[str]
    sha256: str
    bytes: int
    clips: int
    frames: int
    refused: dict[str, int]
    seconds: float
    raw: list[str] = []


class ObjectRef(Config):
    """An object with its content's digest and size."""

    name: str
    sha256: str
    bytes: int


class Codebook(ObjectRef):
    """The dataset's own k-means centroids; `fit` is the hash of the settings they were fitted with."""

    fit: str


class Manifest(Config):
    """`dataset.json`: names every object that is current. Replacing it is the only commit.

    Attributes:
        source: URI that the clips came from.
        config: the settings last asked for; what each column was really made with is in `recipes`.
        recipes: stage -> key -> recipe.
        columns: stage -> shard -> current column.
        shards: shard -> number of its clips.
        packs: shard -> result, for shards that have all columns.
        clips, quarantine, index: the tables.
    """

    schema_version: int
    profile: str
    source: str
    config: dict[str, Any]
    codebook: Codebook | None
    recipes: dict[str, dict[str, Recipe]]
    columns: dict[str, dict[str, ColumnRef]]
    shards: dict[str, int]
    packs: dict[str, PackRef]
    clips: ObjectRef
    quarantine: ObjectRef
    index: ObjectRef

    def objects(self) -> dict[str, int | None]:
        """Name -> size of every object that this manifest means; None where the size is not recorded."""
        found: dict[str, int | None] = {ref.name: ref.bytes for ref in (self.clips, self.quarantine, self.index)}
        if self.codebook:
            found[self.codebook.name] = self.codebook.bytes
        for stage, refs in self.columns.items():
            for shard, ref in refs.items():
                found[column_record(stage, shard, ref.fingerprint)] = None
                found[column_tar(stage, shard, ref.fingerprint, ref.sha256)] = ref.bytes
        for shard, pack in self.packs.items():
            found[pack_record(shard, pack.inputs)] = None
            if pack.name is not None:
                found[pack.name] = pack.bytes
        return found


class PackedClip(Config):
    """A clip inside a packed shard; `members` maps field name to (byte offset, size)."""

    key: str
    frames: int
    members: dict[str, tuple[int, int]]


class PackedShard(Config):
    """A packed shard.

    Attributes:
        recipes: stage -> key of the recipe that its fields were made with.
        behind: stages whose fields were made from others than those beside them (a rerun with `--only` went before).
        raw: fields that the schema stores as `jpg` and this shard as `npy`.
    """

    name: str
    shard: str
    split: str
    sha256: str
    bytes: int
    recipes: dict[str, str]
    behind: list[str]
    raw: list[str] = []
    clips: list[PackedClip]


class Index(Config):
    """`train/index.json`: all that a trainer needs to read the packed shards at random.

    Attributes:
        widths: named widths (`D_identity` ...) of the values.
        recipes: stage -> key -> recipe, for the keys that the shards name.
    """

    schema_version: int
    profile: str
    fields: list[str]
    widths: dict[str, int]
    recipes: dict[str, dict[str, Recipe]]
    shards: list[PackedShard]

    def recipe(self, split: str) -> dict[str, Recipe]:
        """The recipe of every stage in a split.

        Raises:
            UserError: shards of the split were made with different settings or networks, or a stage is behind.
        """
        found: dict[str, str] = {}
        for shard in (shard for shard in self.shards if shard.split == split):
            if shard.behind:
                raise UserError(
                    f"{shard.shard}: {' and '.join(shard.behind)} follow from columns that were made anew since; "
                    "run `f2v build` on the dataset to bring all up to date"
                )
            for stage, key in shard.recipes.items():
                if found.setdefault(stage, key) != key:
                    one, other = self.recipes[stage][found[stage]], self.recipes[stage][key]
                    raise UserError(
                        f"{shard.shard}: {stage} was made otherwise than in other shards of split {split} "
                        f"({'; '.join(difference(one, other))}); run `f2v build` on the dataset to bring all up to date"
                    )
        return {stage: self.recipes[stage][key] for stage, key in found.items()}


def difference(old: Recipe, new: Recipe) -> list[str]:
    """In words, what distinguishes two recipes: `fmax 600 -> 500`."""
    words = [] if old.version == new.version else [f"version {old.version} -> {new.version}"]
    for key in sorted({*old.settings, *new.settings}):
        one, other = old.settings.get(key), new.settings.get(key)
        if key not in old.settings:
            words.append(f"{key} is new ({other})")
        elif key not in new.settings:
            words.append(f"{key} is gone")
        elif one != other:
            words.append(f"{key} {one} -> {other}")
    files = (("network files", old.weights != new.weights), ("centroids", old.codebook != new.codebook))
    different = [name for name, differ in files if differ]
    if different and not words:
        words.append(f"{' and '.join(different)} differ")
    return words


def column_record(stage: str, shard: str, fingerprint: str) -> str:
    """Object name of a column's record."""
    return f"columns/{stage}/{shard}-{fingerprint}.json"


def column_tar(stage: str, shard: str, fingerprint: str, sha256: str) -> str:
    """Object name of a column's tar; its own digest is part of it, so that two runs of one task never mix."""
    return f"columns/{stage}/{shard}-{fingerprint}-{sha256[:12]}.tar"


def pack_record(shard: str, inputs: str) -> str:
    """Object name of the record of what became of a shard."""
    return f"packs/{shard}-{inputs}.json"


def segments_record(media: str, recipe: str) -> str:
    """Object name of what was found in a recording; `media` is the sha256 of its file."""
    return f"{SEGMENTS}{media[:16]}-{recipe}.json"


def split_of(shard: str) -> str:
    """Split of a shard by its name, `<split>-<number>`."""
    return shard.rsplit("-", 1)[0]
