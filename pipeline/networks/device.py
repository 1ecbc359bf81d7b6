"""Where networks run, and in which precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]
"""`bfloat16` is for processors and GPUs that multiply it natively (AVX-512 BF16, AMX, NVIDIA from Ampere on)."""


def pick_device() -> torch.device:
    """The GPU that this process was given, else the processor. Ray hides GPUs from workers that did not ask for one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
