"""Every message on the page of troubleshooting is still one that the code gives."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from pipeline.stage import Reason

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
RAY = "Ray's own words"
RAYS_FILES = (
    "_private/authentication/authentication_constants.py",
    "_private/node.py",
    "_private/services.py",
    "_private/utils.py",
    "_private/worker.py",
    "_private/state.py",
    "autoscaler/v2/event_logger.py",
)


def joined(text: str) -> str:
    """Source with strings that stand behind each other made one."""
    return re.sub(r"\"\s*\n?\s*f?\"|'\s*\n?\s*f?'", "", text)


def sections() -> dict[str, list[list[str]]]:
    """Heading -> rows of its table, as cells."""
    found: dict[str, list[list[str]]] = {}
    for heading, body in re.findall(r"^##+ (.*?)\n(.*?)(?=^##|\Z)", PAGE, re.S | re.M):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", body, re.M)]
        found[heading] = rows[2:]
    return found


def said(cell: str, sources: list[str]) -> bool:
    """Whether one file holds all parts of a message, in their order."""
    parts = [part for message in re.findall("`(.+?)`", cell) for part in message.split("…") if part.strip()]
    pattern = re.compile(".*?".join(map(re.escape, parts)), re.S)
    return any(all(part in source for part in parts) and pattern.search(source) for source in sources)


@pytest.fixture(scope="module")
def sources() -> list[str]:
    floors = [path for floor in ("shards", "pipeline", "model", "cli") for path in (ROOT / floor).rglob("*.py")]
    return [joined(path.read_text()) for path in [*floors, ROOT / "Makefile"]]


def test_messages_are_those_of_the_code(sources: list[str]) -> None:
    own = {name: rows for name, rows in sections().items() if name not in (RAY, "Reasons in quarantine")}
    assert sum(map(len, own.values())) > 70
    stale = [row[0] for rows in own.values() for row in rows if not said(row[0], sources)]
    assert not stale


def test_every_reason_is_there_with_its_message(sources: list[str]) -> None:
    rows = sections()["Reasons in quarantine"]
    assert {name for row in rows for name in re.findall(r"\w+", row[0])} == {reason.value for reason in Reason}
    stale = [row[1] for row in rows if "`" in row[1] and not said(row[1], sources)]
    assert not stale


def test_words_of_ray_are_rays() -> None:
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        pytest.skip("Ray is not installed")
    files = [joined((Path(spec.origin).parent / name).read_text()) for name in RAYS_FILES]
    stale = [row[0] for row in sections()[RAY] if not said(row[0], files)]
    assert not stale
