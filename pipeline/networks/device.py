"""Where networks run, and in which precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]
"""`bfloat16` is for processors and GPUs that multiply it natively (AVX-512 BF16, AMX, NVIDIA from Ampere on)."""


def compute_type(precision: Precision) -> torch.dtype:
    """The type in which a network computes.

    From then on this process multiplies float32 as float32. TF32, which torch lets GPUs' convolutions take instead, has
    10 bits of its 23.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def pick_device() -> torch.device:
    """The GPU that this process sees, else the processor. Workers of a build that are given no GPU see none."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
