"""The report as one HTML page that needs neither server nor network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from pipeline.pages.html import asset, document, escape
from pipeline.report.charts import histogram, ranks
from pipeline.report.clip_view import SHOWN, View, clip_section
from pipeline.report.figures import FIGURES, OF_FRAMES
from pipeline.report.look import Findings, Spread, Units
from pipeline.report.shelf import Shelf
from pipeline.status import SplitStatus
from pipeline.words import count, size
from shards.errors import UserError
from shards.mel import Filterbank
from shards.progress import Progress
from shards.storage import open_store

ASSETS = Path(__file__).parent / "assets"
SECONDS = 240
"""Sound and curves on a page, in seconds, shared among its clips."""
LONGEST = 20.0
"""Seconds shown of a clip at most."""
MESSAGE = 300
"""Characters shown of a message of quarantine."""
NAMED_FAULTS = 10


def write_page(path: Path, page: str) -> None:
    """Write a page; it appears whole or not at all."""
    open_store(str(path.parent)).write(path.name, page.encode(errors="backslashreplace"))


def report_page(shelf: Shelf, found: Findings) -> tuple[str, dict[str, str]]:
    """The page of what was seen, and why which clips could not be read; the chosen clips are read now."""
    seconds = min(LONGEST, SECONDS / max(1, len(found.chosen)))
    parts, faults = [], dict(found.faults)
    with Progress("clips", len(found.chosen), "clips") as progress:
        for key, why in found.chosen.items():
            try:
                values = shelf.read(key, SHOWN)
                parts.append(
                    clip_section(View(shelf.row(key), values, why, shelf.tar(key)), seconds, filterbank(shelf))
                )
            except UserError as error:
                faults[key] = str(error)
            progress.advance()
    title = f"{shelf.dataset.uri}{f', split {found.split}' if found.split else ''}"
    body = "\n".join(
        [
            _header(title, parts),
            "<main>",
            _faults(faults),
            _facts(found),
            _splits(found),
            _quarantine(found),
            _spreads(found),
            _clips(found, parts),
            "</main>",
        ]
    )
    return _document(title, body), faults


def clip_page(view: View, uri: str, bank: Filterbank) -> str:
    """The page of one clip."""
    header = f"<header><h1>{escape(view.row.key)}</h1><span class='soft'>{escape(uri)}</span></header>"
    return _document(view.row.key, f"{header}<main>{clip_section(view, SECONDS, bank)}</main>")


def filterbank(shelf: Shelf) -> Filterbank:
    """The one that the mels were made with; htk, the default, where that is not recorded."""
    names = {recipe.settings.get("filterbank") for recipe in shelf.manifest.recipes.get("mel", {}).values()}
    return "slaney" if names == {"slaney"} else "htk"


def _document(title: str, body: str) -> str:
    style = asset("page.css") + asset("report.css", ASSETS)
    return document(title, body, style, asset("players.js"), "data:")


def _header(title: str, parts: Sequence[str]) -> str:
    links = {"facts": "dataset", "quarantine": "quarantine", "numbers": "distributions", "clips": f"{len(parts)} clips"}
    nav = "".join(f'<a href="#{name}">{text}</a>' for name, text in links.items())
    return f"<header><h1>{escape(title)}</h1><nav>{nav}</nav></header>"


def _faults(faults: dict[str, str]) -> str:
    if not faults:
        return ""
    items = "".join(f"<li>{escape(why)}</li>" for why in list(dict.fromkeys(faults.values()))[:NAMED_FAULTS])
    return (
        f'<section class="warn"><h2>{count(len(faults), "clip")} could not be read</h2><ul>{items}</ul>'
        "<p><code>f2v verify</code> says what is damaged.</p></section>"
    )


def _facts(found: Findings) -> str:
    status = found.status
    packed = sum(row.bytes for row in status.splits.values())
    facts = {
        "profile": status.profile,
        "source": status.source,
        "last changed": found.modified,
        "packed shards": f"{sum(row.shards for row in status.splits.values())}, {size(packed)}",
        "columns": f"{status.columns}, {size(status.column_bytes)}",
        **{f"network of {stage}": name for stage, name in status.networks.items()},
        **{f"made in several ways: {stage}": count(ways, "recipe") for stage, ways in status.mixed.items()},
    }
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items() if value
    )
    return f'<section id="facts" class="facts"><h2>Dataset</h2><dl>{cells}</dl></section>'


def _splits(found: Findings) -> str:
    heads = ("split", "clips", "hours", "speakers", "quarantine", "pending", "shards", "bytes")
    splits = found.status.splits
    shown = list(splits.items())
    if len(splits) > 1:
        shown.append(("all", SplitStatus(*map(sum, zip(*map(astuple, splits.values()), strict=True)))))
    rows = []
    for name, row in shown:
        cells = (
            f"{row.clips:,}",
            f"{row.hours:,.3f}",
            f"{found.speakers[name]:,}" if name in found.speakers else "",
            f"{row.quarantined:,}",
            f"{row.pending:,}",
            f"{row.shards:,}",
            size(row.bytes),
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    pending = sum(row.pending for row in splits.values())
    note = f'<p class="note">{count(pending, "clip")} in shards that are not built yet.</p>' if pending else ""
    return f"<section>{_table(heads, rows)}{note}</section>"


def _quarantine(found: Findings) -> str:
    if not found.quarantine:
        return '<section id="quarantine"><h2>Quarantine</h2><p>No clip is in quarantine.</p></section>'
    total = sum(group.clips for group in found.quarantine)
    rows = []
    for group in found.quarantine:
        examples = "<br>".join(
            f"<code>{escape(key)}</code> {escape(message[:MESSAGE])}{'…' if len(message) > MESSAGE else ''}"
            for key, message in group.examples
        )
        cells = f"<td>{escape(group.stage)}</td><td>{group.clips:,}</td><td>{group.retriable or ''}</td>"
        rows.append(f'<tr><th scope="row">{escape(group.reason)}</th>{cells}<td class="words">{examples}</td></tr>')
    table = _table(("reason", "stage", "clips", "retriable", "for example"), rows)
    return f'<section id="quarantine"><h2>{count(total, "clip")} in quarantine</h2>{table}</section>'


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    columns = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _spreads(found: Findings) -> str:
    if not found.spreads:
        return '<section id="numbers"><h2>Distributions</h2><p>No clip is packed.</p></section>'
    how = (
        f"Durations are those of all {found.clips:,} packed clips, the others of {found.sampled:,} of them, drawn at "
        f"random (seed {found.seed})."
        if found.sampled < found.clips
        else f"Of all {found.clips:,} packed clips."
    )
    figures = {**FIGURES, **OF_FRAMES}
    shown = []
    for name, spread in found.spreads.items():
        unit = "frames" if name in OF_FRAMES else "clips"
        words = f"{figures[name].about} {_summary(spread, figures[name].unit, unit)}"
        shown.append(_figure(figures[name].label, histogram(figures[name], spread), words))
    if found.units:
        shown.append(_figure("Units by rank", ranks(found.units), _units(found.units)))
    return (
        f'<section id="numbers"><h2>Distributions</h2><p class="soft">{how}</p>'
        f'<div class="numbers">{"".join(shown)}</div></section>'
    )


def _figure(label: str, picture: str, words: str) -> str:
    return f"<figure><h3>{escape(label)}</h3>{picture}<figcaption>{escape(words)}</figcaption></figure>"


def _summary(spread: Spread, unit: str, of: str) -> str:
    middle = (
        f"Median {spread.median:.4g}, mean {spread.mean:.4g}, 5 to 95 %: {spread.p5:.4g} to {spread.p95:.4g} {unit}"
    )
    return f"{middle}; all within {spread.low:.4g} to {spread.high:.4g}; {spread.count:,} {of}."


def _units(units: Units) -> str:
    unit, share = units.most
    return (
        f"{units.used:,} of {units.clusters:,} units came in {units.frames:,} frames, {units.unused:,} did not. "
        f"Perplexity {units.perplexity:.1f}. Unit {unit} is the most frequent, {100 * share:.1f} % of the frames."
    )


def _clips(found: Findings, parts: Sequence[str]) -> str:
    if not parts:
        return '<section id="clips"><h2>Clips</h2><p>None to show.</p></section>'
    worst = sum(why != ["drawn at random"] for why in found.chosen.values())
    how = (
        f"{worst} at the bad ends of the {found.sampled:,} clips that were looked at, one of each figure in turn, then "
        "clips at random. Worst clips are extremes by design: judge the dataset by the distributions. Press a picture "
        "to hear it from there; keys: <kbd>j</kbd> and <kbd>k</kbd> go to the next clip and back."
    )
    switch = '<label><input type="checkbox" id="points" checked> landmarks on the faces</label>'
    return f'<section id="clips"><h2>Clips</h2><p class="soft">{how}</p>{switch}{"".join(parts)}</section>'
