"""The shards behind some clips: at hand when they are needed, and accounted for when they are damaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shards.clip_table import ClipTable
from shards.errors import UserError
from shards.fetch import CorruptShard, ShardRef, ShardSource
from shards.fill import Sample
from shards.storage import is_remote, user_cache
from shards.stream_config import StreamConfig

Clip = tuple[int, int, int | None]
"""Dataset, clip in its table, epoch of that dataset; None for a whole clip without augmentation."""


class ClipSource:
    """Shards of several clip tables.

    Attributes:
        skipped: what was left out as damaged, a line each.
    """

    def __init__(self, config: StreamConfig, tables: Sequence[ClipTable]) -> None:
        self._config, self._tables = config, tables
        self._bad: set[tuple[int, int]] = set()
        self.skipped: list[str] = []
        folder = config.cache or user_cache() / "shards"
        self.source = ShardSource(folder, config.cache_bytes, config.verify, _enough(config, tables))

    def usable(self, dataset: int, shard: int) -> bool:
        return (dataset, shard) not in self._bad

    def place(self, clip: Clip) -> tuple[int, int]:
        """Dataset and shard of a clip."""
        return clip[0], int(self._tables[clip[0]].shard_of[clip[1]])

    def ref(self, place: tuple[int, int]) -> ShardRef:
        """The shard of a dataset and shard number."""
        return self._tables[place[0]].shards[place[1]]

    def refs(self, clips: Iterable[Clip]) -> list[ShardRef]:
        """Shards of some clips, each once."""
        return [self.ref(place) for place in dict.fromkeys(self.place(clip) for clip in clips)]

    def ready(self, clips: Iterable[Clip]) -> bool:
        """Whether nothing would be waited for."""
        return all(self.source.ready(ref) for ref in self.refs(clips))

    def check(self, clips: Iterable[Clip]) -> bool:
        """Wait for the shards of some clips; whether all are sound.

        Raises:
            UserError: one is damaged, where the configuration says stop; or storage failed.
        """
        bad = len(self._bad)
        for place in dict.fromkeys(self.place(clip) for clip in clips):
            try:
                self.source.path(self.ref(place))
            except CorruptShard as error:
                self._leave_out(place, str(error), error)
        return len(self._bad) == bad

    def found_damaged(self, message: str, place: tuple[int, int]) -> None:
        """Note a shard that could not be read. Raises UserError: as the configuration says stop."""
        ref = self.ref(place)
        words = f"{ref.uri}/{ref.name}: {message}; run `f2v verify`"
        self._leave_out(place, words, UserError(words))

    def samples(self, clips: Sequence[Clip]) -> list[Sample]:
        """What is to be read for some clips, whose shards are sound."""
        paths: dict[tuple[int, int], str] = {}
        samples = []
        for clip in clips:
            dataset, number, epoch = clip
            table, place = self._tables[dataset], self.place(clip)
            if place not in paths:
                paths[place] = str(self.source.path(self.ref(place)))
            samples.append(
                Sample(
                    path=paths[place],
                    dataset=dataset,
                    shard=place[1],
                    raw=table.raw[place[1]],
                    key=table.keys[number],
                    frames=int(table.frames[number]),
                    epoch=epoch,
                    places=table.places[number].tolist(),
                )
            )
        return samples

    def _leave_out(self, place: tuple[int, int], words: str, error: UserError) -> None:
        if self._config.damaged == "stop":
            raise error
        if place not in self._bad:
            self._bad.add(place)
            self.skipped.append(words)


def _enough(config: StreamConfig, tables: Sequence[ClipTable]) -> int:
    """Bytes that the shards of a step, and those fetched ahead, take at most.

    A step draws from one window, from two where an epoch ends in it, and windows move on while a large batch is drawn.
    """
    total = 0
    for table in tables:
        if is_remote(table.uri):
            sizes = sorted((ref.bytes for ref in table.shards), reverse=True)
            passed = -(-config.batch * len(sizes) // len(table.keys)) + 1
            total += sum(sizes[: config.window + max(config.window, config.ahead) + passed])
    return total
