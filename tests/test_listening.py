"""The blind listening page, its key, and opinion scores."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import wave
from collections import Counter
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from model.evaluation.listening import (
    ASSETS,
    COLUMNS,
    Key,
    Rating,
    opinion_table,
    opinions,
    read_key,
    read_ratings,
    write_test,
)
from pipeline.pages.html import asset
from shards.codec import encode
from shards.errors import UserError
from shards.schema import FIELDS

SYSTEMS = ("original", "griffinlim", "hifigan")
CLIPS = ("spk1/hello", "spk1/world", "spk2/again")


def tone(hertz: float, seconds: float = 0.2) -> bytes:
    pcm = 8000 * np.sin(2 * np.pi * hertz * np.arange(int(16000 * seconds)) / 16000)
    return encode(FIELDS["wav"], pcm.astype(np.int16))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("systems")
    for s, system in enumerate(SYSTEMS):
        for c, clip in enumerate(CLIPS):
            path = root / system / f"{clip}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tone(100 * (s + 1) + 10 * c))
    return {system: root / system for system in SYSTEMS}


def embedded(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found
    return json.loads(found[1])


def samples(data: bytes) -> bytes:
    with wave.open(BytesIO(data)) as reader:
        assert (reader.getframerate(), reader.getnchannels(), reader.getsampwidth()) == (16000, 1, 2)
        return reader.readframes(reader.getnframes())


def test_page_is_blind_and_offline(folders: dict[str, Path], tmp_path: Path) -> None:
    written = write_test(folders, tmp_path / "listen.html")
    text = written.page.read_text()
    without_sounds = re.sub(r"data:audio/wav;base64,[^\"]*", "", text)
    for name in (*SYSTEMS, *CLIPS, "hello", "spk1", str(folders["original"].parent)):
        assert name not in without_sounds
    assert not re.search(r"https?:|//[a-z]|src=[\"']?[^\"' ]|@import|url\(", without_sounds.replace("//<", ""))
    assert "default-src 'none'" in text
    assert (written.clips, written.items) == (3, 9)


def test_clips_that_cannot_be_read_are_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    for system in ("a", "b"):
        (tmp_path / system).mkdir()
        (tmp_path / system / "one.wav").write_bytes(tone(200))
        (tmp_path / system / "two.wav").write_bytes(tone(300) if system == "a" else b"no sound")
    written = write_test({"a": tmp_path / "a", "b": tmp_path / "b"}, tmp_path / "listen.html")
    assert (written.clips, written.items, [*written.unreadable]) == (1, 2, ["two"])
    assert "two.wav" in written.unreadable["two"]
    (tmp_path / "b" / "one.wav").write_bytes(b"neither")
    with pytest.raises(UserError, match="no clip can be read"):
        write_test({"a": tmp_path / "a", "b": tmp_path / "b"}, tmp_path / "listen.html")


def test_key_says_what_every_item_is(folders: dict[str, Path], tmp_path: Path) -> None:
    written = write_test(folders, tmp_path / "listen.html", seed=3)
    key, data = read_key(written.key), embedded(written.page)
    assert data["page"] == key.page
    assert key.systems == SYSTEMS
    assert sorted(key.items.values()) == sorted((system, clip) for system in SYSTEMS for clip in CLIPS)
    for item in data["items"]:
        system, clip = key.items[item["item"]]
        sound = base64.b64decode(item["sound"].removeprefix("data:audio/wav;base64,"))
        heard, true = (
            np.frombuffer(samples(one), np.int16).astype(int)
            for one in (sound, (folders[system] / f"{clip}.wav").read_bytes())
        )
        assert np.abs(heard - true).max() <= 1
    numbers = {clip: {item["clip"] for item in data["items"] if key.items[item["item"]][1] == clip} for clip in CLIPS}
    assert all(len(found) == 1 for found in numbers.values())
    assert len(set.union(*numbers.values())) == len(CLIPS)


def test_seed_decides_numbers_and_clips(folders: dict[str, Path], tmp_path: Path) -> None:
    made = [write_test(folders, tmp_path / f"{name}.html", 2, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, same, other = (read_key(one.key).items for one in made)
    assert first == same != other
    assert made[0].page.read_bytes() == made[1].page.read_bytes()
    assert len({clip for _, clip in first.values()}) == 2


def node(script: str) -> Any:
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not installed: the page's script cannot be run")
    code = asset("listen.js", ASSETS) + f"\nconsole.log(JSON.stringify({script}));"
    return json.loads(subprocess.run([program, "-e", code], check=True, capture_output=True, text=True).stdout)


def test_every_listener_has_an_order_of_their_own() -> None:
    items = [{"item": f"{clip}-{system}", "clip": clip} for clip in range(40) for system in range(4)]
    names = [f"listener {number}" for number in range(25)]
    orders = node(f"{json.dumps(names)}.map(name => orderFor('page', name, {json.dumps(items)}))")
    assert all(sorted(order) == list(range(len(items))) for order in orders)
    assert len({tuple(order) for order in orders}) == len(names)
    assert not any(items[a]["clip"] == items[b]["clip"] for order in orders for a, b in pairwise(order))
    # Each system comes about as often in the first half as in the second: 500 of 1000, five sigma are 79.
    early = Counter(items[place]["item"][-1] for order in orders for place in order[: len(items) // 2])
    assert all(abs(count - 500) < 79 for count in early.values())
    again = node(
        f"[orderFor('page', ' Listener 0', {json.dumps(items)}), orderFor('p2', 'listener 0', {json.dumps(items)})]"
    )
    assert again[0] == orders[0] != again[1]


def test_one_clip_has_nothing_to_keep_apart() -> None:
    items = [{"item": str(number), "clip": 1} for number in range(3)]
    assert sorted(node(f"orderFor('page', 'x', {json.dumps(items)})")) == [0, 1, 2]


def test_saved_ratings_are_read_back(tmp_path: Path) -> None:
    items = [{"item": "1", "clip": 1}, {"item": "2", "clip": 1}]
    answers = {"1": {"naturalness": 4, "intelligibility": 5, "seconds": 3.25}, "2": {"naturalness": 2, "seconds": 1}}
    listener = 'Zoë, "the ear"'
    questions = ["naturalness", "intelligibility"]
    arguments = ", ".join(json.dumps(one) for one in ("p", listener, items, answers, questions))
    path = tmp_path / "ratings.csv"
    path.write_text(node(f"ratingsCsv({arguments})"), encoding="utf-8")
    ratings, faults = read_ratings([path], Key("p", ("a", "b"), {"1": ("a", "c"), "2": ("b", "c")}))
    assert not faults
    expected = [("1", "naturalness", 4), ("1", "intelligibility", 5), ("2", "naturalness", 2)]
    assert ratings == [Rating(listener, *one) for one in expected]


KEY = Key("p", ("a", "b"), {"1": ("a", "x"), "2": ("a", "y"), "3": ("b", "x"), "4": ("b", "y")})


def saved(path: Path, *rows: str) -> Path:
    path.write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")
    return path


def test_bad_rows_are_named_and_left_out(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "one.csv",
        "p,ann,1,1,naturalness,4,2.0",
        "p,ann,1,1,naturalness,4,2.0",  # saved twice
        "q,ann,1,2,naturalness,4,2.0",
        "p,ann,1,9,naturalness,4,2.0",
        "p,ann,1,2,charm,4,2.0",
        "p,ann,1,2,naturalness,6,2.0",
        "p,ann,1,2,naturalness,4.5,2.0",
        "p, ,1,2,naturalness,4,2.0",
        "p,ann,1,2",
        "p,ann,1,3,naturalness,1,2.0",
        "p,Ann,1,3,naturalness,2,2.0",  # the same listener says something else
    )
    ratings, faults = read_ratings([path], KEY)
    assert ratings == [Rating("ann", "1", "naturalness", 4)]
    places = [re.search(r":(\d+): ", fault) for fault in faults]
    assert [int(found[1]) for found in places if found] == [4, 5, 6, 7, 8, 9, 10, 12]
    for fault, word in zip(
        faults, ("page 'q'", "'9'", "'charm'", "'6'", "'4.5'", "no listener", "cells", "2 here"), strict=True
    ):
        assert word in fault
    with pytest.raises(UserError, match="first line"):
        read_ratings([tmp_path / "one.csv", _other(tmp_path)], KEY)


def _other(folder: Path) -> Path:
    path = folder / "other.csv"
    path.write_text("a,b\n1,2\n")
    return path


def test_opinion_scores_by_hand() -> None:
    # a: (5 + 4 + 3 + 4) / 4 = 4; b: (1 + 2 + 2) / 3 = 5/3.
    given = [
        ("ann", "1", 5),
        ("ann", "2", 4),
        ("bob", "1", 3),
        ("bob", "2", 4),
        ("ann", "3", 1),
        ("bob", "3", 2),
        ("bob", "4", 2),
    ]
    ratings = [Rating(listener, item, "naturalness", rating) for listener, item, rating in given]
    first, second = opinions(ratings, KEY)
    assert (first.system, first.value, first.ratings, first.listeners, first.clips) == ("a", 4.0, 4, 2, 2)
    assert (second.system, second.ratings) == ("b", 3)
    assert second.value == pytest.approx(5 / 3)
    # Draws of a: listeners and clips each twice one or one and one. The extremes are single ratings, 3 and 5, of
    # probability 1/16 each, beyond the 2.5 % quantiles.
    assert (first.low, first.high) == (3.0, 5.0)
    table = opinion_table([first, second])
    assert "| a | 4.00 [3.00, 5.00] | 4 | 2 | 2 |" in table


def test_one_listener_and_one_clip_have_no_interval() -> None:
    found = opinions([Rating("l", "1", "naturalness", 4)], Key("p", ("a",), {"1": ("a", "c")}))
    assert "| a | 4.00 - | 1 | 1 | 1 |" in opinion_table(found)
    assert (found[0].low, found[0].high) == (None, None)


def test_interval_is_not_that_of_independent_ratings() -> None:
    generator = np.random.default_rng(0)
    moods = generator.choice([2, 4], size=10)
    key = Key("p", ("a",), {str(number): ("a", str(number)) for number in range(50)})
    ratings = [Rating(f"l{i}", str(j), "naturalness", int(mood)) for i, mood in enumerate(moods) for j in range(50)]
    (found,) = opinions(ratings, key)
    # Ten listeners who always answer the same: 500 ratings, but the spread is that of ten.
    half = (found.high - found.low) / 2
    assert half == pytest.approx(1.96 * moods.std() / np.sqrt(10), rel=0.15)


def test_commands(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "listen.html"
    words = [f"{name}={folder}" for name, folder in folders.items()]
    assert main(["evaluate", "listen", *words, "-o", str(page)]) == 0
    key = read_key(page.with_suffix(".key.json"))
    rows = [
        f"{key.page},ann,1,{item},naturalness,{3 + (system == 'original')},1" for item, (system, _) in key.items.items()
    ]
    path = saved(tmp_path / "ratings.csv", *rows)
    capsys.readouterr()
    command = ["evaluate", "listen", "--key", str(page.with_suffix(".key.json")), "--json", "--ratings"]
    assert main([*command, str(path)]) == 0
    found = json.loads(capsys.readouterr().out)["opinions"]
    assert [(one["system"], one["value"]) for one in found] == [("original", 4), ("griffinlim", 3), ("hifigan", 3)]
    assert main([*command, str(saved(path, *rows, "p,ann,1,1,naturalness,4,1"))]) == 1
    assert main(["evaluate", "listen", *words]) == 2
    assert main(["evaluate", "listen", *words, "-o", str(tmp_path / "listen.txt")]) == 2
    assert main([*command, str(path), "-o", str(page)]) == 2


def test_clip_that_a_system_lacks(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = tmp_path / "fewer"
    shutil.copytree(folders["hifigan"], fewer)
    (fewer / "spk2/again.wav").unlink()
    page = tmp_path / "listen.html"
    assert main(["evaluate", "listen", f"x={fewer}", f"gt={folders['original']}", "-o", str(page)]) == 1
    assert "spk2/again: not in x" in capsys.readouterr().err
    assert {clip for _, clip in read_key(page.with_suffix(".key.json")).items.values()} == set(CLIPS[:2])
