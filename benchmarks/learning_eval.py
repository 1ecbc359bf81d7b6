"""How well a trained run speaks for silent clips of a dataset that it has not seen, beside trivial answers.

    python -m benchmarks.learning_eval DATASET --out floors.json
    python -m benchmarks.learning_eval DATASET --run RUN --out full.json

Whole clips; the network sees lips, identity and expression alone (no teacher forcing), and speech is Griffin-Lim of its
mel. Without `--run`, words of the original sound and of Griffin-Lim of the true mel: the floor for any network. Clips
are reported in two groups, by voices that the train split has and voices that it has not.

Every figure is a ratio of sums over clips (RMSE: its root), with the 2.5 and 97.5 % quantiles of 2000 bootstrap samples
of clips. Baselines know nothing of the lips, or more than anyone can: `constant` is a constant of the train split (the
commonest unit, medians, means), `speaker` that of the clip's speaker there, `clip` the best constant for that very
clip. Pitch in Hz is tracked in the speech by pYIN, compared where both it and the original are voiced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.learning_words import DECODINGS, LETTER, Decoding, Recogniser, edits_but, words
from model import checkpoint
from model.evaluation import bootstrap
from model.evaluation.figures import Sums
from model.evaluation.words import edits
from model.griffinlim import playable
from model.synthesis import load_network
from pipeline.stages.pitch import track_pitch
from shards.codec import decode
from shards.dataset import Dataset
from shards.errors import UserError
from shards.mel import from_pcm
from shards.pitch import PitchMode, standardise
from shards.schema import FIELDS
from shards.stream_config import StreamConfig
from shards.whole_clips import WholeClips

Floats = NDArray[np.float32]
READ = ("meta", "wav", "mel", "pitch", "energy", "units", "timbre")
BATCH_FRAMES = 400


@dataclass(frozen=True)
class Synthesis:
    """Arguments of `FacesToVoices.synthesize`, and the seed of its noise."""

    steps: int = 10
    guidance: float = 0.7
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Constants:
    """Trivial answers, taken from the train split.

    Attributes:
        unit, speaker_unit: the commonest unit, of all and by speaker.
        energy: median; timbre [D], mel [80]: means; hertz: mean of the voiced frames.
        pitch: median of the standardised pitch.
    """

    unit: int
    speaker_unit: dict[str, int]
    energy: float
    timbre: Floats
    mel: Floats
    hertz: float
    pitch: float


def read_clips(dataset: str, split: str) -> Iterator[dict[str, Any]]:
    """Every clip of a split as stored (see `READ`).

    Raises:
        UserError: no dataset there, or its shards lack such a field.
    """
    data = Dataset(dataset)
    index, clips = data.index_and_clips(data.manifest().index.name)
    missing = [name for name in READ if name not in ("meta", *index.fields)]
    if missing:
        raise UserError(f"{data.uri}: its shards hold no {' and no '.join(missing)}; build with them in pack.fields")
    for shard, listed in zip(index.shards, clips, strict=True):
        for clip in listed if shard.split == split else ():
            parts = data.store.read_ranges(shard.name, [tuple(clip["members"][name]) for name in READ])
            yield {name: decode(FIELDS[name], part, clip["frames"]) for name, part in zip(READ, parts, strict=True)} | {
                "key": clip["key"]
            }


def constants(dataset: str, mode: PitchMode) -> Constants:
    """The trivial answers of a dataset's train split, pitch standardised as `mode` says."""
    clips = list(read_clips(dataset, "train"))
    units: dict[str, list[Any]] = defaultdict(list)
    for clip in clips:
        units[clip["meta"]["speaker"]].append(clip["units"])

    def commonest(arrays: list[Any]) -> int:
        return int(np.bincount(np.concatenate(arrays)).argmax())

    def joined(name: str) -> Any:
        return np.concatenate([clip[name] for clip in clips])

    return Constants(
        unit=commonest([clip["units"] for clip in clips]),
        speaker_unit={speaker: commonest(arrays) for speaker, arrays in units.items()},
        energy=float(np.median(joined("energy"))),
        timbre=np.mean([clip["timbre"] for clip in clips], axis=0),
        mel=joined("mel").mean(0),
        hertz=float(np.nanmean(joined("pitch"))),
        pitch=float(np.median(np.concatenate([standardise(clip["pitch"], mode) for clip in clips]))),
    )


def speak(
    dataset: str, state: checkpoint.Checkpoint, split: str, how: Synthesis
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and what the network says of each clip: units [T], pitch, energy [T], timbre [D], mel [T, 80]."""
    network = load_network(state)
    clips = WholeClips(dataset, StreamConfig(split=split, min_frames=1, workers=0), BATCH_FRAMES)
    noise = torch.Generator().manual_seed(how.seed)
    for batch in clips.batches():
        with torch.inference_mode():
            spoken = network.synthesize(batch, noise, how.steps, how.guidance, how.temperature)
        for row, (key, frames) in enumerate(zip(batch["keys"], batch["frames"].tolist(), strict=True)):
            said: dict[str, Any] = {name: spoken[name][row].numpy() for name in spoken}
            said["mel"] = said["mel"].T
            yield key, {name: said[name] if name == "timbre" else said[name][: 2 * frames] for name in said}


def attribute_sums(
    clip: Mapping[str, Any], said: Mapping[str, Any], trivial: Constants, hertz: Floats, mode: PitchMode
) -> Sums:
    """Errors of one clip. Attributes that the network does not predict (ablations) are left out.

    Args:
        clip: as stored; said: as `speak` gives it.
        hertz: pitch of the network's speech, NaN where unvoiced.
        mode: how the network's pitch is standardised.
    """
    frames = len(clip["units"])
    fallback = trivial.speaker_unit.get(clip["meta"]["speaker"], trivial.unit)
    sums: Sums = {
        "unit_accuracy": (float((said["units"] == clip["units"]).sum()), frames),
        "unit_accuracy_constant": (float((clip["units"] == trivial.unit).sum()), frames),
        "unit_accuracy_speaker": (float((clip["units"] == fallback).sum()), frames),
        "mel_l1": _absolute(said["mel"], clip["mel"]),
        "mel_l1_constant": _absolute(trivial.mel, clip["mel"]),
        "mel_l1_clip": _absolute(np.median(clip["mel"], axis=0), clip["mel"]),
    }
    pitch = standardise(clip["pitch"], mode)
    for name, true, constant in (("pitch", pitch, trivial.pitch), ("energy", clip["energy"], trivial.energy)):
        if name in said:
            sums[f"{name}_mae"] = _absolute(said[name], true)
        sums[f"{name}_mae_constant"] = _absolute(constant, true)
        sums[f"{name}_mae_clip"] = _absolute(np.median(true), true)
    voiced, spoken = ~np.isnan(clip["pitch"]), ~np.isnan(hertz)
    both = voiced & spoken
    sums["voicing_error"] = float((voiced != spoken).sum()), frames
    if both.any():
        true = clip["pitch"][both]
        for name, value in (("", hertz[both]), ("_constant", trivial.hertz), ("_clip", true.mean())):
            sums[f"pitch_rmse_hz{name}"] = float(((value - true) ** 2).sum()), int(both.sum())
    if "timbre" in said:
        sums["timbre_mae"] = _absolute(said["timbre"], clip["timbre"])
        centred, wanted = said["timbre"] - trivial.timbre, clip["timbre"] - trivial.timbre
        lengths = max(1e-9, float(np.linalg.norm(centred) * np.linalg.norm(wanted)))
        # Without the mean, which alone has nearly all of the length; the mean itself would score 0.
        sums["timbre_centred_cosine"] = float(centred @ wanted) / lengths, 1
    sums["timbre_mae_constant"] = _absolute(trivial.timbre, clip["timbre"])
    return sums


def _absolute(value: Any, true: Any) -> tuple[float, float]:
    return float(np.abs(value - true).sum()), int(np.size(true))


def word_sums(said: str, heard: str, name: str) -> Sums:
    """Word errors, word errors where the letter may be anything or nothing, and character errors."""
    said_words, heard_words = words(said), words(heard)
    return {
        f"wer_{name}": (edits(said_words, heard_words), len(said_words)),
        f"wer_without_letter_{name}": (edits_but(said_words, heard_words, LETTER), len(said_words) - 1),
        f"cer_{name}": (edits(" ".join(said_words), " ".join(heard_words)), len(" ".join(said_words))),
    }


def summarise(rows: list[Sums]) -> dict[str, dict[str, float]]:
    """Value, low, high and the number of clips of every figure."""
    roots = {name for row in rows for name in row if "rmse" in name}
    return {name: asdict(found) for name, found in bootstrap.summarise(rows, roots).items()}


def evaluate(
    dataset: str,
    run: Path | None = None,
    split: str = "test",
    synthesis: Synthesis = Synthesis(),
    decodings: tuple[Decoding, ...] = DECODINGS,
    threads: int = 1,
) -> dict[str, Any]:
    """All figures of a run, or without one the words of the original sound and of the resynthesis.

    Args:
        run: checkpoint file or folder of a run.
        decodings: ways of recognition (see `benchmarks.learning_words`); none leaves words out.

    Raises:
        UserError: unusable dataset or checkpoint.
    """
    recogniser = Recogniser(threads) if decodings else None
    state = checkpoint.load(run) if run else None
    mode: PitchMode = state.config["data"]["pitch"] if state else "zero"
    trivial = constants(dataset, mode)
    stages = {stage: recipe.settings for stage, recipe in Dataset(dataset).index().recipe(split).items()}
    filterbank, limits = stages["mel"]["filterbank"], (stages["pitch"]["fmin"], stages["pitch"]["fmax"])
    clips = {clip["key"]: clip for clip in read_clips(dataset, split)}
    spoken = dict(speak(dataset, state, split, synthesis)) if state else {}
    rows: dict[str, list[Sums]] = defaultdict(list)
    heard: dict[str, dict[str, str]] = {}
    for key, clip in clips.items():
        sums: Sums = {}
        if state:
            wave = playable(spoken[key]["mel"], filterbank)
            waves = {"speech": wave}
            sums |= attribute_sums(clip, spoken[key], trivial, track_pitch(wave, *limits), mode)
        else:
            waves = {"original": from_pcm(clip["wav"]), "resynthesis": playable(clip["mel"], filterbank)}
        speaker, text = clip["meta"]["speaker"], clip["meta"]["text"]
        heard[key] = {"said": text}
        for source, wave in waves.items():
            for decoding in decodings if recogniser else ():
                name = f"{source}_{decoding}"
                heard[key][name] = recogniser(wave, decoding) if recogniser else ""
                sums |= word_sums(text, heard[key][name], name)
        rows["known voices" if speaker in trivial.speaker_unit else "held-out voices"].append(sums)
        rows[speaker].append(sums)
    return {
        "dataset": dataset,
        "split": split,
        "step": state.step if state else None,
        "synthesis": asdict(synthesis) if state else None,
        "groups": {name: summarise(members) for name, members in sorted(rows.items())},
        "chance": _chance(heard),
        "heard": heard,
    }


def _chance(heard: dict[str, dict[str, str]]) -> dict[str, float]:
    """Word error rates against the sentences of other clips: what the grammar alone gives."""
    said = [row["said"] for row in heard.values()]
    found = {}
    for name in next(iter(heard.values())).keys() - {"said"}:
        texts = [row[name] for row in heard.values()]
        pairs = zip([*said[1:], said[0]], texts, strict=True)
        found[f"wer_{name}"] = summarise([word_sums(a, b, name) for a, b in pairs])[f"wer_{name}"]["value"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--run", type=Path, help="checkpoint or folder of a run; without it the floors")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--split", default="test")
    for name, value in asdict(Synthesis()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"of the synthesis (default: {value})")
    parser.add_argument("--decodings", nargs="*", choices=DECODINGS, default=list(DECODINGS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    synthesis = Synthesis(args.steps, args.guidance, args.temperature, args.seed)
    try:
        found = evaluate(args.dataset, args.run, args.split, synthesis, tuple(args.decodings), args.threads)
    except UserError as error:
        print(f"learning_eval: {error}", file=sys.stderr)
        return 2
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for group, figures in found["groups"].items():
        print(group)
        for name, figure in figures.items():
            print(f"  {name:<36}{figure['value']:8.3f}  [{figure['low']:.3f}, {figure['high']:.3f}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
