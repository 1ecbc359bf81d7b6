"""Evaluation of folders: partners, texts, processes, cache, tables. What the metrics say is tested elsewhere."""

from __future__ import annotations

import csv
import json
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from model.evaluation import scoring
from model.evaluation.cache import ScoreCache
from model.evaluation.config import EvaluationConfig
from model.evaluation.evaluate import ClipScores, Evaluation, evaluate_folders
from model.evaluation.metrics import Scores
from model.evaluation.partners import draw, find_pairs
from model.evaluation.quoted import TABLE_2, TABLE_4, TABLE_5
from model.evaluation.tables import clips_csv, differences, markdown, summary_json, table, terminal
from shards.errors import UserError
from tests.fake_metrics import FakeMetrics

PEAKS = {"a": 0.5, "b/c": 0.25, "b/d.e": 0.05}


def write_wav(path: Path, peak: float, samples: int = 6400, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = peak * np.sin(2 * np.pi * 200 * np.arange(samples) / rate)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(32767 * sound).astype("<i2").tobytes())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three clips of two systems."""
    for key, peak in PEAKS.items():
        write_wav(tmp_path / f"gen/{key}.wav", peak)
        write_wav(tmp_path / f"ref/{key}.wav", 0.3)
    return tmp_path / "gen", tmp_path / "ref"


def evaluate(folders: tuple[Path, Path], **settings: Any) -> Evaluation:
    cache = folders[0].parent / "cache"
    config = settings.pop("config", EvaluationConfig())
    return evaluate_folders(*folders, config, workers=1, cache=cache, make=FakeMetrics, **settings)


def test_scores_are_kept_and_what_changed_is_scored_anew(folders: tuple[Path, Path]) -> None:
    first = evaluate(folders)
    assert [clip.key for clip in first.clips] == sorted(PEAKS)
    peaks = [clip.sums["dnsmos_ovrl"][0] for clip in first.clips]
    assert peaks == pytest.approx([PEAKS[key] for key in sorted(PEAKS)], abs=0.001)
    assert {(clip.text, clip.text_from) for clip in first.clips} == {("heard words", "heard")}
    assert first.facts["known_before"] == 0
    again = evaluate(folders)
    assert again.facts["known_before"] == 3
    assert again.clips == first.clips

    write_wav(folders[0] / "a.wav", 0.7)
    (folders[1] / "b/c.txt").write_text("some words")
    changed = evaluate(folders)
    assert changed.facts["known_before"] == 1
    assert changed.clips[0].sums["dnsmos_ovrl"][0] == pytest.approx(0.7, abs=0.001)
    assert (changed.clips[1].text, changed.clips[1].text_from) == ("some words", "file")


class OddMetrics(FakeMetrics):
    """One figure is no number."""

    def score(self, *sounds: Any) -> Scores:
        scores = super().score(*sounds)
        return replace(scores, sums={**scores.sums, "secs": (float("nan"), 1.0), "cer": (float("inf"), 1.0)})


def test_figures_that_are_no_numbers_are_noted_and_the_others_kept(folders: tuple[Path, Path]) -> None:
    first, again = (
        evaluate_folders(*folders, EvaluationConfig(), "x", 1, folders[0].parent / "cache", make=OddMetrics)
        for _ in range(2)
    )
    assert set(first.clips[0].sums) == {"dnsmos_ovrl", "wer"}
    assert first.clips[0].notes == ("no secs: not a finite number", "no cer: not a finite number")
    assert again.clips == first.clips
    assert again.facts["known_before"] == 3


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"sums": {"wer": [1',
        b"[]",
        b'{"sums": {"wer": [1]}, "heard": null, "heard_reference": null, "notes": []}',
        b'{"sums": {"wer": [NaN, 1]}, "heard": null, "heard_reference": null, "notes": []}',
        b'{"sums": {}, "heard": 3, "heard_reference": null, "notes": []}',
        b"\xff\xfe",
    ],
)
def test_damaged_entries_are_none(folders: tuple[Path, Path], damage: bytes) -> None:
    cache = ScoreCache(folders[0].parent / "cache", {"beam": 5})
    files = folders[0] / "a.wav", folders[1] / "a.wav"
    name = cache.name(*files, "text")
    assert cache.get(name) is None
    scores = Scores({"wer": (1.0, 3.0)}, "heard", None, ("a", "b"))
    cache.put(name, scores)
    assert cache.get(name) == scores
    (cache.folder / name).write_bytes(damage)
    assert cache.get(name) is None
    cache.put(name, scores)
    assert cache.get(name) == scores
    # Other settings and other texts are other scores.
    others = ScoreCache(cache.folder, {"beam": 1}).name(*files, "text"), cache.name(*files, None)
    assert len({name, *others}) == 3


def test_a_clip_that_kills_its_process_costs_that_clip(folders: tuple[Path, Path]) -> None:
    write_wav(folders[0] / "a.wav", 0.95)
    write_wav(folders[0] / "b/c.wav", 0.85)
    (folders[0] / "b/x.wav").write_bytes(b"no sound")
    write_wav(folders[1] / "b/x.wav", 0.3)
    found = evaluate(folders)
    assert [clip.key for clip in found.clips] == ["b/d.e"]
    dead, broken, unreadable = found.unreadable
    assert "a: " in dead
    assert "SIGKILL" in dead
    assert "b/c: could not be scored (ValueError: a peak)" in broken
    assert "b/x.wav: cannot be read" in unreadable
    # Failures are not kept as scores.
    assert len(list((folders[0].parent / "cache").rglob("*.json"))) == 1


def test_a_clip_that_takes_too_long_costs_that_clip(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PATIENCE", 0.01)
    found = []
    for one in scoring.score_pairs(find_pairs(*folders)[0][:2], EvaluationConfig(), 1, FakeMetrics):
        found.append(one)
        monkeypatch.setattr(scoring, "PATIENCE", 600.0)
    late, (index, scores) = found
    assert late == (0, scoring.Failed("not scored within 0.01 s"))
    assert index == 1
    assert scores.sums["dnsmos_ovrl"][0] == pytest.approx(PEAKS["b/c"], abs=0.001)


def test_scoring_that_always_fails_ends(folders: tuple[Path, Path]) -> None:
    generated, reference = folders
    for number in range(6):
        write_wav(generated / f"d{number}.wav", 0.85)
        write_wav(reference / f"d{number}.wav", 0.3)
        (generated / f"c{number}.wav").write_bytes(b"no sound")
        write_wav(reference / f"c{number}.wav", 0.3)
    found = evaluate(folders)
    assert [clip.key for clip in found.clips] == sorted(PEAKS)
    # Scores of before show that the metrics work.
    assert len(evaluate(folders).unreadable) == 12
    for key in PEAKS:
        (generated / f"{key}.wav").unlink()
    with pytest.raises(UserError, match=r"5 clips in a row failed and none has scores.*ValueError: a peak"):
        evaluate(folders)
    for number in range(2):
        (generated / f"d{number}.wav").unlink()
    assert len(evaluate(folders).unreadable) == 10


def test_processes_share_no_gpu_unless_asked_to(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    crews = []

    def counted(pairs: Any, config: Any, workers: int, *_: Any) -> Any:
        crews.append(workers)
        return iter([(index, scoring.Failed("")) for index in range(len(pairs))])

    monkeypatch.setattr("model.evaluation.evaluate.score_pairs", counted)
    monkeypatch.setattr("model.evaluation.evaluate.cores", lambda: 2)
    for device in ("cpu", "cuda:1"):
        monkeypatch.setattr("model.evaluation.metrics.device_of", lambda _, device=device: device)
        for workers in (None, 3):
            cache = folders[0].parent / "cache"
            found = evaluate_folders(*folders, EvaluationConfig(), "x", workers, cache, make=FakeMetrics)
            assert found.facts["device"] == device
    assert crews == [2, 3, 1, 3]


def test_metrics_that_cannot_work_stop_it_all(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="no such Whisper"):
        evaluate(folders, config=EvaluationConfig(whisper="missing"))


def test_partners_share_their_path_without_suffix(folders: tuple[Path, Path]) -> None:
    generated, reference = folders
    write_wav(generated / "only/here.wav", 0.1)
    write_wav(reference / "only/there.wav", 0.1)
    (reference / "b/d.e.wav").rename(reference / "b/d.e.MP4")
    for name in ("a.mp4", "a.png", ".hidden.wav", ".hidden/a.wav"):
        (generated / name).parent.mkdir(exist_ok=True)
        (generated / name).write_bytes(b"")
    pairs, missing = find_pairs(generated, reference)
    assert [(pair.key, pair.generated.suffix, pair.reference.suffix) for pair in pairs] == [
        ("a", ".wav", ".wav"),
        ("b/c", ".wav", ".wav"),
        ("b/d.e", ".wav", ".MP4"),
    ]
    assert missing == [f"only/here: no file in {reference}", f"only/there: no file in {generated}"]
    [alone], none = find_pairs(generated / "a.wav", reference / "b/c.wav")
    assert (alone.key, alone.reference, none) == ("a", reference / "b/c.wav", [])
    (generated / "a.flac").write_bytes(b"")
    with pytest.raises(UserError, match="keep one"):
        find_pairs(generated, reference)


def test_nothing_to_score_is_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write_wav(tmp_path / "other/z.wav", 0.1)
    with pytest.raises(UserError, match="nothing to score"):
        find_pairs(folders[0], tmp_path / "other")
    with pytest.raises(UserError, match="no such"):
        find_pairs(folders[0], tmp_path / "nix")
    with pytest.raises(UserError, match="two folders, or two files"):
        find_pairs(folders[0], folders[1] / "a.wav")


def test_texts_come_from_the_table_then_from_beside_the_reference(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[1] / "a.txt").write_text("Text:  LRS HAS THIS\nConf:  3\n")
    (folders[1] / "b/c.txt").write_text("plain\nwords \n")
    (folders[1] / "b/d.e.txt").write_text("  \n")
    beside, _ = find_pairs(*folders)
    assert [(pair.text, pair.text_from) for pair in beside] == [
        ("LRS HAS THIS", "file"),
        ("plain words", "file"),
        (None, ""),
    ]
    texts = tmp_path / "texts.csv"
    texts.write_text('\ufeffkey,speaker,text\na,x,"first, choice"\nb/d.e,y,named\n', encoding="utf-8")
    named, _ = find_pairs(*folders, texts)
    assert [(pair.text, pair.text_from) for pair in named] == [
        ("first, choice", "table"),
        ("plain words", "file"),
        ("named", "table"),
    ]
    texts.write_text("key,text\na.wav,with its ending\n")
    with pytest.raises(UserError, match=r"'a\.wav'.*no clip"):
        find_pairs(*folders, texts)
    tables = {"key\na\n": "no column text", "key,text\na,b\na,c\n": "twice", "key,text\na\n": "without"}
    for content, message in tables.items():
        texts.write_text(content)
        with pytest.raises(UserError, match=message):
            find_pairs(*folders, texts)


def test_a_draw_is_the_same_for_every_system() -> None:
    keys = [f"k{number}" for number in range(100)]
    drawn = draw(keys, 10)
    assert drawn == sorted(drawn) == draw(keys[::-1], 10)
    assert set(drawn) < set(draw(keys, 11))
    assert draw(keys, None) == sorted(keys)
    assert draw(["\udcff"], 1) == ["\udcff"]  # a name that is not UTF-8
    assert draw(keys[:3], 10) == keys[:3]
    with pytest.raises(UserError, match="positive"):
        draw(keys, 0)


def test_the_command_end_to_end(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real metrics that need no network."""
    generated, reference = folders
    write_wav(generated / "a.wav", 0.3)  # the reference itself
    write_wav(generated / "b/c.wav", 0.3, samples=5760)
    write_wav(generated / "b/d.e.wav", 0.3, samples=8820, rate=22_050)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    command = ["evaluate", str(generated), str(reference), "-o", str(out), "--metrics=energy,length", "--workers=1"]
    assert main(command) == 0
    assert "(quoted)" in capsys.readouterr().out
    assert list((tmp_path / "home/faces2voices/scores").rglob("*.json"))
    with open(out / "clips.csv", newline="", encoding="utf-8") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    assert float(rows["a"]["mae_energy"]) == float(rows["a"]["length_error"]) == 0
    assert float(rows["b/c"]["length_error"]) == 640
    assert float(rows["b/d.e"]["length_error"]) == 0
    assert 0 < float(rows["b/d.e"]["mae_energy"]) < 0.2
    summary = json.loads((out / "summary.json").read_text())
    assert summary["figures"]["length_error"]["value"] == pytest.approx(640 / 3)
    assert summary["clips"] == 3
    assert summary["facts"]["measured"]["settings"]["metrics"] == ["energy", "length"]

    write_wav(generated / "lonely.wav", 0.1)
    assert main([*command, "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["missing"] == [f"lonely: no file in {reference}"]
    assert printed["facts"]["known_before"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give GENERATED and REFERENCE, or --checkpoint and --dataset"),
        (["gen"], "give GENERATED"),
        (["gen", "ref", "--dataset=ds"], "give GENERATED"),
        (["--checkpoint=c", "--dataset=d"], "-o OUT"),
        (["gen", "ref", "--metrics=loudness"], "metrics"),
        (["gen", "ref", "--workers=0"], "--workers 0"),
        (["gen", "ref", "--device=gpu"], "device"),
        (["guidance", "--checkpoint=c", "--dataset=d", "-o=o", "--scales=1,x"], "--scales 1,x"),
        (["guidance", "--checkpoint=c", "--dataset=d", "-o=o", "--scales=1,1.0"], "twice"),
        (["guidance", "--checkpoint=c", "--dataset=d", "-o=o", "--scales=-1"], "--guidance"),
        (["ablations", "ds", "out", "--only=lips"], "no ablation 'lips'"),
    ],
)
def test_clear_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err


def spoken(name: str, peaks: list[float], **clip: Any) -> Evaluation:
    given = {"heard": "a, b", "text": 'he said "no"', "text_from": "file", "notes": ("short", "odd | note")} | clip
    clips = [
        ClipScores(f"k{n}", {"dnsmos_ovrl": (p, 1.0), "wer": (1.0, 4.0)}, generated="g", reference="r", **given)
        for n, p in enumerate(peaks)
    ]
    return Evaluation(name, clips, unreadable=["x: odd | file"])


def test_tables_show_the_paper_beside_and_say_so() -> None:
    found = spoken("mine | yours", [2.0, 3.0])
    lines = table({found.name: found.summary()}, {found.name: 2}).splitlines()
    assert lines[0] == "| method | UTMOS ↑ | DNSMOS ↑ | RMSE F0 (Hz) ↓ | WER (%) ↓ |"
    assert lines[2] == "| mine \\| yours | – | 2.500 [2.000, 3.000] | – | 25.00 [25.00, 25.00] |"
    quoted = [line for line in lines if "(quoted)*" in line and line.startswith("|")]
    rows = [line.split(" | ")[0].strip("| *") for line in quoted]
    assert rows[1:5] == [f"{name}, LRS3 (quoted)" for name in ("SVTS", "Intelligible", "LTBS", "DiffV2S")]
    assert "| *ground truth, LRS3 (quoted)* | 3.545 | 2.582 | – | 2.29 |" in quoted
    assert "| *Intelligible, LRS3 (quoted)* | – | – | – | 29.60 |" in quoted
    assert "| *Ours, LRS3 (quoted)* | 4.031 | 2.789 | 39.013 | 30.45 |" in quoted
    assert "| *Ours, LRS2 (quoted)* | 3.921 | 2.586 | 43.441 | 39.37 |" in quoted
    assert len(quoted) == len(TABLE_2.rows) == len(lines) - 6
    assert "Table 2 of the paper" in lines[-2]
    for paper, row in (
        (TABLE_4, "| *w/o Prosody, LRS3 (quoted)* | 3.866 | – | 39.590 | 0.677 | 35.03 | 0.653 |"),
        (TABLE_5, "| *guidance 0.7, LRS3 valid (quoted)* | 3.946 | – | 35.290 | 0.726 | 25.27 | 0.798 |"),
    ):
        assert row in table({found.name: found.summary()}, {found.name: 2}, paper).splitlines()


def test_a_figure_that_some_clips_lack_says_on_how_many_it_stands() -> None:
    sums: list[Any] = [{"secs": (0.5, 1.0), "wer": (1.0, 4.0)}, {"wer": (1.0, 4.0)}]
    clips = [ClipScores(f"k{n}", one, None, None, "", (), "g", "r") for n, one in enumerate(sums)]
    found = Evaluation("mine", clips)
    row = "| mine | 25.00 [25.00, 25.00] | 0.500 [0.500, 0.500] (1 clips) |"
    assert row in table({"mine": found.summary()}, {"mine": 2}, best={}).splitlines()
    assert "0.500 [0.500, 0.500] (1 clips) |" in markdown(found)


def test_files_hold_what_was_measured() -> None:
    found = spoken("mine", [2.0, 3.0])
    rows = list(csv.DictReader(clips_csv(found).splitlines()))
    assert [row["dnsmos_ovrl"] for row in rows] == ["2", "3"]
    assert (rows[0]["heard"], rows[0]["text"], rows[0]["notes"]) == ("a, b", 'he said "no"', "short; odd | note")
    tree = summary_json(found)
    assert tree["figures"]["wer"] == {"value": 0.25, "low": 0.25, "high": 0.25, "clips": 2}
    assert tree["notes"] == {"text from file": 2, "with notes": 2}
    assert "* x: odd \\| file" in markdown(found)
    assert "not scored: 1 clips" in terminal(found)


def test_differences_that_are_sure_are_bold() -> None:
    from model.evaluation.bootstrap import paired

    for clips, bold in ((1, ""), (19, ""), (20, "**")):
        better, same = spoken("better", [3.0] * clips), spoken("same", [2.0] * clips)
        text = differences({"better": paired(better.sums(), same.sums())}, "method")
        assert f"| better | {bold}+1.000 [+1.000, +1.000]{bold} | +0.00 [+0.00, +0.00] |" in text
