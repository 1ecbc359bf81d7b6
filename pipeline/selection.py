"""Which part of a plan to run: `--only`, `--from`, `--shards`, `--force`, `--requeue`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from pipeline.registry import STAGES, upstream, writers
from pipeline.stage import Reason
from shards.errors import UserError
from shards.manifest import split_of


@dataclass(frozen=True)
class Selection:
    """What was asked for; the default is everything that is not up to date.

    Attributes:
        only: these stages; empty for all.
        start: this stage and all that follow from it.
        shards: for example `3-7,9` or `train:3-7,test:0`; numbers without a split count in every split.
        force: do it again even where it is up to date.
        requeue: try clips again that were refused for these reasons.
    """

    only: tuple[str, ...] = ()
    start: str | None = None
    shards: str | None = None
    force: bool = False
    requeue: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = [kind.name for kind in STAGES]
        for name in (*self.only, *([self.start] if self.start else [])):
            if name not in known:
                raise UserError(f"no stage {name!r}; choose from {', '.join(known)}")
        if not self.stages():
            raise UserError(f"--only {' '.join(self.only)} and --from {self.start} have no stage in common")
        for reason in self.requeue:
            if reason not in [known.value for known in Reason]:
                raise UserError(f"no reason {reason!r}; choose from {', '.join(known.value for known in Reason)}")

    def stages(self) -> set[str]:
        """Names of the stages that may run."""
        chosen = {kind.name for kind in STAGES}
        if self.only:
            chosen &= set(self.only)
        if self.start:
            chosen &= followers(self.start)
        return chosen

    def pick_shards(self, names: Collection[str]) -> set[str]:
        """Those of the shards `names` that may be worked on.

        Raises:
            UserError: an expression that cannot be read, or one that picks nothing.
        """
        if self.shards is None:
            return set(names)
        picked: set[str] = set()
        for part in self.shards.split(","):
            match = re.fullmatch(r"(?:(\w+):)?(\d+)(?:-(\d+))?", part.strip())
            if not match:
                raise UserError(
                    f"shards {self.shards!r}: {part!r} is no number, range or SPLIT:RANGE, such as train:3-7"
                )
            low, high = int(match[2]), int(match[3] or match[2])
            found = {
                name
                for name in names
                if match[1] in (None, split_of(name)) and low <= int(name.rsplit("-", 1)[1]) <= high
            }
            if not found:
                raise UserError(f"shards {self.shards!r}: {part!r} picks none of {_range(names)}")
            picked |= found
        return picked


def refuse_waiting(chosen: Collection[str], built: Iterable[str]) -> None:
    """See that at least one of the stages that were chosen can run.

    Args:
        built: stages that have columns.

    Raises:
        UserError: none can, as all wait for columns of stages that were not chosen.
    """
    made = writers(STAGES)
    able = set(built) - set(chosen)
    waits: dict[str, list[str]] = {}
    lacking: set[str] = set()
    for kind in STAGES:
        missing = [name for name in upstream(kind, made) if name not in able]
        if kind.name in chosen and not missing:
            able.add(kind.name)
        elif kind.name in chosen:
            waits[kind.name] = missing
    if len(waits) < len(chosen):
        return
    for kind in reversed(STAGES):
        if kind.name in waits or kind.name in lacking:
            lacking |= set(upstream(kind, made)) - able
    words = "; ".join(f"{stage} needs {' and '.join(names)}" for stage, names in waits.items())
    more = " ".join(f"--only {kind.name}" for kind in STAGES if kind.name in lacking | waits.keys())
    raise UserError(f"{words}: not built here yet; build that too ({more}), or leave out --only and --from")


def followers(stage: str) -> set[str]:
    """A stage and every stage that reads from it, directly or not."""
    made = writers(STAGES)
    found = {stage}
    for kind in STAGES:
        if found & set(upstream(kind, made)):
            found.add(kind.name)
    return found


def _range(names: Collection[str]) -> str:
    ordered: Sequence[str] = sorted(names)
    return f"{ordered[0]} ... {ordered[-1]}" if len(ordered) > 1 else "".join(ordered)
