"""Systems side by side: what is surely the best, what is left out, and a page that trusts nobody's names."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cli.main import main
from model.evaluation.alignment import align
from model.evaluation.compare import Comparison, compare, surely_best
from model.evaluation.config import EvaluationConfig
from model.evaluation.contestants import common_clips, parse_systems
from model.evaluation.evaluate import ClipScores, Evaluation
from model.evaluation.figures import Sums
from model.evaluation.page import choose, write_page
from model.evaluation.pictures import Track, picture, scales
from pipeline.pages.draw import bin_of, mel_png
from pipeline.pages.html import document
from shards.codec import encode
from shards.errors import UserError
from shards.schema import FIELDS
from tests.fake_metrics import FakeMetrics

NASTY = "<img src=x onerror=alert(1)>"


def wav(path: Path, gain: float = 1.0, seconds: float = 0.4) -> Path:
    noise = np.random.default_rng(0).normal(0, 3000, int(16000 * seconds))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(FIELDS["wav"], (gain * noise).round().clip(-32768, 32767).astype(np.int16)))
    return path


# Which system is the best.


def rows(values: list[float], key: str = "secs") -> dict[str, Sums]:
    return {f"clip{number}": {key: (value, 1.0)} for number, value in enumerate(values)}


def test_best_must_be_apart_from_the_runner_up() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(0.5, 0.2, 40)
    # A small step on every clip is sure though the systems' own intervals overlap; a large one on few clips is not.
    steady = list(hard + 0.01 + generator.normal(0, 0.002, 40))
    lucky = list(hard + np.where(np.arange(40) < 3, 1.0, -0.05))
    assert surely_best({"a": rows(list(hard)), "b": rows(steady)}) == {"secs": "b"}
    assert np.mean(lucky) > np.mean(hard)
    assert surely_best({"a": rows(list(hard)), "b": rows(lucky)}) == {}
    # Both are far better than the third, but neither than the other.
    assert surely_best({"a": rows(list(hard)), "b": rows(lucky), "c": rows(list(hard - 1))}) == {}


def test_best_is_the_lowest_where_lower_is_better() -> None:
    low, high = list(np.linspace(0.1, 0.2, 20)), list(np.linspace(0.5, 0.7, 20))
    assert surely_best({"a": rows(high, "wer"), "b": rows(low, "wer")}) == {"wer": "b"}
    assert surely_best({"b": rows(low, "wer"), "a": rows(high, "secs")}) == {}
    # Few clips are not enough.
    assert surely_best({"a": rows([0.9] * 19), "b": rows([0.1] * 19)}) == {}
    assert surely_best({"a": rows([0.9] * 20), "b": rows([0.1] * 20)}) == {"secs": "a"}


def test_best_must_be_apart_from_all_others() -> None:
    steady = np.random.default_rng(0).normal(0.5, 0.01, 20)
    # The third is worse by more than the runner-up, but on two clips alone, and better on all others.
    uneven = np.where(np.arange(20) < 2, steady - 0.9, steady + 0.02)
    systems = {"a": rows(list(steady)), "b": rows(list(steady - 0.03)), "c": rows(list(uneven))}
    assert surely_best({name: systems[name] for name in "ab"}) == {"secs": "a"}
    assert surely_best(systems) == {}


def clip(key: str, sums: Sums, text: str | None = None, heard: str | None = None, **more: Any) -> ClipScores:
    return ClipScores(key, sums, heard, text, "file" if text else "", (), **{"generated": "", "reference": "", **more})


def comparison(systems: dict[str, list[ClipScores]]) -> Comparison:
    evaluations = {name: Evaluation(name, clips, facts={"folder": name}) for name, clips in systems.items()}
    return Comparison("gt", list(systems)[-1], evaluations, {}, [])


def test_table_marks_the_best_but_never_the_reference() -> None:
    def system(value: float) -> list[ClipScores]:
        return [clip(str(i), {"dnsmos_ovrl": (value + i / 100, 1.0), "wer": (i % 2, 4.0)}) for i in range(20)]

    lines = comparison({"gt": system(4), "a|b": system(3), "ours": system(2)}).table().splitlines()
    cells = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("|")}
    assert "**3.095 [" in cells["a\\|b"]
    assert "**" not in cells["gt"] + cells["ours"]
    assert cells["ours"].count("12.50 [") == 1  # ten edits of eighty words, in percent
    assert not any("UTMOS" in line or "clips)" in line for line in lines)  # nobody has it; all clips have the others


def test_chosen_clips_are_the_worst_the_best_and_others() -> None:
    order = np.random.default_rng(1).permutation(30)
    found = comparison(
        {"gt": [], "ours": [clip(f"c{i:02d}", {"cer": (float(rank), 100.0)}) for i, rank in enumerate(order)]}
    )
    chosen, how = choose(found, 9)
    rank = {f"c{i:02d}": int(value) for i, value in enumerate(order)}
    groups = {why: [rank[key] for key in chosen if chosen[key] == why] for why in ("worst", "best", "random")}
    assert groups["worst"] == [29, 28, 27]
    assert groups["best"] == [0, 1, 2]
    assert len(groups["random"]) == 3
    assert "3 worst, 3 best, 3 drawn at random (seed 0); worst and best of ours by CER" in how
    assert choose(found, 9) == (chosen, how)
    assert choose(found, 9, seed=1)[0] != chosen
    assert set(choose(found, 30)[0].values()) == {"all"}
    assert len(choose(found, 1)[0]) == 1


# Words.


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
def test_alignment_keeps_both_texts_at_the_least_cost(said: list[str], heard: list[str]) -> None:
    def distance(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b[1:]) + (a[0] != b[0]), distance(a[1:], b) + 1, distance(a, b[1:]) + 1)

    steps = align(said, heard)
    assert [one for one, _ in steps if one is not None] == said
    assert [other for _, other in steps if other is not None] == heard
    assert sum(one != other for one, other in steps) == distance(said, heard)


# Pictures.


@pytest.mark.parametrize("hertz", [200, 500, 1000, 4000, 7500])
def test_frequencies_stand_at_their_bins(hertz: float) -> None:
    # HTK: 82 corners over 0-8000 Hz, equal steps in 2595 log10(1 + f / 700); bin k is centred on corner k + 1.
    top = 2595 * np.log10(1 + 8000 / 700)
    expected = 2595 * np.log10(1 + hertz / 700) / top * 81 - 1
    assert bin_of(hertz, "htk") == pytest.approx(expected, abs=0.4)


def test_mel_picture_has_low_frequencies_below_and_one_scale() -> None:
    mel = np.full((50, 80), -11.5, np.float32)
    mel[10:20, 5] = 0
    picture = Image.open(BytesIO(mel_png(mel, (-10, 2)))).convert("L")
    grey = np.asarray(picture)
    assert grey.shape == (80, 50)
    assert set(zip(*np.nonzero(grey > grey.min()), strict=True)) == {(79 - 5, frame) for frame in range(10, 20)}
    louder = np.asarray(Image.open(BytesIO(mel_png(mel + 2, (-10, 2)))).convert("L"))
    assert louder[79 - 5, 10] > grey[79 - 5, 10]


def test_silence_and_a_lone_voiced_frame_can_be_drawn() -> None:
    silent = Track(np.full((15, 80), -11.5, np.float32), np.full(15, np.nan, np.float32), 0.3)
    pitch = np.full(15, np.nan, np.float32)
    pitch[4] = 100
    for tracks in ([silent], [silent, Track(silent.mel, pitch, 0.3)]):
        axes = scales(tracks, "htk")
        drawn = "".join(picture("x", one, tracks[-1], axes) for one in tracks)
        assert "nan" not in drawn
        assert ('class="theirs"' in drawn) == (len(tracks) == 2)


# The page.


class Page(HTMLParser):
    """Tags and attributes of a page; complains where tags are not closed in order."""

    VOID = {"meta", "link", "input", "br", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["script"]:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_plays_what_lies_beside_it_and_runs_no_name(tmp_path: Path) -> None:
    reference = wav(tmp_path / "gt/x.wav")
    text = "</script><script>alert(2)</script> & so on"
    notes = {"generated": str(wav(tmp_path / "ours/x.wav", 0.5)), "reference": str(reference)}
    found = comparison(
        {
            "gt": [
                clip(NASTY, {"dnsmos_ovrl": (3, 1)}, text, NASTY, generated=str(reference), reference=str(reference))
            ],
            f"{NASTY}/../..": [clip(NASTY, {"wer": (1, 3)}, text, "so & <b>on", **notes)],
            "ours": [clip(NASTY, {"wer": (1, 3), "secs": (0.5, 1)}, text, None, **notes)],
        }
    )
    out = tmp_path / "out"
    out.mkdir()
    write_page(found, out, EvaluationConfig(metrics=("words",)), 4)
    html = (out / "index.html").read_text()
    assert "0.500 to 0.500</span>" in html  # the only clip has it
    page = Page(html)
    assert not page.all("img")
    assert not page.all("b")
    assert len(page.all("script")) == 2
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert NASTY in "".join(page.text)
    sources = [str(attributes["src"]) for attributes in page.all("audio")]
    assert len(sources) == len(set(sources)) == 3
    for source in sources:
        assert re.fullmatch(r"audio/[A-Za-z0-9-]+\.wav", source)
        assert (out / source).is_file()
    assert [attributes["href"][:15] for attributes in page.all("image") if attributes["href"]] == [
        "data:image/png;"
    ] * 3
    assert not re.search(r"https?:", html)
    assert len(page.all("svg")) == 3


def test_page_says_on_how_many_clips_a_figure_stands(tmp_path: Path) -> None:
    files = {"generated": str(wav(tmp_path / "ours.wav")), "reference": str(wav(tmp_path / "gt.wav"))}
    sums: list[Sums] = [{"wer": (1, 3), "secs": (0.5, 1)}, {"wer": (1, 3)}]
    clips = [clip(f"c{number}", one, **files) for number, one in enumerate(sums)]
    write_page(comparison({"ours": clips}), tmp_path, EvaluationConfig(metrics=("words",)), 1)
    html = (tmp_path / "index.html").read_text()
    assert "0.500 to 0.500 (1 clips)</span>" in html
    assert "33.33 to 33.33</span>" in html


def test_policy_lets_only_the_page_s_own_script_run() -> None:
    script = "let a = 1 < 2;"
    text = document("a & b", "<p></p>", "", script, "data:", {"text": "</script><!--"})
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (one["content"] for one in Page(text).all("meta") if "http-equiv" in one)
    assert policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    block = re.search(r'id="data">(.*?)</script>', text)
    assert block
    assert json.loads(block[1]) == {"text": "</script><!--"}


# Folders and the command.


def test_systems_are_named_folders(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    (tmp_path / "c").mkdir()
    assert list(parse_systems([f"gt={tmp_path}/a=b", f"ours={tmp_path}/c"])) == ["gt", "ours"]
    for words, message in (
        ([f"{tmp_path}/c"], "NAME=DIR"),
        ([f"a: b={tmp_path}/c"], "colon"),
        ([f"x={tmp_path}/c", f"x={tmp_path}/c"], "called 'x'"),
        ([f"x={tmp_path}/none", f"y={tmp_path}/c"], "no such folder"),
        ([f"x={tmp_path}/c"], "at least 2"),
    ):
        with pytest.raises(UserError, match=message):
            parse_systems(words)
    with pytest.raises(UserError, match="no clip that all"):
        common_clips({"x": tmp_path / "c", "y": tmp_path / "a=b"})


def test_command_compares_what_all_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(21):
        wav(tmp_path / f"gt/a/{number}.wav")
        wav(tmp_path / f"half/a/{number}.wav", 0.5)
        wav(tmp_path / f"quarter/a/{number}.wav", 0.25)
    (tmp_path / "half/a/20.wav").unlink()
    words = [f"{name}={tmp_path / name}" for name in ("half", "gt", "quarter")]
    out = tmp_path / "out"
    options = ["--metrics", "energy,length", "--workers", "1", "--cache", str(tmp_path / "cache")]
    assert main(["evaluate", "compare", *words, "-o", str(out), *options]) == 1
    shown = capsys.readouterr()
    assert "a/20: not in half" in shown.err
    assert "**0.69" in shown.out
    record = json.loads((out / "comparison.json").read_text())
    assert record["clips"] == sorted(f"a/{number}" for number in range(20))
    assert record["lacking"] == {"a/20": ["half"]}
    assert list(record["figures"]) == ["half", "quarter"]  # nothing to say of the reference alone
    # Half as loud is ln 2 away, a quarter ln 4.
    assert record["figures"]["quarter"]["mae_energy"]["value"] == pytest.approx(np.log(4), rel=1e-2)
    assert record["differences_to_last"]["half"]["mae_energy"]["value"] == pytest.approx(-np.log(2), rel=1e-2)
    assert record["surely_best"]["mae_energy"] == "half"
    with (out / "clips.csv").open() as file:
        table = list(csv.DictReader(file))
    keys = [(row["key"], row["system"]) for row in table if row["figure"] == "mae_energy"]
    assert keys == [(key, system) for system in ("half", "quarter") for key in record["clips"]]
    assert all(float(row["value"]) == pytest.approx(float(row["sum"]) / float(row["count"]), rel=1e-4) for row in table)
    Page((out / "index.html").read_text())
    assert main(["evaluate", "compare", *words, "-o", str(out), *options, "--reference", "original"]) == 2
    assert main(["evaluate", "compare", words[0], "-o", str(out), *options]) == 2
    assert "original=DIR" in capsys.readouterr().err


def test_one_system_has_no_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{name}={wav(tmp_path / f'{name}/a.wav', gain).parent}" for name, gain in (("gt", 1), ("ours", 0.5))]
    out = tmp_path / "out"
    options = ["--metrics", "energy", "--workers", "1", "--cache", str(tmp_path / "cache")]
    assert main(["evaluate", "compare", *words, "-o", str(out), *options]) == 0
    shown = capsys.readouterr().out
    assert "| ours |" in shown
    assert "less ours" not in shown
    assert "Difference" not in (out / "table.md").read_text() + (out / "index.html").read_text()
    Page((out / "index.html").read_text())


def test_reference_is_judged_alone_and_never_by_its_own_words(tmp_path: Path) -> None:
    for name in ("said", "unknown", "broken"):
        wav(tmp_path / f"gt/{name}.wav")
        wav(tmp_path / f"ours/{name}.wav", 2.8 if name == "broken" else 0.5)
    (tmp_path / "gt/said.txt").write_text("four words are here")
    systems = {"gt": tmp_path / "gt", "ours": tmp_path / "ours"}
    config = EvaluationConfig(metrics=("dnsmos", "words", "speaker"))
    found = compare(systems, "gt", config, 1, tmp_path / "cache", make=FakeMetrics)
    assert found.keys == ["said", "unknown"]
    assert [line.split(": ")[:2] for line in found.unreadable] == [["ours", "broken"]]
    assert set(found.clip("gt", "said").sums) == {"dnsmos_ovrl", "wer"}
    assert set(found.clip("gt", "unknown").sums) == {"dnsmos_ovrl"}
    assert set(found.clip("ours", "unknown").sums) == {"dnsmos_ovrl", "wer"}
