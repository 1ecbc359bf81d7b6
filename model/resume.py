"""How a run begins, and whether and with what it may go on from a checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from model import checkpoint
from model.checkpoint import Checkpoint, LeftOut
from model.config import ModelConfig
from model.ranks import Ranks
from model.run_config import RunConfig
from model.statistics import mel_statistics
from model.system import System
from model.systems import build_network
from model.train_config import TrainConfig
from shards.clip_table import ClipTable, Snapshot
from shards.config import Config
from shards.errors import UserError

LOOSE = (
    *("steps", "minutes", "device", "threads", "log_every", "checkpoint_every", "keep", "keep_every", "model"),
    "lip_weights",
    *("profile", "validation", "accumulate", "compile", "peak_tflops", "dataset.snapshots"),
    *(f"data.{name}" for name in ("workers", "prefetch", "cache", "cache_bytes", "ahead", "verify", "damaged")),
    *("data.index", "data.augment_on"),
)
"""Keys that may change in the middle of a run: they decide how it is run, not what comes out (but for rounding)."""
NAMED = 4
"""How many keys a refusal shows."""


def snapshots(state: Checkpoint) -> list[Snapshot] | None:
    """State of each dataset that the run reads; None in checkpoints of before there was such a thing."""
    found = state.dataset.get("snapshots")
    return found and [Snapshot.model_validate(facts) for facts in found]


def check_same_run(run: str, state: Checkpoint, config: RunConfig, shape: Config, facts: dict[str, Any]) -> None:
    """A run goes on only with what decides its results unchanged: settings, network and how the shards were made.

    Raises:
        UserError: names the keys that differ, with both values.
    """
    ours = _flat({**plain(config), "network": plain(shape), "dataset": facts})
    theirs = _flat({**state.config, "network": state.shape, "dataset": state.dataset})
    # A key that came later had its default.
    theirs = {**_flat({**plain(type(config)()), "network": plain(type(shape)())}), **theirs}
    odd = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    odd = [key for key in odd if not any(key == name or key.startswith(f"{name}.") for name in LOOSE)]
    # Most other differences follow from these.
    odd.sort(key=lambda key: key not in ("size", "network.system"))
    if odd:
        names = {key: f"model.{key.removeprefix('network.')}" if key.startswith("network.") else key for key in odd}
        shown = ", ".join(f"{names[key]} was {theirs.get(key)!r}, is {ours.get(key)!r}" for key in odd[:NAMED])
        more = f" and {len(odd) - NAMED} more" if len(odd) > NAMED else ""
        raise UserError(
            f"{run}: checkpoint of another configuration: {shown}{more}; name another folder or set it back"
        )


def begun_network(
    config: TrainConfig, shape: ModelConfig, state: Checkpoint | None, tables: Sequence[ClipTable]
) -> tuple[System, LeftOut | None]:
    """The network as the run begins or goes on, on the CPU, and what its checkpoints leave out: a frozen lip encoder,
    which lies in a file.

    Args:
        tables: clips of the training set, for the scale of its mels.

    Raises:
        UserError: a frozen lip encoder without weights, or with others than those that the run began with.
    """
    if shape.lip_encoder.frozen and config.lip_weights is None:
        raise UserError(
            "the lip encoder is frozen and has no weights: give lip_weights (see `f2v weights convert`), or train it "
            "along (size=tiny, or model.lip_encoder.frozen=false)"
        )
    network = build_network(shape)
    if config.lip_weights is not None:
        network.lip_encoder.load_public(config.lip_weights)
    if state is not None:
        without = state.without
        if without is not None:
            without = {**without, "path": str(checkpoint.weights_file(without, config.lip_weights).absolute())}
        checkpoint.restore(network, state)
        return network, without
    if config.begin is not None:
        checkpoint.restore(network, checkpoint.load(config.begin))
    if shape.mel_scale == "corpus" and config.begin is None:
        mean, deviation = mel_statistics(tables)
        network.mel_mean.fill_(mean)
        network.mel_std.fill_(deviation)
    if shape.lip_encoder.frozen and config.lip_weights is not None:
        return network, checkpoint.left_out("lip_encoder.network.", config.lip_weights)
    return network, None


def describe(config: RunConfig, shape: Config, ranks: Ranks, step: int) -> str:
    """What a run is, for people: how it was started last."""
    facts = {
        "command": sys.argv,
        "from_step": step,
        "processes": ranks.world,
        "versions": {name: version(name) for name in ("faces2voices", "torch", "numpy")},
        "config": plain(config),
        "network": plain(shape),
    }
    return json.dumps(facts, indent=1)


def plain(config: Config) -> dict[str, Any]:
    """A configuration as JSON values."""
    return config.model_dump(mode="json")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
