"""Several systems that spoke for the same clips: a folder each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.evaluation.partners import files
from shards.errors import UserError


def parse_systems(words: Sequence[str], least: int = 2) -> dict[str, Path]:
    """Folders by system, in the order of `NAME=DIR` words.

    Raises:
        UserError: a word of another form, a name twice, no such folder, or fewer than `least` of them.
    """
    systems: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        name = name.strip()
        if not (name and equals and folder):
            raise UserError(f"{word!r}: write a system as NAME=DIR, e.g. ours=out/speech")
        if not name.isprintable() or ":" in name:
            raise UserError(f"{name!r}: a system's name must be printable text without a colon")
        if name in systems:
            raise UserError(f"two systems are called {name!r}; give each its own name")
        if not Path(folder).is_dir():
            raise UserError(f"{word}: no such folder as {folder}")
        systems[name] = Path(folder)
    if len(systems) < least:
        raise UserError(f"{len(systems)} of the at least {least} systems that this needs; name each as NAME=DIR")
    return systems


def common_clips(systems: dict[str, Path]) -> tuple[dict[str, dict[str, Path]], dict[str, list[str]]]:
    """Clips that every system has, and those that some lack.

    Returns:
        Key -> system -> file; key -> systems without a file. Both in the order of keys.

    Raises:
        UserError: not one clip that all have.
    """
    found = {name: files(folder) for name, folder in systems.items()}
    keys = sorted({key for listed in found.values() for key in listed})
    lacking = {key: [name for name in found if key not in found[name]] for key in keys}
    common = {key: {name: found[name][key] for name in found} for key in keys if not lacking[key]}
    if not common:
        some = "; ".join(f"{name}: {', '.join(list(listed)[:2]) or 'nothing'}" for name, listed in found.items())
        raise UserError(
            f"no clip that all of {', '.join(systems)} have ({some}); partners share the path below the folder"
        )
    return common, {key: names for key, names in lacking.items() if names}
