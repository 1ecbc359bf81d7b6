"""Clips of a dataset's split as an evaluation needs them: what systems see, what was said, and the true attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.evaluation.partners import draw
from shards.codec import decode
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import PackedShard, Recipe, difference
from shards.schema import stored

SEEN = ("lips", "identity", "expression")
NEEDED = ("meta", "wav", *SEEN)
TRUE = ("mel", "units", "pitch", "energy", "timbre")
"""Read where the shards hold them."""


class SplitClips:
    """Clips of a split, read one by one, in the order of their keys.

    Args:
        count: so many, drawn by key; None: all.

    Attributes:
        uri: of the dataset; index: name of the object that lists its shards.
        recipes: of the stages that made it.
        keys: of the clips.

    Raises:
        UserError: no dataset, no such split, shards that lack a field or were made in different ways.
    """

    def __init__(self, uri: str, split: str, count: int | None = None) -> None:
        dataset = Dataset(uri)
        self.uri, self.split, self._store = dataset.uri, split, dataset.store
        self.index = dataset.manifest().index.name
        index, listed = dataset.index_and_clips(self.index)
        splits = sorted({shard.split for shard in index.shards})
        if split not in splits:
            raise UserError(f"no split {split!r} in {uri}; splits are {', '.join(splits) or 'none'}")
        lacking = [name for name in NEEDED if name not in ("meta", *index.fields)]
        if lacking:
            raise UserError(f"{uri}: its shards hold no {' and no '.join(lacking)}; build with them in pack.fields")
        self.profile, self.recipes = index.profile, index.recipe(split)
        self._read = (*NEEDED, *(name for name in TRUE if name in index.fields))
        self._places: dict[str, tuple[PackedShard, Any]] = {
            clip["key"]: (shard, clip)
            for shard, clips in zip(index.shards, listed, strict=True)
            if shard.split == split
            for clip in clips
        }
        self.keys = draw(self._places, count)

    def read(self, key: str) -> dict[str, Any]:
        """Fields of a clip as stored (see `shards.schema`), and `pcm`, the bytes of its wav file.

        Raises:
            SchemaError: damaged.
            StorageError: the shard is cut.
            FileNotFoundError: the shard is gone.
        """
        shard, clip = self._places[key]
        parts = self._store.read_ranges(shard.name, [tuple(clip["members"][name]) for name in self._read])
        found = {
            name: decode(stored(name, shard.raw), part, clip["frames"])
            for name, part in zip(self._read, parts, strict=True)
        }
        return found | {"pcm": parts[self._read.index("wav")]}

    def check_made_for(self, facts: Mapping[str, Any], checkpoint: str) -> None:
        """Raise UserError where what a system sees was prepared in another way than in its training.

        Args:
            facts: `Checkpoint.dataset`.
        """
        if facts["profile"] != self.profile:
            raise UserError(
                f"{checkpoint} was trained on profile {facts['profile']}, {self.uri} is of profile {self.profile}; "
                "give a dataset of its profile"
            )
        for stage in SEEN:
            old, new = facts["stages"].get(stage), self.recipes.get(stage)
            if (old and Recipe.model_validate(old)) != new:
                how = "; ".join(difference(Recipe.model_validate(old), new)) if old and new else "only one has it"
                raise UserError(
                    f"{checkpoint} was trained on other {stage} than {self.uri} holds ({how}); build the dataset with "
                    "the settings of its training"
                )

    def same_units(self, facts: Mapping[str, Any]) -> bool:
        """Whether units and timbre mean the same here as in training."""
        return bool(Recipe.model_validate(facts["stages"]["speech"]) == self.recipes["speech"])
