"""Typed configuration: frozen models, YAML files, `a.b=value` overrides; unknown keys are errors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from shards.errors import UserError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration: immutable, and strict about keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def load_config(
    cls: type[C], path: Path | None = None, overrides: Iterable[str] = (), base: dict[str, Any] | None = None
) -> C:
    """Build `cls` from defaults, then `base`, then the YAML file `path`, then `overrides` (`a.b=value`, YAML values).

    Raises:
        UserError: the file is missing or no YAML mapping, an override has no `=`, a key is unknown or a
            value has the wrong type. The message names the key.
    """
    tree: dict[str, Any] = merge({}, base or {})
    if path is not None:
        tree = merge(tree, _read_yaml(path))
    for text in overrides:
        tree = merge(tree, _parse_override(text))
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise UserError(_describe(error, f"{path}" if path else "command line")) from None


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `top` laid over it, mapping by mapping; neither argument changes."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: expected `key: value` lines, found {type(tree).__name__}")
    return tree


def _parse_override(text: str) -> dict[str, Any]:
    dotted, equals, raw = text.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {text!r}: write it as key=value, e.g. pitch.fmax=500")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise UserError(f"override {text!r}: the value is not valid YAML") from None
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def _describe(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}")
        else:
            lines.append(f"{key or 'value'}: {_plain(item)} (got {item['input']!r})")
    return f"config ({where}): " + "; ".join(lines)


_KINDS = {
    "int": "expected a whole number",
    "float": "expected a number",
    "finite": "expected a finite number",
    "bool": "expected true or false",
    "string": "expected text",
    "path": "expected a path",
    "tuple": "expected a list",
    "list": "expected a list",
    "model": "expected keys of its own, as in `section: {key: value}`",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _plain(item: ErrorDetails) -> str:
    """What is wrong with a value, in the words of these settings."""
    limits = item.get("ctx", {})
    if item["type"] == "literal_error":
        return f"choose from {str(limits['expected']).replace(chr(39), '').replace(' or ', ', ')}"
    if item["type"] == "value_error":
        return str(limits["error"])
    bounds = [f"{words} {limits[key]}" for key, words in _BOUNDS.items() if key in limits]
    if bounds:
        return f"must be {' and '.join(bounds)}"
    return _KINDS.get(item["type"].partition("_")[0], item["msg"])
