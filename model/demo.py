"""The whole job in one go: corpus -> build -> verify -> a short training -> speech for a held-out clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.synthesis import Sampling
from model.synthesize import Job, Speech, synthesize
from model.train import Result, train
from model.train_config import train_config
from pipeline.build import Summary, build
from pipeline.config import BuildConfig
from pipeline.picture import draw_clip
from pipeline.synthetic.corpus import write_corpus, write_faulty
from shards.config import load_config
from shards.dataset import ClipRow, Dataset
from shards.errors import UserError
from shards.progress import Progress
from shards.verify import verify

SHARD_CLIPS = 16
"""Small shards, so that a small corpus has several."""


@dataclass(frozen=True)
class Tour:
    """Where the demo left everything, and how it went; `held_out`: training has not seen the spoken clip."""

    source: str
    dataset: str
    summary: Summary
    training: Result
    speech: Speech
    text: str
    held_out: bool
    picture: Path


def demo(
    folder: Path, source: Path | None, clips: int, minutes: float, seed: int, say: Callable[[str], None] = print
) -> Tour:
    """Run every part on a synthetic corpus, or on the clips in `source`.

    Args:
        clips: size of the synthetic corpus.
        minutes: of training.
        say: called with a line before each part.

    Raises:
        UserError: see the parts; also a dataset that does not verify.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source is None:
        source = folder / "corpus"
        if not (source / "train").is_dir():
            say(f"1/5 corpus: {clips} clips of synthetic talking faces and a few faulty ones -> {source}")
            with Progress("corpus", clips, "clips") as progress:
                write_corpus(source, clips=clips, seed=seed, workers=2, progress=lambda done, total: progress.advance())
            write_faulty(source / "faulty")
    dataset = folder / "dataset"
    say(f"2/5 build: {source} -> {dataset}")
    config = load_config(BuildConfig, base={"pack": {"shard_clips": SHARD_CLIPS}})
    summary = build(str(source), str(dataset), config)
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.quarantined.items())) or "none"
    say(f"    {summary.clips} clips in {summary.shards} shards; quarantine: {refused}")
    say("3/5 verify")
    verdict = verify(str(dataset))
    if verdict.problems:
        raise UserError(f"{dataset}: {len(verdict.problems)} problems, first: {verdict.problems[0]}")
    say(f"4/5 train: {minutes:g} minutes of size tiny -> {folder / 'run'}")
    training = train(
        str(dataset), folder / "run", train_config(None, ["size=tiny", "steps=20000", f"minutes={minutes}"])
    )
    clip, held_out = _spoken_clip(Dataset(str(dataset)).clips())
    say(f"5/5 synthesize: {clip.uri}")
    job = Job(str(folder / "run"), Sampling(seed=seed))
    speech = synthesize(clip.uri, folder / "spoken.mp4", job)
    picture = draw_clip(str(dataset), clip.key, folder / "clip.png")
    return Tour(str(source), str(dataset), summary, training, speech, clip.text, held_out, picture)


def _spoken_clip(rows: list[ClipRow]) -> tuple[ClipRow, bool]:
    """A clip to speak for: of the test split, or failing that any."""
    usable = [row for row in rows if row.state == "packed" and row.start is None and row.end is None]
    if not usable:
        raise UserError("no clip got through the build; see `f2v quarantine --list`")
    usable.sort(key=lambda row: (row.split != "test", row.key))
    return usable[0], usable[0].split == "test"
