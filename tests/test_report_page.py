"""The report's page: what it shows of a clip, that it needs nothing from outside, and that a browser takes it."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli.main import main
from pipeline.align import ARCFACE
from pipeline.report.clip_view import View, clip_section, face_landmarks
from shards.dataset import ClipRow, Dataset
from tests.browser import visit
from tests.conftest import Summary
from tests.toy import everything, toy_dataset, toy_values

NASTY = '"><script>alert(1)</script>'
PLAYED = """(async () => {
  const audio = document.querySelector("audio");
  if (audio.readyState < 1) await new Promise((done, lost) => { audio.onloadedmetadata = done; audio.onerror = lost; });
  await audio.play();
  await new Promise((done) => setTimeout(done, 300));
  const now = document.querySelector(".now");
  return [audio.readyState >= 2, audio.duration, audio.currentTime > 0, now.classList.contains("on")];
})()"""


def row(key: str, frames: int, **more: Any) -> ClipRow:
    base = {
        "uri": f"videos/{key}.mp4",
        "bytes": 5,
        "stamp": "",
        "digest": "",
        "split": "train",
        "speaker": "",
        "text": "",
    }
    rest = {"start": None, "end": None, "shard": "train-000000", "state": "packed"}
    return ClipRow(**{**base, **rest, "key": key, "frames": frames, **more})


def data_of(html: str, kind: str) -> list[bytes]:
    return [base64.b64decode(found) for found in re.findall(rf"data:{kind};base64,([A-Za-z0-9+/=]+)", html)]


def test_landmarks_lie_on_the_face_as_the_crop_does() -> None:
    """The crop takes the detector's points to the template, so a landmark on one of them must land there too."""
    angle = np.deg2rad(20)
    turn = 2.5 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points5 = np.stack([ARCFACE @ turn.T + (300 + 4 * frame, 100) for frame in range(20)]).astype(np.float32)
    landmarks = np.zeros((20, 68, 2), np.float32)
    landmarks[:, :5] = points5
    moved = face_landmarks(landmarks, points5, np.array([0, 7, 19]))
    assert moved.shape == (3, 68, 2)
    assert np.abs(moved[:, :5] - ARCFACE).max() < 0.1


def test_a_clip_shows_and_plays_what_is_stored() -> None:
    soundfile = pytest.importorskip("soundfile", reason="no reader for FLAC: pip install soundfile")
    values = toy_values("k", 50)
    values["face"] = np.broadcast_to(np.arange(50, dtype=np.uint8)[:, None, None, None] * 5, (50, 112, 112, 3)).copy()
    html = clip_section(View(row("k", 50, text="bin <blue>"), values, ["smallest face: 3 px"]), 20, "htk")
    (sound,) = data_of(html, "audio/flac")
    samples, rate = soundfile.read(io.BytesIO(sound), dtype="int16")
    assert rate == 16000
    assert np.array_equal(samples, values["wav"])
    # Ten frames in two rows, each of face and lips: grey levels say which frames they are.
    strips = [np.asarray(Image.open(io.BytesIO(one)).convert("L")).astype(int) for one in data_of(html, "image/jpeg")]
    assert [strip.shape for strip in strips] == [(112, 560), (96, 480)] * 2
    frames = np.linspace(0, 49, 10).round()
    faces = np.concatenate([strip[56, 56::112] for strip in strips[::2]])
    assert np.abs(faces - 5 * frames).max() <= 2
    lips = np.concatenate([strip[48, 48::96] for strip in strips[1::2]])
    assert np.abs(lips - 2 * frames).max() <= 2
    mel, units = (Image.open(io.BytesIO(one)) for one in data_of(html, "image/png"))
    assert mel.size == (100, 80)
    colours = np.asarray(units)[0]
    assert len(colours) == 100
    # One colour a unit, and no other unit has it.
    pairs = {(int(unit), tuple(colour)) for unit, colour in zip(values["units"], colours.tolist(), strict=True)}
    assert len(pairs) == len({unit for unit, _ in pairs}) == len({colour for _, colour in pairs})
    assert "bin &lt;blue&gt;" in html
    assert "smallest face: 3 px" in html
    assert 'class="points"' in html


def test_long_clips_are_shown_in_part() -> None:
    soundfile = pytest.importorskip("soundfile", reason="no reader for FLAC: pip install soundfile")
    random = np.random.default_rng(0)
    values = {
        "wav": random.integers(-999, 999, 960_000).astype(np.int16),
        "mel": random.normal(size=(3000, 80)).astype(np.float32),
        "units": random.integers(0, 1000, 3000).astype(np.int16),
    }
    html = clip_section(View(row("k", 1500), values), 20, "htk")
    assert "The first 20 of 60 s." in html
    assert soundfile.info(io.BytesIO(data_of(html, "audio/flac")[0])).frames == 320_000
    assert len(html) < 1_500_000


def test_every_field_alone_and_none_at_all_can_be_shown() -> None:
    values = toy_values("k", 13)
    for name in values:
        assert "<article" in clip_section(View(row("k", 13), {name: values[name]}), 20, "htk")
    assert "<article" in clip_section(View(row("k", 0), {}), 20, "htk")
    silent = {"wav": np.zeros(640, np.int16), "pitch": np.full(2, np.nan, np.float32), "energy": np.ones(2, np.float32)}
    assert "NaN" not in clip_section(View(row("k", 1), silent), 20, "htk").replace("nan", "NaN")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    dataset = toy_dataset(folder / "ds", [[25, 30], [40]], speakers=[NASTY, "bob"])
    assert main(["report", dataset.uri, "-o", str(folder / "r.html")]) == 0
    return folder / "r.html"


def test_page_holds_all_it_shows_and_runs_no_name(page: Path) -> None:
    text = page.read_text()
    bare = re.sub(r"data:[a-z]+/[a-z]+;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"<title>.*?</title>|<h1>.*?</h1>", "", bare))
    assert not re.findall(r"""(?:src|href)=["'][^"'#d]""", bare)
    assert NASTY not in text
    assert bare.count("<script") == 2  # the empty data and the players
    assert "default-src 'none'" in text


def test_page_is_the_same_for_the_same_dataset(page: Path, tmp_path: Path) -> None:
    again = tmp_path / "r.html"
    assert main(["report", str(page.parent / "ds"), "-o", str(again)]) == 0
    assert again.read_bytes() == page.read_bytes()


def test_a_browser_shows_it_plays_it_and_asks_for_nothing(page: Path) -> None:
    sizes = "[...document.querySelectorAll('svg.picture')].every((one) => one.getBoundingClientRect().height > 50)"
    switch = "document.querySelector('#points').click(), getComputedStyle(document.querySelector('.points')).visibility"
    wide = "document.documentElement.scrollWidth <= innerWidth"
    found = visit(page, "document.querySelectorAll('article').length", sizes, wide, PLAYED, switch)
    assert found.complaints == []
    assert found.requests == []
    articles, drawn, fits, played, points = found.values
    assert (articles, drawn, fits, points) == (3, True, True, "hidden")
    ready, seconds, moved, line = played
    assert (ready, moved, line) == (True, True, True)
    assert min(abs(seconds - length) for length in (1.0, 1.2, 1.6)) < 0.02


def test_a_page_of_a_real_build(
    built: tuple[Dataset, Summary], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = built[0]
    page = tmp_path / "r.html"
    assert main(["report", dataset.uri, "-o", str(page), "--clips", "4"]) == 0
    text = page.read_text()
    assert text.count("<article") == 4
    assert len(text) < 2_000_000
    assert "6 clips in quarantine" in text
    for label in ("Face size", "Sound behind the picture", "Landmarks against detector", "Units by rank"):
        assert f"<h3>{label}</h3>" in text
    # Of two networks on clean synthetic faces, landmarks lie within a tenth of the eyes' distance.
    key, values = next(iter(everything(dataset).items()))
    capsys.readouterr()
    assert main(["inspect", dataset.uri, key]) == 0
    shown = capsys.readouterr().out
    assert f"lips       uint8    {len(values['lips'])}x96x96" in shown
    found = re.search(r"landmarks against detector\s+([\d.]+) %", shown)
    assert found
    assert float(found[1]) < 10
