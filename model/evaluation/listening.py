"""A blind listening test: one page that needs neither server nor network, and the opinion scores of its ratings."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.evaluation.bootstrap import DRAWS, QUANTILES, SEED
from model.evaluation.contestants import common_clips
from model.evaluation.sound import load_sound
from pipeline.pages.html import asset, document, escape
from shards.codec import encode_sound
from shards.errors import UserError
from shards.storage import open_store

ASSETS = Path(__file__).parent / "assets"
QUESTIONS = {
    "naturalness": ("How natural does it sound?", ("Bad", "Poor", "Fair", "Good", "Excellent")),
    "intelligibility": (
        "How well can you understand the words?",
        ("Not a word", "Few words", "About half", "Most words", "Every word"),
    ),
}
"""What is asked of every item, with the names of the grades 1 to 5 (naturalness: those of ITU-T P.800)."""
COLUMNS = ("page", "listener", "clip", "item", "question", "rating", "seconds")
KIND = "faces2voices listening test"


@dataclass(frozen=True)
class Written:
    """What `write_test` made: the page, its key, how many clips and items it has, clips that some system lacks, and
    why others were left out."""

    page: Path
    key: Path
    clips: int
    items: int
    lacking: dict[str, list[str]]
    unreadable: dict[str, str]


@dataclass(frozen=True)
class Key:
    """What the page does not tell: item -> (system, clip). `systems` are in the order in which they were named."""

    page: str
    systems: tuple[str, ...]
    items: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Rating:
    """One answer of a listener, 1 to 5."""

    listener: str
    item: str
    question: str
    rating: int


@dataclass(frozen=True)
class Opinion:
    """Mean opinion score of a system for one question, its 95 % interval (None: one listener and one clip have no
    spread), and what it stands on."""

    system: str
    question: str
    value: float
    low: float | None
    high: float | None
    ratings: int
    listeners: int
    clips: int


def write_test(systems: dict[str, Path], output: Path, clips: int = 40, seed: int = 0) -> Written:
    """Write the page, and beside it `NAME.key.json`, which says what system an item is from.

    The page holds every sound as 16-bit wav under a neutral number, and no system's or clip's name.

    Args:
        systems: name -> folder, the original among them where it shall be judged too.
        output: ends in `.html`.
        clips: so many at most, drawn by `seed`, which also numbers the items.

    Raises:
        UserError: another ending, no common clip that can be read.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{output}: the page must end in .html")
    if not output.parent.is_dir():
        raise UserError(f"{output}: folder {output.parent} is missing")
    if clips < 1:
        raise UserError(f"--clips {clips}: give a positive number")
    common, lacking = common_clips(systems)
    dice = random.Random(seed)
    keys: list[str] = []
    sounds: dict[tuple[str, str], NDArray[np.float32]] = {}
    unreadable: dict[str, str] = {}
    for key in dice.sample(list(common), len(common)):
        if len(keys) == clips:
            break
        try:
            sounds |= {(key, system): load_sound(common[key][system]).samples for system in systems}
            keys.append(key)
        except UserError as error:
            unreadable[key] = str(error)
    if not keys:
        raise UserError(f"no clip can be read; the first: {next(iter(unreadable.values()))}")
    pairs = [(key, system) for key in keys for system in systems]
    dice.shuffle(pairs)
    items: list[dict[str, Any]] = []
    owners: dict[str, dict[str, str]] = {}
    digest = hashlib.sha256()
    for number, (key, system) in enumerate(pairs, 1):
        wav = encode_sound(sounds[key, system])
        digest.update(json.dumps([key, system, hashlib.sha256(wav).hexdigest()]).encode())
        sound = "data:audio/wav;base64," + base64.b64encode(wav).decode()
        code = f"{number:0{len(str(len(pairs)))}d}"
        items.append({"item": code, "clip": keys.index(key) + 1, "sound": sound})
        owners[code] = {"system": system, "clip": key}
    page = digest.hexdigest()[:12]
    store = open_store(str(output.parent))
    key_file = output.with_suffix(".key.json")
    facts = {"kind": KIND, "page": page, "seed": seed, "systems": list(systems), "questions": list(QUESTIONS)}
    # The key first: a page without its key would collect ratings that say nothing.
    store.write(key_file.name, (json.dumps({**facts, "items": owners}, indent=1) + "\n").encode())
    store.write(output.name, _page(page, items).encode())
    return Written(output, key_file, len(keys), len(items), lacking, unreadable)


def read_key(path: Path) -> Key:
    """Raises UserError: it cannot be read, or is no key of a listening test."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["kind"] != KIND:
            raise ValueError(found["kind"])
        items = {code: (owner["system"], owner["clip"]) for code, owner in found["items"].items()}
        return Key(found["page"], tuple(found["systems"]), items)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: not the key of a listening test (`f2v evaluate listen` wrote it as *.key.json)"
        ) from None


def read_ratings(paths: Sequence[Path], key: Key) -> tuple[list[Rating], list[str]]:
    """Ratings of several files, and a line for every row that does not count.

    A row that says what an earlier one said counts once (a listener may save twice). Where two rows of one listener
    give an item different ratings, neither counts: nobody can tell which was meant.

    Raises:
        UserError: a file cannot be read or is no file of ratings.
    """
    seen: dict[tuple[str, str, str], tuple[Rating, str]] = {}
    faults: list[str] = []
    torn: set[tuple[str, str, str]] = set()
    for path in paths:
        for number, row in _rows(path):
            where = f"{path}:{number}"
            try:
                rating = _rating(row, key)
            except ValueError as error:
                faults.append(f"{where}: {error}")
                continue
            name = (rating.listener.casefold(), rating.item, rating.question)
            first, place = seen.setdefault(name, (rating, where))
            if first.rating != rating.rating:
                torn.add(name)
                faults.append(
                    f"{where}: {rating.listener} rates the {rating.question} of item {rating.item} {rating.rating} "
                    f"here and {first.rating} in {place}; neither counts, drop one of the two"
                )
    return [rating for name, (rating, _) in seen.items() if name not in torn], faults


def opinions(ratings: Sequence[Rating], key: Key) -> list[Opinion]:
    """Mean opinion score of every system and question.

    The interval is the 2.5 and 97.5 % quantiles of a bootstrap that draws listeners and clips at once (the pigeonhole
    bootstrap, Owen 2007): ratings of one listener are alike, and so are ratings of one clip, and an interval that takes
    every rating for a sample of its own would be too narrow. With one listener, only clips vary, and vice versa.

    Returns:
        By question, systems in their order; those without a rating are left out.
    """
    found = []
    generator = np.random.default_rng(SEED)
    for question in QUESTIONS:
        for system in key.systems:
            asked = [one for one in ratings if one.question == question and key.items[one.item][0] == system]
            if not asked:
                continue
            names = sorted({one.listener.casefold() for one in asked})
            clips = sorted({key.items[one.item][1] for one in asked})
            sums, counts = np.zeros((2, len(names), len(clips)))
            for one in asked:
                place = names.index(one.listener.casefold()), clips.index(key.items[one.item][1])
                sums[place] += one.rating
                counts[place] += 1
            draw_names, draw_clips = (
                generator.multinomial(size, np.full(size, 1 / size), DRAWS).astype(float)
                for size in (len(names), len(clips))
            )
            total = np.einsum("dl,lc,dc->d", draw_names, counts, draw_clips)
            drawn = np.einsum("dl,lc,dc->d", draw_names, sums, draw_clips)[total > 0] / total[total > 0]
            low, high = np.quantile(drawn, QUANTILES)
            mean = float(sums.sum() / counts.sum())
            size = (len(asked), len(names), len(clips))
            ends = (None, None) if len(names) == len(clips) == 1 else (float(low), float(high))
            found.append(Opinion(system, question, mean, ends[0], ends[1], *size))
    return found


def opinion_table(found: Sequence[Opinion]) -> str:
    """Markdown: a row per system, a column per question."""
    questions = list(dict.fromkeys(one.question for one in found))
    lines = [
        f"| System | {' | '.join(f'{name} (95 % interval)' for name in questions)} | ratings | listeners | clips |",
        "|---|" + "---:|" * (len(questions) + 3),
    ]
    for system in dict.fromkeys(one.system for one in found):
        mine = {one.question: one for one in found if one.system == system}
        cells = [_opinion(mine[name]) if name in mine else "-" for name in questions]
        some = list(mine.values())
        counts = sum(one.ratings for one in some), max(one.listeners for one in some), max(one.clips for one in some)
        name = system.replace("|", "\\|")
        lines.append(f"| {' | '.join([name, *cells, *map(str, counts)])} |")
    return "\n".join(lines) + "\n"


def _opinion(one: Opinion) -> str:
    spread = "-" if one.low is None or one.high is None else f"[{one.low:.2f}, {one.high:.2f}]"
    return f"{one.value:.2f} {spread}"


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells of every row."""
    try:
        reader = csv.DictReader(StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV table ({error})") from None
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise UserError(f"{path}: not a file of ratings; its first line must be {','.join(COLUMNS)}")
    return rows


def _rating(row: dict[str, str], key: Key) -> Rating:
    """Raises ValueError: what is wrong with the row."""
    if None in row or None in row.values():
        raise ValueError(f"expected {len(COLUMNS)} cells")
    if row["page"] != key.page:
        raise ValueError(f"is of page {row['page']!r}, the key is of page {key.page!r}")
    if not row["listener"].strip():
        raise ValueError("names no listener")
    if row["item"] not in key.items:
        raise ValueError(f"item {row['item']!r} is not in the key")
    if row["question"] not in QUESTIONS:
        raise ValueError(f"question {row['question']!r} is none of {', '.join(QUESTIONS)}")
    if row["rating"] not in ("1", "2", "3", "4", "5"):
        raise ValueError(f"rating {row['rating']!r} is not a whole number from 1 to 5")
    return Rating(row["listener"].strip(), row["item"], row["question"], int(row["rating"]))


def _page(page: str, items: list[dict[str, Any]]) -> str:
    sets = []
    for name, (question, grades) in QUESTIONS.items():
        labels = "".join(
            f'<label><input type="radio" name="{name}" value="{grade}"><b>{grade}</b>{escape(about)}</label>'
            for grade, about in enumerate(grades, 1)
        )
        sets.append(f'<fieldset><legend>{escape(question)}</legend><div class="scale">{labels}</div></fieldset>')
    body = asset("listen.html", ASSETS).replace("QUESTIONS", "".join(sets)).replace("ITEMS", str(len(items)))
    data = {"page": page, "questions": list(QUESTIONS), "items": items}
    return document("Listening test", body, asset("listen.css", ASSETS), asset("listen.js", ASSETS), "data:", data)
