"""Log-mel spectrogram."""

from __future__ import annotations

from typing import ClassVar

from pipeline.stage import Fields, Item, Stage
from shards.config import Config
from shards.mel import Filterbank, from_pcm, log_mel


class MelConfig(Config):
    """`filterbank`: `htk` or `slaney`; training and vocoder must use the same."""

    filterbank: Filterbank = "htk"


class Mel(Stage[MelConfig]):
    """Reads `wav`, writes `mel`, float32 [2F, 80]; the definition is that of `shards.mel`."""

    name: ClassVar[str] = "mel"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("wav",)
    writes: ClassVar[tuple[str, ...]] = ("mel",)

    def run(self, item: Item) -> Fields:
        """Log-mel of one clip."""
        return {"mel": log_mel(from_pcm(item.fields["wav"]), self.config.filterbank)}
