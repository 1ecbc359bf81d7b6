"""Facial expression features: a Swin-T (Liu et al. 2021) for crops of 112 pixels, trained on RAF-DB by Zhang et al.
2023 ("Leave No Stone Unturned: Mine Extra Knowledge for Imbalanced Facial Expression Recognition").

Module names are those of their checkpoints, whose encoder is Microsoft's Swin with patches of 2 pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.networks.crops import apply_to_crops
from pipeline.networks.device import Precision, compute_type
from pipeline.networks.weights import Checkpoint, load_strict, load_tensors
from shards.schema import FACE_SIZE

CLASSES = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
"""RAF-DB's order."""
PATCH, WINDOW = 2, 7
WIDTH, DEPTHS, HEADS = 96, (2, 2, 6, 2), (3, 6, 12, 24)
FEATURES = WIDTH << len(DEPTHS) - 1
UNUSED = ("encoder.norm.", "encoder.feature.")
"""The head for face recognition that the encoder was first trained with; expression is read before it."""
CONSTANTS = (".relative_position_index", ".attn_mask")
"""Tables that follow from the window size alone; ours are computed."""
CHECKPOINT = Checkpoint(
    what="expression Swin-T (RAF-DB)",
    file="expression_swin_t.pt",
    hint="no address for a trained one is known: train it with github.com/zyh-uaiaaaa/Mine-Extra-Knowledge, or ask its "
    "authors, and store checkpoint_step_*_gpu_0.pt under that name; --set expression.network=geometry does without",
)


class Attention(nn.Module):
    """Self-attention within windows of 7x7 tokens, with a learnt bias per head and relative position."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        place = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))
        offset = place[:, None] - place[None] + WINDOW - 1
        index = offset[..., 0] * (2 * WINDOW - 1) + offset[..., 1]
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """float [B, windows, 49, width] and mask [windows, 49, 49], added to the scores -> as x."""
        batch, windows, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, windows, tokens, 3, self.heads, width // self.heads)
        # Windows and heads become one axis, so that one fused call serves them all.
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        bias = bias.expand(windows, -1, -1, -1) if mask is None else bias + mask[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.flatten(0, 1)[None])
        attended = attended.view(batch, windows, self.heads, tokens, -1).transpose(2, 3)
        return self.proj(attended.reshape(batch, windows, tokens, width))


class Mlp(nn.Module):
    """Four times wider GELU layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., width] -> the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block over windows, which lie half a window further in every other block.

    Args:
        side: tokens along each side of the picture; where a single window covers them, nothing shifts.
    """

    attn_mask: Tensor | None

    def __init__(self, width: int, heads: int, side: int, shifted: bool) -> None:
        super().__init__()
        self.shift = WINDOW // 2 if shifted and side > WINDOW else 0
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.register_buffer("attn_mask", shift_mask(side, self.shift) if self.shift else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, side, side, width] -> the same shape."""
        side = x.shape[1]
        tokens = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)) if self.shift else self.norm1(x)
        tokens = join_windows(self.attn(split_windows(tokens), self.attn_mask), side)
        x = x + (torch.roll(tokens, (self.shift, self.shift), (1, 2)) if self.shift else tokens)
        return x + self.mlp(self.norm2(x))


def split_windows(x: Tensor) -> Tensor:
    """[B, side, side, C] -> [B, windows, 49, C]."""
    batch, side, _, width = x.shape
    count = side // WINDOW
    x = x.view(batch, count, WINDOW, count, WINDOW, width).transpose(2, 3)
    return x.reshape(batch, count**2, WINDOW**2, width)


def join_windows(x: Tensor, side: int) -> Tensor:
    """[B, windows, 49, C] -> [B, side, side, C]."""
    batch, _, _, width = x.shape
    count = side // WINDOW
    return x.view(batch, count, count, WINDOW, WINDOW, width).transpose(2, 3).reshape(batch, side, side, width)


def shift_mask(side: int, shift: int) -> Tensor:
    """What is added to scores after a cyclic shift: -100 between tokens that only the wrap made neighbours, else 0.

    Returns:
        float [windows, 49, 49].
    """
    place = torch.arange(side)
    region = (place >= side - WINDOW).int() + (place >= side - shift).int()
    regions = split_windows((3 * region[:, None] + region)[None, :, :, None])[0, :, :, 0]
    return (regions[:, :, None] != regions[:, None]).float() * -100


class Merge(nn.Module):
    """Four neighbouring tokens become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, side, side, width] -> [B, side / 2, side / 2, 2 width]."""
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Level(nn.Module):
    """Blocks at one resolution, and the merge to the next."""

    def __init__(self, width: int, depth: int, heads: int, side: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, heads, side, bool(number % 2)) for number in range(depth)))
        self.downsample: nn.Module = nn.Identity() if last else Merge(width)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, side, side, width] -> half the side and twice the width, or, at the last level, the same shape."""
        return self.downsample(self.blocks(x))


class Patches(nn.Module):
    """Tokens of 2x2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, 3, 112, 112] -> [B, 56, 56, 96]."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Encoder(nn.Module):
    """Swin-T without its last norm and head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Patches()
        sides = [FACE_SIZE // PATCH >> number for number in range(len(DEPTHS))]
        self.layers = nn.Sequential(
            *(
                Level(WIDTH << number, depth, heads, side, number == len(DEPTHS) - 1)
                for number, (depth, heads, side) in enumerate(zip(DEPTHS, HEADS, sides, strict=True))
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """float [B, 3, 112, 112] -> [B, 7, 7, 768]."""
        return self.layers(self.patch_embed(x))


class SwinExpression(nn.Module):
    """Encoder, norm, mean over the 7x7 tokens, and a linear head for seven classes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.norm = nn.LayerNorm(FEATURES)
        self.head = nn.Linear(FEATURES, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """float [B, 3, 112, 112] in [-1, 1] -> float [B, 768], what the head sees."""
        tokens = self.encoder(x).to(self.norm.weight.dtype)
        return self.norm(tokens).mean((1, 2))


class ExpressionNetwork:
    """The feature that expressions are read from, and the expressions.

    Args:
        checkpoint: file with an entry `state_dict_model`.
        precision: of the encoder; the norm behind it is always float32.

    Raises:
        UserError: the file is damaged or holds another network.
    """

    def __init__(self, checkpoint: Path, device: torch.device, precision: Precision) -> None:
        tensors = load_tensors(checkpoint, CHECKPOINT.what, inside=("state_dict_model",))
        kept = {k: tensor for k, tensor in tensors.items() if not k.startswith(UNUSED) and not k.endswith(CONSTANTS)}
        network = SwinExpression().eval().requires_grad_(False)
        load_strict(network, kept, checkpoint, CHECKPOINT.what)
        self._device, self._dtype = device, compute_type(precision)
        network.to(device)
        network.encoder.to(self._dtype)
        self._network = network

    def features(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of RGB crops [n, 112, 112, 3]: float32 [n, 768]."""
        return apply_to_crops(self._network, faces, self._device, self._dtype)

    @torch.inference_mode()
    def expressions(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities of `CLASSES` from features [n, 768]: float32 [n, 7]."""
        scores = self._network.head(torch.from_numpy(features).to(self._device))
        return scores.softmax(1).cpu().numpy()
