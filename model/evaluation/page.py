"""The comparison as an HTML page: summary, differences, and clips with players, mel pictures, pitch and words."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from model.evaluation.alignment import align
from model.evaluation.bootstrap import Interval
from model.evaluation.compare import Comparison, left_out
from model.evaluation.config import EvaluationConfig
from model.evaluation.evaluate import ClipScores
from model.evaluation.figures import FIGURES
from model.evaluation.pictures import Scales, Track, picture, scales, track
from model.evaluation.quoted import TABLE_2
from model.evaluation.sound import load_sound
from model.evaluation.tables import (
    BEST,
    NONE,
    SOURCE,
    SURE,
    clip_value,
    columns,
    fewer,
    heading,
    json_text,
    number,
    quoted_rows,
)
from pipeline.pages.html import asset, document, escape
from shards.codec import encode_sound
from shards.storage import open_store

ASSETS = Path(__file__).parent / "assets"
AUDIO = "audio"
"""Folder beside the page that holds the sounds it plays."""
RANKED_BY = ("cer", "wer", "utmos", "distillmos", "dnsmos_ovrl", "rmse_f0_clip", "mae_energy", "secs")
"""Figures to rank clips by: the first that the last system has. Characters tell more clips apart than words do."""
BADGES = {"worst": "one of the worst", "best": "one of the best", "random": "drawn at random", "all": ""}


def write_page(comparison: Comparison, folder: Path, config: EvaluationConfig, show: int, seed: int = 0) -> None:
    """Write `index.html` and the sounds of its clips, 16-bit wav, to `folder`; the page comes last.

    Args:
        config: range of pitch and filterbank of the pictures.
        show: clips on the page, chosen as `choose` says.
        seed: of those drawn at random.
    """
    store = open_store(str(folder))
    chosen, how = choose(comparison, show, seed)
    parts = []
    for place, (key, why) in enumerate(chosen.items(), 1):
        files = _files(comparison, key)
        tracks: dict[str, Track] = {}
        players: dict[str, str] = {}
        for rank, (name, path) in enumerate(files.items()):
            samples = load_sound(path).samples
            tracks[name] = track(samples, config.filterbank, config.fmin, config.fmax)
            # A number makes the name unique and safe, whatever the system is called.
            players[name] = f"{AUDIO}/{place:03d}-{rank}-{_slug(name)}.wav"
            store.write(players[name], encode_sound(samples))
        parts.append(_clip(comparison, key, why, tracks, players, scales(tracks.values(), config.filterbank)))
    body = "\n".join(
        [_header(comparison), "<main>", _summary(comparison), _clips(how, parts), _record(comparison), "</main>"]
    )
    title = f"{len(comparison.evaluations)} systems on {len(comparison.keys)} clips"
    style = asset("page.css") + asset("compare.css", ASSETS)
    page = document(title, body, style, asset("compare.js", ASSETS) + asset("players.js"), "'self' file:")
    store.write("index.html", page.encode(errors="backslashreplace"))


def choose(comparison: Comparison, count: int, seed: int = 0) -> tuple[dict[str, str], str]:
    """Clips for a page: a third the worst of the last system, a third its best, the rest drawn at random.

    Returns:
        Clip -> `worst`, `best`, `random` or `all`, in that order; and a sentence that says how they were chosen.
    """
    keys = comparison.keys
    if count >= len(keys):
        return dict.fromkeys(keys, "all"), f"All {len(keys)} clips."
    sums = comparison.evaluations[comparison.last].sums()
    figure = next((key for key in RANKED_BY if any(key in one for one in sums.values())), None)
    some, ranked = count // 3, []
    if figure is not None:
        values = {key: clip_value(figure, sums[key].get(figure)) for key in keys}
        sign = -1 if FIGURES[figure].better == "higher" else 1
        ranked = sorted(
            (key for key in keys if values[key] is not None), key=lambda key: (sign * (values[key] or 0), key)
        )
    chosen = dict.fromkeys(ranked[len(ranked) - some :][::-1] if some else [], "worst")
    chosen |= dict.fromkeys([key for key in ranked[:some] if key not in chosen], "best")
    rest = [key for key in keys if key not in chosen]
    drawn = sorted(random.Random(seed).sample(rest, count - len(chosen)))
    label = f" of {comparison.last} by {FIGURES[figure].label}" if figure else ""
    parts = {name: sum(why == name for why in chosen.values()) for name in ("worst", "best")}
    said = "".join(f"{number} {name}, " for name, number in parts.items() if number)
    words = f"{count} of {len(keys)} clips: {said}{len(drawn)} drawn at random (seed {seed}); worst and best{label}."
    return {**chosen, **dict.fromkeys(drawn, "random")}, words if said else f"{count} of {len(keys)} clips, at random."


def _files(comparison: Comparison, key: str) -> dict[str, str]:
    """System -> sound of a clip, the reference first."""
    found = {comparison.reference: comparison.clip(comparison.last, key).reference}
    for name in comparison.evaluations:
        if name != comparison.reference:
            found[name] = comparison.clip(name, key).generated
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "system"


def _header(comparison: Comparison) -> str:
    others = [name for name in comparison.evaluations if name != comparison.reference]
    apart = '<a href="#differences">Differences</a> ' if comparison.differences else ""
    return (
        f'<header><h1>{" · ".join(map(escape, others))}</h1><nav><a href="#summary">Summary</a> {apart}'
        '<a href="#clips">Clips</a> <a href="#record">Record</a></nav></header>'
    )


def _summary(comparison: Comparison) -> str:
    keys, best = columns(comparison.summaries), comparison.best
    rows = []
    for name, found in comparison.summaries.items():
        marked = {key for key in keys if best.get(key) == name}
        note = "reference" if name == comparison.reference else ""
        rows.append(_row(name, keys, found, marked, len(comparison.keys), note))
    quoted = quoted_rows(keys)
    foot = [
        f'<tr class="quoted"><th scope="row">{escape(name)} <span class="tag">quoted</span></th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in quoted.items()
    ]
    apart = [
        _row(name, keys, found, {key for key, one in found.items() if one.sure()}, len(comparison.keys), sign=True)
        for name, found in comparison.differences.items()
    ]
    lost = left_out(comparison)
    about = "".join(f"<li>{escape(heading(key))}: {escape(FIGURES[key].about)}</li>" for key in keys if key in FIGURES)
    some = f"<p class='soft'>Rows marked as quoted: {escape(SOURCE.format(TABLE_2.name))}</p>" if quoted else ""
    missing = (
        f"<details class='lost'><summary>{len(lost)} clips are left out</summary><ul>"
        + "".join(f"<li>{escape(line)}</li>" for line in lost)
        + "</ul></details>"
        if lost
        else ""
    )
    counted = "number of clips that have the figure, where not all do"
    marks = f"Below each value: 95 % interval, bootstrap over clips; {counted}. Bold: {BEST} Press a heading to sort."
    meaning = f"Value of the row less that of {comparison.last}, on the same clips, drawn together."
    differences = (
        f'<section id="differences"><h2>Difference to {escape(comparison.last)}</h2>{_table(keys, apart, [])}'
        f"<p class='soft'>{escape(meaning)} Bold: {escape(SURE)}</p></section>"
    )
    return (
        f'<section id="summary"><h2>{len(comparison.keys)} clips</h2>{missing}'
        f"{_table(keys, rows, foot)}<p class='soft'>{escape(marks)}</p>{some}"
        f"<details><summary>What the figures are</summary><ul>{about}</ul></details></section>"
        f"{differences if apart else ''}"
    )


def _table(keys: list[str], rows: list[str], foot: list[str]) -> str:
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(label)}</button></th>'
        for label in ("system", *map(heading, keys))
    )
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody><tfoot>{''.join(foot)}</tfoot></table></div>"
    )


def _row(
    name: str,
    keys: list[str],
    found: dict[str, Interval],
    marked: set[str],
    clips: int,
    note: str = "",
    sign: bool = False,
) -> str:
    cells = []
    for key in keys:
        one = found.get(key)
        if one is None:
            cells.append(f"<td>{NONE}</td>")
            continue
        low, high = number(key, one.low, sign), number(key, one.high, sign)
        mark = ' class="sure"' if key in marked else ""
        cells.append(
            f'<td{mark} data-value="{one.value:.9g}"><span class="value">{number(key, one.value, sign)}</span>'
            f'<span class="interval">{low} to {high}{fewer(one, clips)}</span></td>'
        )
    tag = f' <span class="tag">{note}</span>' if note else ""
    return f'<tr><th scope="row" data-value="{escape(name)}">{escape(name)}{tag}</th>{"".join(cells)}</tr>'


def _clips(how: str, parts: list[str]) -> str:
    return (
        f'<section id="clips"><h2>Clips</h2><p class="soft">{escape(how)} The colours of a clip’s pictures are on one '
        'scale for all systems. Pitch: <span class="key own">the system</span>, '
        '<span class="key theirs">the reference</span>. Press a picture to hear it from there; keys: <kbd>j</kbd> and '
        f"<kbd>k</kbd> go to the next clip and back.</p>{''.join(parts)}</section>"
    )


def _clip(
    comparison: Comparison, key: str, why: str, tracks: dict[str, Track], players: dict[str, str], axes: Scales
) -> str:
    reference = tracks[comparison.reference]
    panels = []
    for name, own in tracks.items():
        is_reference = name == comparison.reference
        scores = comparison.clip(name, key) if name in comparison.evaluations else None
        tag = ' <span class="tag">reference</span>' if is_reference else ""
        panels.append(
            f'<div class="panel"><h4>{escape(name)}{tag}</h4>'
            f'<audio controls preload="metadata" src="{escape(players[name])}" aria-label="{escape(name)}"></audio>'
            f"{picture(name, own, None if is_reference else reference, axes)}"
            f"{_words(scores) if scores else ''}{_figures(comparison, scores) if scores else ''}</div>"
        )
    last = comparison.clip(comparison.last, key)
    badge = f' <span class="tag {why}">{BADGES[why]}</span>' if BADGES[why] else ""
    source = " (as Whisper heard the reference)" if last.text_from == "heard" else ""
    said = f'<p class="said">{escape(last.text)}<span class="soft">{source}</span></p>' if last.text is not None else ""
    head = f"<h3>{escape(key)}{badge}</h3>{said}"
    return f'<article tabindex="-1">{head}<div class="panels">{"".join(panels)}</div></article>'


def _words(scores: ClipScores) -> str:
    """What was heard, as it is compared, errors marked."""
    if scores.heard is None or scores.text is None:
        return ""
    from model.evaluation.words import normalise

    parts = []
    for said, heard in align(normalise(scores.text).split(), normalise(scores.heard).split()):
        if said == heard:
            parts.append(escape(heard))
        elif heard is None:
            parts.append(f'<del title="left out">{escape(said)}</del>')
        elif said is None:
            parts.append(f'<ins title="put in">{escape(heard)}</ins>')
        else:
            parts.append(f'<span class="wrong"><del>{escape(said)}</del> <ins>{escape(heard)}</ins></span>')
    return f'<p class="heard" title="{escape(scores.heard)}"><span class="soft">heard:</span> {" ".join(parts)}</p>'


def _figures(comparison: Comparison, scores: ClipScores) -> str:
    values = {key: clip_value(key, scores.sums.get(key)) for key in columns(comparison.summaries)}
    cells = [
        f"<div><dt>{escape(heading(key))}</dt><dd>{number(key, value)}</dd></div>"
        for key, value in values.items()
        if value is not None
    ]
    notes = f'<p class="note">{escape("; ".join(scores.notes))}</p>' if scores.notes else ""
    return f"<dl>{''.join(cells)}</dl>{notes}"


def _record(comparison: Comparison) -> str:
    facts = json.loads(json_text({name: one.facts for name, one in comparison.evaluations.items()}))
    files = "<code>table.md</code>, <code>clips.csv</code> and <code>comparison.json</code>"
    return (
        f'<section id="record"><h2>Record</h2><p>How each system was measured; {files} lie beside this page.</p>'
        "<details><summary>Settings, networks, versions</summary>"
        f"<pre>{escape(json.dumps(facts, indent=1, ensure_ascii=False))}</pre></details></section>"
    )
