"""Batches where the network runs: copied without waiting, augmented there, in the network's shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shards.augment import CROP, SCALE, SHIFT
from shards.errors import UserError
from shards.workers import Batches

Batch = dict[str, Any]
"""A batch as the network takes it, with B samples of F video frames and T = 2F acoustic frames. Of these, what the
stream's `fields` name:

lips float32 [B, 1, F, 88, 88], identity and expression float32 [B, F, D], units int64 [B, T] (-100 in padding), timbre
float32 [B, D], pitch and energy float32 [B, T], mel float32 [B, 80, T], wave float32 [B, 1, 640F] in [-1, 1) (of the
field `wav`). Always: frames int64 [B] (valid video frames; the rest is padding, zero), keys (list of str).
"""
_AS_THEY_ARE = ("units", "timbre", "pitch", "energy", "frames")


def network_batch(host: dict[str, Any], device: torch.device) -> Batch:
    """Copy a batch of the stream to `device` and bring it into the network's shapes.

    Args:
        host: tensors of `shards.layout.Layout`, and `keys`.
    """

    def move(name: str) -> Tensor:
        tensor: Tensor = host[name].to(device, non_blocking=True)
        return tensor

    batch: Batch = {name: move(name) for name in _AS_THEY_ARE if name in host}
    batch["keys"] = host["keys"]
    for name in ("identity", "expression"):
        if name in host:
            batch[name] = move(name).float()
    if "mel" in host:
        batch["mel"] = move("mel").transpose(1, 2).contiguous()
    if "wav" in host:
        # Division by a power of two is exact.
        batch["wave"] = move("wav").float().div_(32768).unsqueeze(1)
    if "lips" in host:
        lips = move("lips")
        batch["lips"] = (augmented(lips, host, device) if lips.dtype == torch.uint8 else lips).unsqueeze(1)
    return batch


def augmented(lips: Tensor, how: dict[str, Tensor], device: torch.device) -> Tensor:
    """The same as `shards.augment.augmented`, bit for bit, for a batch.

    Args:
        lips: uint8 [B, F, 96, 96] on `device`.
        how: `crop`, `flip`, `box` and `shown` on the host.

    Returns:
        float32 [B, F, 88, 88].
    """
    rows, frames = lips.shape[:2]
    out = torch.empty(rows, frames, CROP, CROP, device=device)
    crops, boxes, flips = how["crop"].tolist(), how["box"].tolist(), how["flip"].tolist()
    for row, ((top, left), flip) in enumerate(zip(crops, flips, strict=True)):
        cut = lips[row, :, top : top + CROP, left : left + CROP]
        out[row] = cut.flip(-1) if flip else cut
    out.mul_(float(SCALE)).add_(float(SHIFT))
    for row, (top, bottom, left, right) in enumerate(boxes):
        out[row, :, top:bottom, left:right] = 0
    hidden = ~how["shown"]
    if hidden.any():
        out.masked_fill_(hidden.to(device, non_blocking=True)[:, :, None, None], 0)
    return out


def on_device(hosts: Iterator[dict[str, Any]], device: torch.device, batches: Batches) -> Iterator[Batch]:
    """Batches on `device`. On a GPU one is copied and augmented while the network works on the one before.

    Args:
        hosts: batches on the host, in memory of `batches`, which their first tensor begins.
    """
    if device.type != "cuda":
        yield from (network_batch(host, device) for host in hosts)
        return
    side = torch.cuda.Stream(device)
    locked: list[int] = []
    refused: list[int] = []

    def load() -> tuple[Batch, dict[str, Any], torch.cuda.Event] | UserError | None:
        try:
            host = next(hosts, None)
        except UserError as error:
            # It belongs to the step after the one that is at hand.
            return error
        if host is None:
            return None
        start = next(iter(host.values())).data_ptr()
        if start not in batches.locked and not refused:
            (locked if _page_lock(start, batches, device) else refused).append(start)
        with torch.cuda.stream(side):
            batch = network_batch(host, device)
            done = torch.cuda.Event()
            done.record(side)
        return batch, host, done

    try:
        following = load()
        while following is not None:
            if isinstance(following, UserError):
                raise following
            batch, host, done = following
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.record_stream(current)
            following = load()
            # The host's memory may be filled anew only after it was copied.
            done.synchronize()
            del host
            yield batch
    finally:
        torch.cuda.synchronize(device)
        for start in locked:
            batches.locked.discard(start)
            torch.cuda.cudart().cudaHostUnregister(start)


def _page_lock(start: int, batches: Batches, device: torch.device) -> bool:
    """Page-lock a slot, so that copies from it do not hold up the host; whether the system allowed it."""
    if int(torch.cuda.cudart().cudaHostRegister(start, batches.slot_bytes, 0)) == 0:
        batches.locked.add(start)
        return True
    # The refusal stays behind as CUDA's last error, which the next launch reports and clears.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)
    return False
