"""Silent videos in, files with speech out: one video, a folder, or a list, in this process or on Ray."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from model import checkpoint as checkpoints
from model.speech_record import Failure, Task, is_made, remove_stale, withdraw, write_failed, write_whole
from model.synthesis import Sampling, Spoken, Synthesizer, torch_threads
from shards.codec import encode_sound
from shards.errors import UserError
from shards.progress import Progress
from shards.schema import SAMPLE_RATE
from shards.storage import is_remote

if TYPE_CHECKING:
    from pipeline.stage import Clip

Format = Literal["wav", "mp4"]
SAVED = ("units", "pitch", "energy", "timbre", "mel")
"""Predictions that can be written beside the speech."""


@dataclass(frozen=True)
class Job:
    """What speech is made with, and what of it is written; plain values, so that it can go to another machine.

    Attributes:
        checkpoint: file, or folder of a training run.
        vocoder, lip_weights, device, sampling, threads: see `model.synthesis.Synthesizer`.
        track: number of the face that speaks, see `pipeline.prepare.Preparer.fields`.
        save: names among `SAVED`, written as `.npz`.

    Raises:
        UserError: a name that is not among `SAVED`, or no thread.
    """

    checkpoint: str
    sampling: Sampling = field(default_factory=Sampling)
    vocoder: str | None = None
    lip_weights: Path | None = None
    device: str = "auto"
    threads: int = 1
    track: int | None = None
    save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.save if name not in SAVED]
        if unknown:
            raise UserError(f"--save {unknown[0]}: choose from {', '.join(SAVED)}")
        if self.threads < 1:
            raise UserError(f"--threads {self.threads}: must be 1 or more")


@dataclass(frozen=True)
class Speech:
    """What was written: the wav, the video with sound and the predictions (None where they were not asked for)."""

    wav: Path
    video: Path | None
    seconds: float
    step: int
    vocoder: str
    predictions: Path | None = None


@dataclass(frozen=True)
class Report:
    """What came of many clips: `made` now, `kept` from before, and `failed`, each in the order of the source."""

    output: Path
    made: list[Speech] = field(default_factory=list)
    kept: int = 0
    failed: list[Failure] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> failed clips."""
        return dict(sorted(Counter(failure.reason for failure in self.failed).items()))


class Speaker:
    """Everything that a job needs, loaded once.

    Raises:
        UserError: a checkpoint or vocoder that cannot be used, a system that must be given a voice, or other stage
            weights than its training had.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.synthesizer = Synthesizer(
            job.checkpoint, job.vocoder, job.lip_weights, job.device, job.sampling, job.threads
        )
        shape = self.synthesizer.network.config
        if shape.told_voice:
            raise UserError(
                f"{job.checkpoint}: this {shape.system} takes its speaker from a reference voice "
                "(model.speaker=voice), and a silent video has none; speak for clips of a dataset, whose shards hold "
                "their voices, with `f2v evaluate --checkpoint ... --dataset ...`, or train one that reads the speaker "
                "from the face (model.speaker=face)"
            )
        from pipeline.prepare import Preparer

        dataset = self.synthesizer.state.dataset
        self._preparer = Preparer(dataset["profile"], dataset["stages"])

    def facts(self) -> dict[str, Any]:
        """What decides the speech of a clip besides the clip, as JSON values."""
        facts = self.synthesizer.facts() | self.synthesizer.digests
        return facts | {"threads": self.job.threads, "track": self.job.track, "save": list(self.job.save)}

    def speak(self, clip: Clip, output: Path, facts: dict[str, Any] | None = None) -> Speech:
        """Speak for a clip and write the files; its sound, where it has any, tells at most who of several speaks.

        Args:
            facts: written to a `.json` beside the speech, after everything else; None where no such file is wanted.

        Raises:
            pipeline.prepare.Unusable: the clip cannot be used.
            UserError: a prediction to be saved that this system does not make.
        """
        with torch_threads(self.job.threads):
            fields = self._preparer.fields(clip, self.job.track)
        (spoken,) = self.synthesizer.speak([{name: fields[name] for name in ("lips", "identity", "expression")}])
        arrays = self._chosen(spoken)
        output.parent.mkdir(parents=True, exist_ok=True)
        withdraw(output, without_predictions=not arrays)
        predictions = output.with_suffix(".npz") if arrays else None
        if predictions:
            packed = io.BytesIO()
            np.savez(packed, **arrays)
            write_whole(predictions, packed.getvalue())
        wav, video = output.with_suffix(".wav"), output if output.suffix.lower() == ".mp4" else None
        write_wav(wav, spoken.wave)
        if video:
            from pipeline.media import decode_video
            from pipeline.mux import write_video

            write_video(video, decode_video(clip.uri, clip.start, clip.end), spoken.wave)
        seconds = len(spoken.wave) / SAMPLE_RATE
        if facts is not None:
            about = {"source": clip.uri, "seconds": seconds, "face": fields["track"], "made_with": facts}
            write_whole(output.with_suffix(".json"), json.dumps(about, indent=1).encode())
        made = self.synthesizer
        return Speech(wav, video, seconds, made.state.step, made.vocoder.name, predictions)

    def attempt(self, task: Task) -> Speech | Failure:
        """`speak` for one of many: what concerns this clip alone becomes a `Failure`."""
        from pipeline.prepare import Unusable

        try:
            return self.speak(task.clip, task.output, task.facts)
        except Unusable as error:
            return Failure(task.key, task.clip.uri, error.reason.value, error.message)

    def _chosen(self, spoken: Spoken) -> dict[str, Any]:
        found = {name: getattr(spoken, name) for name in self.job.save}
        missing = [name for name, value in found.items() if value is None]
        if missing:
            there = ", ".join(name for name in SAVED if getattr(spoken, name) is not None)
            raise UserError(f"--save {missing[0]}: this checkpoint's system predicts no such thing; it has {there}")
        return found


def synthesize(video: str, output: Path, job: Job) -> Speech:
    """Speak for one video.

    Args:
        output: `.mp4` writes the video with sound and a `.wav` beside it; `.wav` writes that alone. With `job.save`
            there are a `.npz` and a `.json` besides.

    Raises:
        UserError: unusable video, checkpoint or output name.
    """
    if output.suffix.lower() not in (".mp4", ".wav"):
        raise UserError(f"{output}: the output must end in .mp4 or .wav")
    if not output.parent.is_dir():
        raise UserError(f"{output}: folder {output.parent} is missing")
    if not is_remote(video) and output.resolve() == Path(video).resolve():
        raise UserError(f"{output}: would overwrite the input")
    speaker = Speaker(job)

    from pipeline.stage import Clip

    facts = speaker.facts() | {"format": output.suffix.lower().removeprefix(".")} if job.save else None
    return speaker.speak(Clip(key=Path(video).name, uri=video, digest=""), output, facts)


def synthesize_many(
    source: str,
    output: Path,
    job: Job,
    format: Format = "wav",
    force: bool = False,
    workers: int = 0,
    gpus: float = 0.0,
    ray_address: str | None = None,
) -> Report:
    """Speak for the clips of a folder or list, each to a file of the same relative name below `output`.

    A clip whose files are there, made of the same video with the same network and settings, is kept. Clips that cannot
    be used are listed in `failed.csv` below `output`, and what was made for them otherwise before is removed.

    Args:
        source: see `model.speech_list.list_videos`.
        force: make all anew.
        workers: processes of a Ray on this machine or of the cluster at `ray_address`; 0: this process.
        gpus: share of a GPU for each worker.

    Raises:
        UserError: unusable source, checkpoint or output, or a share of a GPU without workers.
    """
    from model.speech_list import check_output, check_sources_stay, list_videos, local_sources

    if workers < 0:
        raise UserError(f"--workers {workers}: must be 0 or more")
    if gpus and not workers and ray_address is None:
        raise UserError("--gpus: is a worker's share; add --workers, or --device cuda for this process")
    check_output(source, output)
    clips = list_videos(source)
    check_sources_stay(clips, output, {f".{format}", ".wav"})
    job = replace(
        job,
        checkpoint=_one_file(job.checkpoint),
        vocoder=job.vocoder and _one_file(job.vocoder),
        lip_weights=job.lip_weights and job.lip_weights.absolute(),
    )
    remote = bool(workers) or ray_address is not None
    # With workers this process only says what decides the speech: it may have no GPU, and should not fill one.
    speaker = Speaker(replace(job, device="cpu") if remote else job)
    facts = speaker.facts() | {"format": format}
    tasks = [
        Task(key, clip, output.absolute() / f"{key}.{format}", facts | _source(clip)) for key, clip in clips.items()
    ]
    sources = local_sources(clips)
    output.mkdir(parents=True, exist_ok=True)
    waiting = [task for task in tasks if force or not is_made(task)]
    report = Report(output, kept=len(tasks) - len(waiting))
    outcomes: Iterator[Speech | Failure] = map(speaker.attempt, waiting)
    if remote:
        from model.batch_synthesis import on_ray

        outcomes = on_ray(job, waiting, workers, gpus, ray_address)
    with Progress("synthesize", len(waiting), "clips") as progress:
        for task, outcome in zip(waiting, outcomes, strict=True):
            if isinstance(outcome, Failure):
                report.failed.append(outcome)
                remove_stale(task, sources)
                progress.note(f"{task.clip.uri}: {outcome.reason}: {outcome.message}")
            else:
                report.made.append(outcome)
            progress.advance()
    write_failed(output, report.failed)
    return report


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Mono 16-bit PCM at 16 kHz from samples within -1..1."""
    write_whole(path, encode_sound(samples))


def _source(clip: Clip) -> dict[str, Any]:
    """What decides the speech of a clip in its media."""
    return {"sha256": clip.digest, "start": clip.start, "end": clip.end}


def _one_file(place: str) -> str:
    """A file that workers in another folder find; of a folder its newest checkpoint: a training that goes on meanwhile
    must not change what they load."""
    uri = checkpoints.as_uri(place)
    uri = uri if is_remote(uri) else str(Path(uri).absolute())
    if uri.endswith(checkpoints.SUFFIX):
        return uri
    names = checkpoints.found(uri) if is_remote(uri) or Path(uri).is_dir() else []
    return f"{uri}/{names[-1]}" if names else uri
