"""What a stage is: reads fields, writes fields, may reject a clip. It knows nothing of Ray, tars or storage."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from shards.config import Config
from shards.errors import UserError
from shards.manifest import Recipe
from shards.schema import FIELDS
from shards.storage import is_readable

C = TypeVar("C", bound=Config)
Fields = dict[str, Any]


class Reason(str, Enum):
    """Why a clip is in quarantine. The value is the code that the dataset stores."""

    UNREADABLE = "unreadable"
    """The container cannot be opened: missing moov, unknown or refused format, empty file, missing file."""
    TRUNCATED = "truncated"
    """The media ends well before its header says, or decoding breaks off."""
    NO_VIDEO = "no_video"
    NO_AUDIO = "no_audio"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    NO_FACE = "no_face"
    FACE_LOST = "face_lost"
    """The face is away for longer than can be interpolated."""
    SEVERAL_FACES = "several_faces"
    """Faces of like size: which one speaks is not decided."""
    LIPS_OUTSIDE = "lips_outside"
    """The mouth lies too far from its place in the aligned face."""
    SILENT = "silent"
    AUDIO_LENGTH = "audio_length"
    """Sound and picture differ in length by more than the rules allow."""
    OUT_OF_SYNC = "out_of_sync"
    """The sound is further from the picture than the settings allow."""
    FAULT = "fault"
    """The stage itself failed (a bug or a machine fault); the traceback is kept, and `--requeue fault` tries again."""
    CRASH = "crash"
    """The worker died on this clip, each time that it was tried."""
    HANG = "hang"
    """The worker did not come to an end with this clip."""
    MEMORY = "memory"
    """The worker took more memory for this clip than it may."""

    @property
    def retriable(self) -> bool:
        """Whether it may lie with machine or code, so that trying again may help."""
        return self in (Reason.FAULT, Reason.CRASH, Reason.HANG, Reason.MEMORY)


class Reject(Exception):
    """Raised by a stage for a clip that cannot be used."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Rejection:
    """A clip that a stage refused."""

    reason: Reason
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Clip:
    """One clip of the source.

    Attributes:
        key: WebDataset-safe name, unique in the dataset.
        uri: where the media lies, a path or a bucket's URI.
        digest: sha256 of the media's bytes, hex; empty where they could not be read.
        split: `train`, `valid`, `test` or another word.
        start, end: seconds inside the media; None for its beginning and end.
        bytes, stamp: size and stamp of the media when the digest was taken.
        refused: why it cannot be used, where that is known before any stage.
    """

    key: str
    uri: str
    digest: str
    split: str = "train"
    speaker: str = ""
    text: str = ""
    start: float | None = None
    end: float | None = None
    bytes: int = 0
    stamp: str = ""
    refused: Rejection | None = None


@dataclass(frozen=True)
class Item:
    """A clip on its way through one stage: the clip and the fields that the stage reads."""

    clip: Clip
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage occupies. Stages with equal resources share a pool of workers."""

    cpus: float = 1.0
    gpus: float = 0.0


class Stage(ABC, Generic[C]):
    """A step of the pipeline.

    Class attributes:
        name, version: raise the version whenever the output of the same input may change.
        reads, writes: schema field names; the optional ones among `writes` only where the settings ask for them.
        media: whether the stage decodes the source media itself.
        resources: per worker.
        kept: fields of its own that stand for its network: an item that has them needs no other field and no network.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]]
    media: ClassVar[bool] = False
    resources: ClassVar[Resources] = Resources()
    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: C, folder: Path | None = None) -> None:
        """`folder` holds checkpoints of networks that no package carries; see `pipeline.networks.weights`."""
        self.config = config
        self.folder = folder

    def gives(self) -> tuple[str, ...]:
        """The fields that it writes with its settings."""
        return tuple(name for name in self.writes if not FIELDS[name].optional)

    def uses(self) -> tuple[str, ...]:
        """The fields among `reads` that it looks at with its settings; the others are not fetched for it."""
        return self.reads

    def on_gpu(self) -> bool:
        """Whether its network runs in torch, and so on a GPU where its worker is given one."""
        return False

    def needs(self, gpus: float) -> Resources:
        """What one worker occupies, where those whose network may run on a GPU get a share `gpus` of one."""
        return replace(self.resources, gpus=gpus) if self.on_gpu() else self.resources

    def weights(self) -> Sequence[Path]:
        """Network files whose bytes decide the output; they enter the fingerprint."""
        return ()

    def codebook(self) -> Sequence[Path]:
        """Files besides, whose bytes decide the output but not the fields `kept`; they enter the fingerprint."""
        return ()

    @classmethod
    def differ_in_codebook(cls, old: Recipe, new: Recipe) -> bool:
        """Whether two recipes give the same fields `kept`, and differ in what is made from these alone."""
        return False

    @classmethod
    def keeps(cls, recipe: Recipe) -> bool:
        """Whether columns made so have all fields `kept`."""
        return False

    def setup(self) -> None:
        """Load networks; called once per worker before the first clip. Heavy imports belong here."""
        return

    def setup_reuse(self) -> None:
        """As `setup`, for items that have the fields `kept`: without the network."""
        return

    @abstractmethod
    def run(self, item: Item) -> Fields:
        """Compute this stage's fields for one clip.

        Raises:
            Reject: the clip cannot be used.
        """

    def process(self, items: Iterable[Item]) -> Iterator[tuple[Item, Fields | Rejection]]:
        """Each item with its fields or its rejection, in order. Stages that batch across clips override this."""
        for item in items:
            yield item, self.attempt(item)

    def attempt(self, item: Item) -> Fields | Rejection:
        """`run`, with its exceptions turned into rejections; an unforeseen one becomes `Reason.FAULT`.

        Raises:
            UserError: something that concerns more than this clip, such as a source that is no longer there.
        """
        try:
            return self.run(item)
        except UserError:
            raise
        except Reject as reject:
            # The media was read when the build began. That it cannot be opened now says nothing about the clip.
            if item.clip.digest and self.media and not is_readable(item.clip.uri):
                raise UserError(f"{item.clip.uri}: cannot be read any more; restore it and build again") from None
            return Rejection(reject.reason, str(reject))
        except Exception as error:
            return Rejection(Reason.FAULT, f"{type(error).__name__}: {error}", traceback.format_exc())
