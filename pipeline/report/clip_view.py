"""One clip on a page: faces with landmarks, lips, sound, mel, pitch, energy and units on one axis, and its figures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.pages.draw import Panels, data_uri, hertz_of, label, loudness_of
from pipeline.pages.html import escape
from pipeline.report.figures import FIGURES, measure
from pipeline.words import count
from shards.codec import encode
from shards.dataset import ClipRow, QuarantineRow
from shards.mel import Filterbank
from shards.schema import FACE_SIZE, FIELDS, MEL_RATE, SAMPLE_RATE, SAMPLES_PER_FRAME, VIDEO_RATE

SHOWN = ("face", "lips", "landmarks", "points5", "boxes", "track", "sync", "wav", "mel", "pitch", "energy", "units")
"""Fields that are shown."""
STRIP, PER_ROW = 10, 5
"""Frames shown of face and lips, and how many of them beside each other."""
FOOT = 18
"""Pixels for their times."""
QUALITY = 85
ENERGY_HEIGHT, UNITS_HEIGHT = 56, 22
LINES = (
    (range(17), False),
    (range(17, 22), False),
    (range(22, 27), False),
    (range(27, 31), False),
    (range(31, 36), False),
    (range(36, 42), True),
    (range(42, 48), True),
    (range(48, 60), True),
    (range(60, 68), True),
)
"""Parts of the 68 iBUG points, and whether each is closed: jaw, brows, nose, eyes, lips."""


@dataclass(frozen=True)
class View:
    """A clip to be shown: its row, the fields that are there, why it is on the page, where it is packed, and why it is
    in quarantine."""

    row: ClipRow
    values: Mapping[str, Any]
    why: Sequence[str] = ()
    tar: str | None = None
    refused: QuarantineRow | None = None
    notes: Sequence[str] = field(default=())


def clip_section(view: View, seconds: float, filterbank: Filterbank) -> str:
    """HTML of a clip.

    Args:
        seconds: of sound, mel and curves that are shown at most.
        filterbank: of the mel.
    """
    row = view.row
    worst = [why for why in view.why if why != "drawn at random"]
    tag = '<span class="tag worst">worst</span>' if worst else '<span class="tag">random</span>' if view.why else ""
    reasons = f'<p class="why">{escape("; ".join(worst))}</p>' if worst else ""
    said = f'<p class="said">{escape(row.text)}</p>' if row.text else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in view.notes)
    return (
        f'<article tabindex="-1"><h3>{escape(row.key)} {tag}</h3>{reasons}{said}{notes}{_refusal(view.refused)}'
        f'<div class="sides"><div>{_strips(view.values)}{_facts(view)}</div>{_sound(view, seconds, filterbank)}</div>'
        "</article>"
    )


def _refusal(refused: QuarantineRow | None) -> str:
    if refused is None:
        return ""
    trace = f"<details><summary>Traceback</summary><pre>{escape(refused.traceback)}</pre></details>"
    return (
        f'<p class="note">{escape(refused.stage)} refused it: {escape(refused.reason)}: {escape(refused.message)}</p>'
        f"{trace if refused.traceback else ''}"
    )


def _strips(values: Mapping[str, Any]) -> str:
    """Some frames of face, with landmarks, and of lips."""
    there = [name for name in ("face", "lips") if name in values]
    if not there:
        return '<p class="soft">No pictures of it are stored.</p>'
    frames = len(values[there[0]])
    chosen = np.linspace(0, frames - 1, min(STRIP, frames)).round().astype(int)
    parts = []
    top = 0
    for row in np.array_split(chosen, -(-len(chosen) // PER_ROW)):
        for name in there:
            strip = np.concatenate(list(values[name][row]), axis=1)
            parts.append(
                f'<image y="{top}" width="{FACE_SIZE * len(row)}" height="{FACE_SIZE}" preserveAspectRatio="none" '
                f'href="{data_uri(_jpeg(strip), "image/jpeg")}"/>'
            )
            if name == "face" and "landmarks" in values and "points5" in values:
                moved = face_landmarks(values["landmarks"], values["points5"], row)
                lines = "".join(_outline(points, (FACE_SIZE * place, top)) for place, points in enumerate(moved))
                parts.append(f'<path class="points" d="{lines}"/>')
            top += FACE_SIZE
        for place, frame in enumerate(row.tolist()):
            middle = FACE_SIZE * (place + 0.5)
            parts.append(label(middle, top + FOOT / 2, f"{frame / VIDEO_RATE:.2f} s", "middle"))
        top += FOOT
    return (
        f'<svg class="picture strip" viewBox="0 0 {FACE_SIZE * min(PER_ROW, len(chosen))} {top}" role="img">'
        f"<title>{escape(' and '.join(there))} over the clip</title>{''.join(parts)}</svg>"
    )


def face_landmarks(landmarks: np.ndarray, points5: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Landmarks of some frames in pixels of the face crop, [n, 68, 2]: moved as the crop was.

    Args:
        landmarks: [F, 68, 2]; points5: [F, 5, 2], both in pixels of the source.
    """
    from pipeline import align

    smooth = align.smooth(points5)
    return np.stack(
        [align.transform(align.similarity(smooth[frame], align.ARCFACE), landmarks[frame]) for frame in frames]
    )


def _outline(points: np.ndarray, shift: tuple[float, float]) -> str:
    """Path through the points [68, 2]; the ones outside the crop stay at its edge, nonsense is left out."""
    if not np.isfinite(points).all():
        return ""
    inside = points.clip(0, FACE_SIZE) + np.array(shift)
    parts = []
    for part, closed in LINES:
        places = " ".join(f"{x:.1f} {y:.1f}" for x, y in inside[list(part)])
        parts.append(f"M{places}{'Z' if closed else ''}")
    return "".join(parts)


def _jpeg(picture: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def _sound(view: View, seconds: float, filterbank: Filterbank) -> str:
    """Player and pictures of the first `seconds`."""
    lengths = {"wav": SAMPLE_RATE, "mel": MEL_RATE, "pitch": MEL_RATE, "energy": MEL_RATE, "units": MEL_RATE}
    there = {name: view.values[name] for name in lengths if name in view.values and len(view.values[name])}
    if not there:
        return ""
    whole = max(len(value) / lengths[name] for name, value in there.items())
    shown = min(whole, seconds)
    # Whole video frames, so that the panels end together.
    frames = max(1, int(shown * VIDEO_RATE + 1e-6))
    shown = frames / VIDEO_RATE
    per_frame = {name: SAMPLES_PER_FRAME if name == "wav" else MEL_RATE // VIDEO_RATE for name in there}
    cut = {name: value[: frames * per_frame[name]] for name, value in there.items()}
    panels = Panels(f"{', '.join(there)} of {view.row.key}", shown)
    player = ""
    if "wav" in cut:
        data, kind = sound_file(cut["wav"])
        player = (
            f'<audio controls preload="metadata" src="{data_uri(data, kind)}" aria-label="{escape(view.row.key)}">'
            "</audio>"
        )
        panels.waveform(cut["wav"])
    if "mel" in cut:
        panels.mel(cut["mel"], loudness_of([cut["mel"]]), filterbank)
    if "pitch" in cut:
        panels.curves([("own", cut["pitch"])], hertz_of([cut["pitch"]]), "pitch, Hz")
    if "energy" in cut:
        low, high = float(np.nanmin(cut["energy"])), float(np.nanmax(cut["energy"]))
        panels.curves([("own", cut["energy"])], (low, max(high, low + 1)), "energy", ENERGY_HEIGHT)
    if "units" in cut:
        panels.image(units_png(cut["units"]), len(cut["units"]) / MEL_RATE, UNITS_HEIGHT, "units", exact=True)
    less = f'<p class="soft">The first {shown:g} of {whole:g} s.</p>' if shown < whole - 1e-6 else ""
    return f'<div class="panel">{player}{panels.svg()}{less}</div>'


def sound_file(samples: np.ndarray) -> tuple[bytes, str]:
    """(file, media type) of 16-bit samples [N] at 16 kHz: FLAC, which browsers play and which is half as large, or wav
    where soundfile is not installed."""
    try:
        import soundfile
    except ModuleNotFoundError:
        return encode(FIELDS["wav"], samples), "audio/wav"
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue(), "audio/flac"


def units_png(units: np.ndarray) -> bytes:
    """A pixel per frame; a colour of its own for every unit, far from those of its neighbours in number."""
    import colorsys

    from PIL import Image

    # Steps of the golden ratio go round the hues without ever coming back; lightness tells nearby hues apart.
    row = [colorsys.hls_to_rgb(unit * 0.618034 % 1, 0.35 + 0.1 * (unit % 4), 0.65) for unit in units.tolist()]
    buffer = io.BytesIO()
    Image.fromarray((np.array(row) * 255).round().astype(np.uint8)[None]).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _facts(view: View) -> str:
    row = view.row
    facts: dict[str, str] = {
        "split": row.split,
        "speaker": row.speaker,
        "shard": view.tar or row.shard,
        "source": row.uri,
    }
    if row.start is not None or row.end is not None:
        facts["from, to"] = f"{row.start or 0:g} s, {'end' if row.end is None else f'{row.end:g} s'}"
    if row.frames:
        facts["frames"] = f"{row.frames} ({row.frames / VIDEO_RATE:g} s)"
    for name, value in measure(row.key, row.frames, view.values).figures.items():
        if name != "seconds":
            facts[FIGURES[name].label.lower()] = f"{value:.4g} {FIGURES[name].unit}".rstrip()
    if "track" in view.values:
        track = view.values["track"]
        facts["face"] = f"{track.get('by')}, of {count(int(track.get('tracks', 1)), 'track')}"
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items() if value
    )
    return f"<dl>{cells}</dl>"
