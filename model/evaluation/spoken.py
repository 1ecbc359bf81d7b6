"""A checkpoint speaks for a split of a dataset, and is scored beside the sound of the shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.evaluation.config import EvaluationConfig
from model.evaluation.evaluate import ClipScores, Evaluation, score
from model.evaluation.figures import Sums
from model.evaluation.partners import Pair
from model.evaluation.scoring import Make
from model.evaluation.split_clips import SEEN, SplitClips
from shards.codec import encode_sound
from shards.errors import UserError, warn
from shards.pitch import standardise
from shards.progress import Progress
from shards.schema import SchemaError
from shards.storage import Store, open_store

if TYPE_CHECKING:
    from model.synthesis import Spoken, Synthesizer

SPEECH, REFERENCE, MADE = "speech", "reference", "made"
"""Folders below the one of the evaluation: speech, sound and texts of the shards, and how each clip was made."""


def evaluate_checkpoint(
    synthesizer: Synthesizer,
    clips: SplitClips,
    config: EvaluationConfig,
    out: Path,
    name: str = "",
    workers: int | None = None,
    cache: Path | None = None,
    references: Path | None = None,
    make: Make | None = None,
) -> Evaluation:
    """Speak for clips and score them; speech that is there already, made in the same way, is not made again.

    Writes `speech/KEY.wav`, `reference/KEY.wav` (as it is in the shards) and `.txt`, so that both folders can be
    compared again by themselves. Figures of predictions (units, pitch, energy, timbre, mel) come along where the
    system predicts and the shards hold them. Pitch range and filterbank are those of the dataset where `config` does
    not set them.

    Args:
        out: folder.
        name: of the system; default what the synthesizer says it is.
        references: folder for the references, for several evaluations on the same clips; default below `out`.
        make: see `evaluate.score`.

    Raises:
        UserError: clips that were prepared in another way than those of training, or see `evaluate.score`.
    """
    clips.check_made_for(synthesizer.state.dataset, f"step {synthesizer.state.step}")
    made = {**synthesizer.facts(), **synthesizer.digests}
    source = {"dataset": clips.uri, "index": clips.index, "split": clips.split}
    folder = (references or out / REFERENCE).absolute()
    pairs, predicted, lost = _speak(synthesizer, clips, out, folder, {**made, **source})
    if not pairs:
        raise UserError(f"nothing to score: {'; '.join(lost[:3]) or f'{clips.uri} has no clip in {clips.split}'}")
    if synthesizer.network.config.told_voice:
        warn("model.speaker=voice: every clip is told the voice of its own reference, which no silent video has")
    title = name or f"{made['system']}, step {made['step']}, {made['vocoder']}"
    evaluation = score(pairs, _as_dataset(config, clips), title, workers, cache, make)
    evaluation.clips = [_with(clip, predicted[clip.key]) for clip in evaluation.clips]
    evaluation.unreadable = lost + evaluation.unreadable
    evaluation.facts |= {"made": made, **source, "generated": str(out / SPEECH), "reference": str(folder)}
    evaluation.facts["voice"] = "told, from the reference" if synthesizer.network.config.told_voice else "predicted"
    return evaluation


def _speak(
    synthesizer: Synthesizer, clips: SplitClips, out: Path, folder: Path, facts: Mapping[str, Any]
) -> tuple[list[Pair], dict[str, Sums], list[str]]:
    """Speech and references of all clips; errors of predictions; a line per clip that cannot be read."""
    speech, references, notes = (open_store(str(path)) for path in (out / SPEECH, folder, out / MADE))
    digest = sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    pairs, predicted, lost = [], {}, []
    with Progress("speak", len(clips.keys), "clips") as progress:
        for key in clips.keys:
            try:
                clip = clips.read(key)
            except (SchemaError, OSError, UserError) as error:
                lost.append(f"{key}: {error}; run `f2v verify`")
                continue
            text = " ".join(str(clip["meta"]["text"]).split())
            _keep(references, f"{key}.wav", clip["pcm"])
            if text:
                _keep(references, f"{key}.txt", text.encode())
            sums = _known(notes, speech, key, digest)
            if sums is None:
                # A reference voice is for systems that are told one; others do not look at it.
                seen = {field: clip[field] for field in (*SEEN, "timbre") if field in clip}
                [spoken] = synthesizer.speak([seen])
                sums = _errors(spoken, clip, synthesizer, clips)
                wave = encode_sound(spoken.wave)
                speech.write(f"{key}.wav", wave)
                note = {"made": digest, "wav": sha256(wave).hexdigest(), "sums": sums}
                notes.write(f"{key}.json", json.dumps(note).encode())
            predicted[key] = sums
            paths = out / SPEECH / f"{key}.wav", folder / f"{key}.wav"
            pairs.append(Pair(key, *paths, text or None, "shards" if text else ""))
            progress.advance()
    others = [found.name.removesuffix(".json") for found in notes.list() if found.name.endswith(".json")]
    old = [key for key in sorted({*others} - {*clips.keys}) if not _made_so(notes, key, digest)]
    if old:
        also = f"{len(old)} more clips, such as {old[0]}, were made in another way"
        warn(f"{out / SPEECH}: {also}; do not compare the folder as a whole")
    return pairs, predicted, lost


def _made_so(notes: Store, key: str, digest: str) -> bool:
    try:
        return bool(json.loads(notes.read(f"{key}.json"))["made"] == digest)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _known(notes: Store, speech: Store, key: str, digest: str) -> Sums | None:
    """Errors of predictions of a clip that was spoken in this very way, its speech being as it was written."""
    try:
        note = json.loads(notes.read(f"{key}.json"))
        if note["made"] != digest or note["wav"] != speech.sha256(f"{key}.wav"):
            return None
        return {str(name): (float(total), float(count)) for name, (total, count) in note["sums"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _errors(spoken: Spoken, clip: Mapping[str, Any], synthesizer: Synthesizer, clips: SplitClips) -> Sums:
    """Sums of errors of what the system predicts, against what the shards hold."""
    facts, mode = synthesizer.state.dataset, synthesizer.state.config["data"]["pitch"]
    sums: Sums = {}
    told = synthesizer.network.config.told_voice
    if spoken.units is not None and "units" in clip and clips.same_units(facts):
        sums["unit_accuracy"] = float((spoken.units == clip["units"]).sum()), float(len(clip["units"]))
    for name, key in (("mel", "mel_l1"), ("pitch", "pitch_mae"), ("energy", "energy_mae"), ("timbre", "timbre_mae")):
        said = getattr(spoken, name)
        if said is not None and name in clip and (name != "timbre" or (clips.same_units(facts) and not told)):
            true = standardise(clip[name], mode) if name == "pitch" else clip[name]
            sums[key] = float(np.abs(said - true).sum(dtype=np.float64)), float(np.size(true))
    return sums


def _keep(store: Store, name: str, data: bytes) -> None:
    """Write a file unless it is there as it should be."""
    found = store.find(name)
    if found is None or found.size != len(data) or store.read(name) != data:
        store.write(name, data)


def _as_dataset(config: EvaluationConfig, clips: SplitClips) -> EvaluationConfig:
    """Pitch range and filterbank of the dataset, where the user sets no other."""
    named = (("fmin", "pitch"), ("fmax", "pitch"), ("filterbank", "mel"))
    own = {name: clips.recipes[stage].settings[name] for name, stage in named if stage in clips.recipes}
    unset = {name: value for name, value in own.items() if name not in config.model_fields_set}
    return EvaluationConfig.model_validate({**config.model_dump(), **unset})


def _with(clip: ClipScores, predicted: Sums) -> ClipScores:
    return replace(clip, sums=clip.sums | predicted)
