"""Videos in, files with speech out: one, folders and lists; what fails, what is kept, and who of several speaks."""

from __future__ import annotations

import csv
import json
import os
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import ray

from cli.main import main
from model import batch_synthesis, checkpoint
from model.batch_synthesis import on_ray
from model.speech_list import list_videos
from model.speech_record import Failure, Task
from model.synthesize import Job, synthesize_many
from pipeline.media import decode_video
from pipeline.mux import write_video
from pipeline.prepare import KEPT, Preparer, Unusable
from pipeline.stage import Clip
from shards.errors import UserError
from tests.conftest import cluster
from tests.speaking import talking, untrained
from tests.test_vocoder_load import run_state, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def faces() -> tuple[np.ndarray, np.ndarray]:
    """Frames of two people."""
    return talking(0)[:16], talking(1)[:16]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, faces: tuple[np.ndarray, np.ndarray]) -> Path:
    """Two good videos without sound, the shorter one of 0.28 s, and two that cannot be used."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    write_video(folder / "a.v1.mp4", faces[0][:7], None)
    write_video(folder / "more" / "b.mp4", faces[1], None)
    write_video(folder / "more" / "grey.mp4", np.full((8, 64, 64, 3), 128, np.uint8), None)
    (folder / "words.mp4").write_text("no video")
    return folder


def speak(*words: object) -> int:
    return main(["synthesize", *map(str, words), "--steps", "1"])


def samples(path: Path) -> int:
    with wave.open(str(path)) as reader:
        assert (reader.getframerate(), reader.getnchannels(), reader.getsampwidth()) == (16000, 1, 2)
        return reader.getnframes()


def test_a_folder_is_mirrored_and_what_is_there_is_kept(
    run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    many = (videos, "-o", out, "--checkpoint", run, "--save", "units, timbre,mel")
    assert speak(*many, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["reasons"] == {"no_face": 1, "unreadable": 1}
    assert samples(out / "a.v1.wav") == 640 * 7
    assert samples(out / "more" / "b.wav") == 640 * 16
    with (out / "failed.csv").open(newline="") as stream:
        assert [(row["key"], row["reason"]) for row in csv.DictReader(stream)] == [
            ("more/grey", "no_face"),
            ("words", "unreadable"),
        ]
    with np.load(out / "more" / "b.npz", allow_pickle=False) as saved:
        assert {name: value.shape for name, value in saved.items()} == {
            "units": (32,),
            "timbre": (9,),
            "mel": (32, 80),
        }
    about = json.loads((out / "more" / "b.json").read_text())
    assert about["made_with"]["vocoder"] == "Griffin-Lim"
    assert about["face"]["by"] == "only"

    # One by one they say the same.
    assert speak(videos / "more" / "b.mp4", "-o", tmp_path / "b.wav", "--checkpoint", run) == 0
    assert (tmp_path / "b.wav").read_bytes() == (out / "more" / "b.wav").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["b.wav"]

    # What is there is kept; what is missing, or made otherwise, is made.
    (out / "a.v1.wav").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("b.*")}
    capsys.readouterr()
    assert speak(*many) == 1
    captured = capsys.readouterr()
    assert "1 clips, 0.28 s of speech (step 7, Griffin-Lim); 1 kept" in captured.out
    assert "2 failed: 1 no_face, 1 unreadable" in captured.out
    assert captured.err.count("words.mp4: unreadable") == 1
    assert samples(out / "a.v1.wav") == 640 * 7
    assert {path: path.stat().st_mtime_ns for path in out.rglob("b.*")} == before
    speech = (out / "more" / "b.wav").read_bytes()

    # What was overwritten by itself is not taken for what it was.
    assert speak(videos / "more" / "b.mp4", "-o", out / "more" / "b.wav", "--checkpoint", run, "--seed", "5") == 0
    assert (out / "more" / "b.wav").read_bytes() != speech
    assert speak(*many) == 1
    assert (out / "more" / "b.wav").read_bytes() == speech
    assert speak(*many, "--seed", "1") == 1
    assert (out / "more" / "b.wav").read_bytes() != speech


def test_workers_on_ray_write_the_same_bytes(run: Path, videos: Path, tmp_path: Path) -> None:
    job = Job(str(run))
    here = synthesize_many(str(videos), tmp_path / "here", job, "mp4")
    there = synthesize_many(str(videos), tmp_path / "there", job, "mp4", workers=1, ray_address=cluster())
    assert [speech.wav.name for speech in there.made] == [speech.wav.name for speech in here.made]
    assert there.failed == here.failed
    names = sorted(str(path.relative_to(tmp_path / "here")) for path in (tmp_path / "here").rglob("*.*"))
    assert "more/b.mp4" in names
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    # The picture is the source's, without its sound there being any.
    seen = list(decode_video(str(tmp_path / "there" / "more" / "b.mp4")))
    source = list(decode_video(str(videos / "more" / "b.mp4")))
    assert np.abs(np.stack(seen).astype(float) - np.stack(source)).mean() < 4
    with av.open(str(tmp_path / "there" / "more" / "b.mp4")) as container:
        assert container.streams.video[0].average_rate == 25
        assert container.streams.audio[0].rate == 16000


def test_workers_are_told_one_file_and_may_have_a_gpu_that_is_not_here(
    run: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    newest = checkpoint.save(tmp_path / "vocoder", run_state(tiny()), keep=1)

    def elsewhere(job: Job, tasks: list[Task], *_: object) -> list[Failure]:
        return [Failure(task.key, "", str(job.vocoder), job.device) for task in tasks]

    monkeypatch.setattr(batch_synthesis, "on_ray", elsewhere)
    job = Job(str(run), vocoder=str(tmp_path / "vocoder"), device="cuda")
    report = synthesize_many(str(videos), tmp_path / "out", job, workers=1, gpus=0.5)
    assert {(failure.reason, failure.message) for failure in report.failed} == {(newest, "cuda")}


def test_a_clip_that_kills_its_worker_costs_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Mortal:
        def __init__(self, job: Job) -> None:
            pass

        def run(self, task: Task) -> Failure:
            if task.key == "poison":
                os._exit(1)
            return Failure(task.key, "", "fine", str(os.getpid()))

    monkeypatch.setattr(batch_synthesis, "Worker", Mortal)
    keys = ["a", "poison", "b", "c"]
    tasks = [Task(key, Clip(key, key, ""), tmp_path / key, {}) for key in keys]
    came = list(on_ray(Job("none"), tasks, 1, 0.0, cluster()))
    assert [(failure.key, failure.reason) for failure in came if isinstance(failure, Failure)] == [
        ("a", "fine"),
        ("poison", "worker_died"),
        ("b", "fine"),
        ("c", "fine"),
    ]
    poison = [Task("poison", Clip("", "", ""), tmp_path, {}) for _ in range(9)]
    with pytest.raises(UserError, match="workers died before any clip was done"):
        list(on_ray(Job("none"), poison, 1, 0.0, cluster()))
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def preparer() -> Preparer:
    return Preparer("offline", _recipes())


def _recipes() -> dict[str, Any]:
    from pipeline.config import BuildConfig
    from pipeline.fingerprint import recipe_of
    from pipeline.registry import VISUAL_STAGES, make_stage

    return {kind.name: recipe_of(make_stage(kind, BuildConfig(), None)).model_dump() for kind in VISUAL_STAGES}


def test_a_stage_of_another_version_is_said() -> None:
    recipes = _recipes()
    recipes["lips"]["version"] += 1
    with pytest.warns(UserWarning, match=r"stage lips: .* made by version 2, this is version 1"):
        Preparer("offline", recipes)


def test_of_several_silent_faces_one_is_named(
    run: Path,
    faces: tuple[np.ndarray, np.ndarray],
    preparer: Preparer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = tmp_path / "pair.mp4"
    write_video(pair, np.concatenate([face[:13] for face in faces], axis=2), None)
    assert speak(pair, "-o", tmp_path / "out.wav", "--checkpoint", run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "several_faces: 2 faces of like size" in line
    assert "--track: 1: 0.00-0.52 s, box " in line
    assert "; 2: 0.00-0.52 s, box " in line
    clip = Clip("", str(pair), "")
    found = {number: preparer.fields(clip, number) for number in (1, 2)}
    for number, face in enumerate(faces, 1):
        left, _, right, _ = found[number]["track"]["box"]
        assert (left + right) / 2 // 192 == number - 1
        # The mouth is that of the face alone.
        alone = tmp_path / f"{number}.mp4"
        write_video(alone, face[:13], None)
        lips = preparer.fields(Clip("", str(alone), ""))["lips"]
        assert np.abs(lips.astype(float) - found[number]["lips"]).mean() < 6
    assert np.abs(found[1]["lips"].astype(float) - found[2]["lips"]).mean() > 10
    with pytest.raises(Unusable, match="no face has number 3: 1: "):
        preparer.fields(clip, 3)


def test_long_videos_go_through_the_stages_in_spans(preparer: Preparer, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    pictures = talking(2)[:53]
    write_video(film, pictures, None)
    clip = Clip("", str(film), "")
    whole, parts = preparer.fields(clip), Preparer("offline", _recipes(), span=25).fields(clip)
    for name in KEPT:
        np.testing.assert_array_equal(whole[name], parts[name])
    assert len(whole["lips"]) == len(pictures) == 53


def test_tables_and_lists_name_what_is_written(videos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    film = videos / "more" / "b.mp4"
    table.write_text(f"uri,key,start,end\n{film},x/one,,0.4\n{film},x/two.2,0.2,\n")
    found = list_videos(str(table))
    assert {key: (clip.start, clip.end) for key, clip in found.items()} == {
        "x/one": (None, 0.4),
        "x/two.2": (0.2, None),
    }
    assert len({clip.digest for clip in found.values()}) == 1
    listing = tmp_path / "list.txt"
    listing.write_text(f"# two\n{film}\n\n{os.path.relpath(videos / 'a.v1.mp4', tmp_path)}\n")
    assert {key: clip.uri for key, clip in list_videos(str(listing)).items()} == {
        "a.v1": str(videos / "a.v1.mp4"),
        "more/b": str(film),
    }
    assert list(list_videos(str(videos))) == ["a.v1", "more/b", "more/grey", "words"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uri,key\na.mp4,../x\n", "leads out of the output"),
        ("uri,key\na.mp4,x\nb.mp4,x\n", "'x'"),
        ("name\na.mp4\n", "no column `uri`"),
    ],
)
def test_lists_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        list_videos(str(tmp_path / "table.csv"))


def test_a_list_beside_its_videos_does_not_replace_them(run: Path, tmp_path: Path) -> None:
    film = tmp_path / "more" / "b.mp4"
    film.parent.mkdir()
    film.write_bytes(b"film")
    (tmp_path / "list.txt").write_text("more/b.mp4\n")
    (tmp_path / "table.csv").write_text("uri,key\nmore/b.mp4,b\n")
    for source in ("list.txt", "table.csv"):
        with pytest.raises(UserError, match=r"b\.mp4: is a source"):
            synthesize_many(str(tmp_path / source), film.parent, Job(str(run)), "mp4")
    assert film.read_bytes() == b"film"
    (tmp_path / "list.txt").write_text("s3://bucket/b.mp4\n")
    with pytest.raises(UserError, match="holds more than paths"):
        list_videos(str(tmp_path / "list.txt"))


def test_two_videos_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="would both be written as 'a'"):
        list_videos(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{videos}", "-o", "{videos}/out"], "lies in the source folder"),
        (["{videos}", "-o", "out.mp4"], "name a folder for the output"),
        (["{videos}/a.v1.mp4", "-o", "out.wav", "--workers", "2"], "--workers: is for a folder or a list"),
        (["{videos}/a.v1.mp4", "-o", "out.wav", "--format", "wav"], "--format: is for a folder or a list"),
        (["{videos}/a.v1.mp4", "-o", "out.wav", "--save", "sound"], "--save sound: choose from units"),
        (["{videos}/a.v1.mp4", "-o", "out.wav", "--threads", "0"], "--threads 0"),
        (["{videos}", "-o", "out", "--gpus", "0.5"], "--gpus: is a worker's share; add --workers"),
        (["{videos}", "-o", "out", "--workers", "-1"], "--workers -1: must be 0 or more"),
        (["none", "-o", "out.wav"], "none: unreadable"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    run: Path,
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert speak(*[word.format(videos=videos) for word in words], "--checkpoint", run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_rotated_video_is_muxed_upright(run: Path, clips: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"uri,key,end\n{next(clips.glob('03_*rot*'))},x,0.24\n")
    assert speak(table, "-o", tmp_path / "out", "--checkpoint", run, "--format", "mp4") == 0
    with av.open(str(tmp_path / "out" / "x.mp4")) as container:
        frames = list(container.decode(video=0))
        assert [(frame.width, frame.height) for frame in frames] == [(540, 960)] * 6
    assert samples(tmp_path / "out" / "x.wav") == 640 * 6
