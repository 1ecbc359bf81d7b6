"""Counts, sizes and names in messages."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """`1 clip`, `2 clips`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def printable(text: str) -> str:
    """`text` on one line: names that others gave may hold line breaks, escape sequences or undecodable bytes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
