"""`torch.compile` for the heavy parts of the network, given up with one line where it does not work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from model.avhubert import EncoderLayer
from model.baselines.conformer import ConformerBlock
from model.baselines.dit import DiTBlock
from model.layers import ConvNeXtBlock, TransformerLayer
from model.rehearsal import rehearsal
from model.system import System
from model.unet import ResidualBlock, TransformerBlock

REPEATED = (
    *(EncoderLayer, ConvNeXtBlock, TransformerLayer, ResidualBlock, TransformerBlock),
    *(ConformerBlock, DiTBlock),
)
SHAPES = 64
"""How many kinds and shapes of them may be compiled."""


def compile_parts(network: System, say: Callable[[str], None], try_step: Callable[[], object]) -> bool:
    """Compile the parts in place and run `try_step`, a training step's forward and backward pass, once.

    The keys of the state dict stay as they are, and copies of the network are not compiled. Compiled code serves
    steps with gradients and one shape of batch: what validation and synthesis run, in lengths of any kind, stays as
    it was. Nothing that `try_step` does to buffers, gradients and random generators remains.

    Args:
        say: told in one line where compiling fails; the parts are then as they were before.
        try_step: must run under the autocast that training uses, or that will compile once more.

    Returns:
        Whether the parts are compiled.

    Raises:
        Exception: what `try_step` raises without compiled parts too.
    """
    with rehearsal(network):
        reason = _failure(network, try_step)
        if reason is None:
            return True
        # Raises what is the network's own fault or the memory's, whatever the compiler made of it.
        try_step()
    say(f"torch.compile failed ({reason}); going on without it")
    return False


def _failure(network: System, try_step: Callable[[], object]) -> str | None:
    """Why compiling or the step failed, in one line; no part is compiled then. The error itself, whose traceback holds
    on to the step's memory, ends here."""
    try:
        # All parts are one and the same function to the compiler, `nn.Module.__call__`, in many shapes.
        torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
        for part in _parts(network):
            _compile(part)
        try_step()
    except Exception as error:
        for part in _parts(network):
            part._compiled_call_impl = None
        torch._dynamo.reset()
        return _one_line(error)
    return None


def _parts(network: System) -> Iterator[nn.Module]:
    """The blocks that are repeated: each kind and shape is compiled once and serves all of its like, a minute's work
    where the whole network would be many. None of them breaks the graph."""
    return (part for part in network.modules() if isinstance(part, REPEATED))


def _compile(part: nn.Module) -> None:
    part.compile(dynamic=False)
    compiled: Any = part._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        # Gradients are on in training alone, also around a frozen part.
        return compiled(*args, **kwargs) if torch.is_grad_enabled() else part._call_impl(*args, **kwargs)

    # Where `nn.Module.compile` puts it, so that copying and pickling leave it out.
    part._compiled_call_impl = call


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
