"""Made-up datasets for `benchmarks.stream`: talking clips of 3 to 6.2 s with the widths of the `paper` profile.

Mouths are smooth moving textures with as much noise as makes a JPEG strip of quality 95 as large as one of real mouths,
about 2.07 KB per frame: the time to decode a JPEG follows its bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from shards.codec import encode
from shards.dataset import ClipRow, Dataset, QuarantineRow
from shards.manifest import Index, Manifest, PackedClip, PackedShard, PackRef
from shards.schema import FIELDS, LIP_SIZE, MEL_BINS, MEL_PER_FRAME, SCHEMA_VERSION, Field
from shards.strips import encode_strip
from shards.tar import write_tar

WIDTHS = {"D_identity": 512, "D_expression": 768, "D_timbre": 1024}
VIDEO = ("lips", "identity", "expression")
SOUND = ("units", "pitch", "energy", "mel")
NAMES = (*VIDEO, *SOUND, "timbre")
SHORTEST, LONGEST = 75, 155
CROP = 96
BATCH = 64
REAL_BYTES = 2073
"""Of a frame of real mouths in a strip of quality 95."""

Values = dict[str, Any]


class Mouths:
    """Lip crops uint8 [F, 96, 96]: a window that wanders over a smooth texture, and noise of a fixed strength."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        coarse = self._random.integers(40, 216, (24, 24), np.uint8)
        self._texture = np.asarray(Image.fromarray(coarse).resize((384, 384), Image.Resampling.BICUBIC), np.float32)
        self._noise = self._random.standard_normal((128, LIP_SIZE, LIP_SIZE), np.float32)
        weak, strong = 0.0, 32.0
        for _ in range(9):
            self.sigma = (weak + strong) / 2
            larger = len(encode_strip(self.clip(CROP))) > REAL_BYTES * CROP
            weak, strong = (weak, self.sigma) if larger else (self.sigma, strong)

    def clip(self, frames: int) -> NDArray[np.uint8]:
        """The next clip."""
        phase = self._random.uniform(0, 2 * np.pi, 2)
        steps = np.arange(frames)[:, None] * self._random.uniform(0.02, 0.1, 2)
        corners = np.rint(144 + 140 * np.sin(phase + steps)).astype(int)
        noise = self._noise[self._random.integers(0, len(self._noise), frames)]
        lips = np.stack([self._texture[y : y + LIP_SIZE, x : x + LIP_SIZE] for y, x in corners])
        return np.clip(lips + self.sigma * noise, 0, 255).astype(np.uint8)


def make_clip(key: str, frames: int, mouths: Mouths, random: np.random.Generator) -> Values:
    """All fields that training reads. `energy` counts acoustic frames, which tells where a crop begins."""
    sound = MEL_PER_FRAME * frames
    return {
        "meta": {"key": key, "split": "train", "speaker": "", "text": "", "frames": frames, "source": ""},
        "lips": mouths.clip(frames),
        "identity": random.standard_normal((frames, WIDTHS["D_identity"]), np.float32).astype(np.float16),
        "expression": random.standard_normal((frames, WIDTHS["D_expression"]), np.float32).astype(np.float16),
        "units": random.integers(0, 1000, sound).astype(np.int16),
        "timbre": random.standard_normal(WIDTHS["D_timbre"], np.float32),
        "pitch": np.where(random.random(sound) < 0.4, np.nan, random.uniform(80, 300, sound)).astype(np.float32),
        "energy": np.arange(sound, dtype=np.float32),
        "mel": random.standard_normal((sound, MEL_BINS), np.float32),
    }


def write_all(folder: Path, clips: int, shard_clips: int, seed: int = 0) -> dict[str, float]:
    """Write the same clips as `raw` and `jpeg` (datasets) and `npy` (a file per field) below `folder`.

    Returns:
        facts: `frames`, `jpeg_bytes_per_frame`, `noise`, and the bytes of each dataset's tars.
    """
    random = np.random.default_rng(seed)
    mouths = Mouths(seed)
    lengths = random.integers(SHORTEST, LONGEST + 1, clips).tolist()
    writers = {"raw": Writer(folder / "raw", raw=True), "jpeg": Writer(folder / "jpeg", raw=False)}
    for begin in range(0, clips, shard_clips):
        samples = {
            f"clip{begin + place:06d}": make_clip(f"clip{begin + place:06d}", frames, mouths, random)
            for place, frames in enumerate(lengths[begin : begin + shard_clips])
        }
        for writer in writers.values():
            writer.add(samples)
        for key, values in samples.items():
            (folder / "npy" / key).mkdir(parents=True)
            for name in NAMES:
                np.save(folder / "npy" / key / f"{name}.npy", values[name])
    facts = {"frames": float(sum(lengths)), "noise": mouths.sigma}
    for kind, writer in writers.items():
        writer.commit()
        facts[f"{kind}_bytes"] = float(sum(shard.bytes for shard in writer.shards))
    facts["jpeg_bytes_per_frame"] = writers["jpeg"].lip_bytes / sum(lengths)
    return facts


class Writer:
    """A dataset as a build leaves it, without columns."""

    def __init__(self, folder: Path, raw: bool) -> None:
        self._dataset = Dataset(str(folder))
        self._raw = ["lips"] if raw else []
        self.shards: list[PackedShard] = []
        self.lip_bytes = 0

    def add(self, samples: Mapping[str, Values]) -> None:
        """Write a shard."""
        members: dict[str, bytes] = {}
        fields = {name: self._field(name) for name in ("meta", *NAMES)}
        for key, values in samples.items():
            for name, field in fields.items():
                members[f"{key}.{field.suffix}"] = encode(field, values[name])
            self.lip_bytes += len(members[f"{key}.{fields['lips'].suffix}"])
        shard = f"train-{len(self.shards):06d}"
        with self._dataset.store.draft() as draft:
            written = write_tar(draft.stream, sorted(members.items()))
            name = f"train/{shard}-{written.sha256[:12]}.tar"
            draft.publish(name)
        places = {member.name: (member.offset, member.size) for member in written.members}
        clips = [
            PackedClip(
                key=key,
                frames=values["meta"]["frames"],
                members={name: places[f"{key}.{field.suffix}"] for name, field in fields.items()},
            )
            for key, values in samples.items()
        ]
        facts: dict[str, Any] = {"name": name, "sha256": written.sha256, "bytes": written.bytes, "behind": []}
        self.shards.append(PackedShard(**facts, shard=shard, split="train", recipes={}, raw=self._raw, clips=clips))

    def _field(self, name: str) -> Field:
        field = FIELDS[name]
        return Field(**{**vars(field), "encoding": "npy"}) if name in self._raw else field

    def commit(self) -> None:
        """Write index, tables and manifest."""
        common: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "profile": "paper", "recipes": {}}
        index = Index(**common, fields=["meta", *NAMES], widths=WIDTHS, shards=self.shards)
        rows = [
            ClipRow(clip.key, "", 0, "", "", "train", "", "", None, None, clip.frames, shard.shard, "packed")
            for shard in self.shards
            for clip in shard.clips
        ]
        packs = {
            shard.shard: PackRef(
                inputs=shard.sha256[:16],
                record="",
                name=shard.name,
                behind=[],
                sha256=shard.sha256,
                bytes=shard.bytes,
                clips=len(shard.clips),
                frames=sum(clip.frames for clip in shard.clips),
                refused={},
                seconds=0,
            )
            for shard in self.shards
        }
        manifest = Manifest(
            **common,
            source="",
            config={},
            codebook=None,
            columns={},
            shards=dict(Counter(row.shard for row in rows)),
            packs=packs,
            clips=self._dataset.put_rows(ClipRow, rows),
            quarantine=self._dataset.put_rows(QuarantineRow, []),
            index=self._dataset.put_index(index),
        )
        self._dataset.commit(manifest, None)


def pick_start(frames: int, random: np.random.Generator) -> int:
    """First video frame of a random crop."""
    return int(random.integers(0, max(0, frames - CROP) + 1))


def cut(values: Mapping[str, NDArray[Any]], start: int) -> dict[str, NDArray[Any]]:
    """Views of the crop that begins at video frame `start`, of a clip's whole fields."""
    video, sound = slice(start, start + CROP), slice(MEL_PER_FRAME * start, MEL_PER_FRAME * (start + CROP))
    crop = {name: values[name][video] for name in VIDEO} | {name: values[name][sound] for name in SOUND}
    return crop | {"timbre": values["timbre"]}


def collate(crops: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch, padded with zeros: the plain way to stack crops of unequal length."""
    arrays = empty_batch(len(crops), np.zeros)
    for row, crop in enumerate(crops):
        for name in NAMES:
            arrays[name][row, : len(crop[name])] = crop[name]
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    batch["frames"] = torch.tensor([len(crop["lips"]) for crop in crops])
    return batch


def empty_batch(rows: int, make: Any = np.empty) -> dict[str, NDArray[Any]]:
    """Arrays of a batch by field: lips uint8 [B, 96, 96, 96], identity and expression float16 [B, 96, D], units int64
    [B, 192], pitch and energy float32 [B, 192], mel float32 [B, 192, 80], timbre float32 [B, D]."""
    sound = MEL_PER_FRAME * CROP
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "lips": ((CROP, LIP_SIZE, LIP_SIZE), np.uint8),
        "identity": ((CROP, WIDTHS["D_identity"]), np.float16),
        "expression": ((CROP, WIDTHS["D_expression"]), np.float16),
        "units": ((sound,), np.int64),
        "pitch": ((sound,), np.float32),
        "energy": ((sound,), np.float32),
        "mel": ((sound, MEL_BINS), np.float32),
        "timbre": ((WIDTHS["D_timbre"],), np.float32),
    }
    return {name: make((rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def npy_clips(folder: Path) -> Iterator[tuple[str, Values]]:
    """Key and whole fields of every clip, from the npy files."""
    for clip in sorted((folder / "npy").iterdir()):
        yield clip.name, {name: np.load(clip / f"{name}.npy") for name in NAMES}
