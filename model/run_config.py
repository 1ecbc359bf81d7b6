"""Configuration that every training run has, whatever it trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shards.config import Config
from shards.stream_config import StreamConfig

Share = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(Config):
    """AdamW and its learning rate.

    Attributes:
        decay: factor on the learning rate per epoch.
        warmup: steps over which the rate rises from zero.
        clip_norm: bound on the norm of the gradient of all parameters together; null: none.
    """

    lr: float = Field(1e-4, gt=0)
    betas: tuple[Share, Share] = (0.8, 0.99)
    eps: float = Field(1e-9, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    decay: float = Field(0.999 ** (1 / 8), gt=0, le=1)
    warmup: int = Field(0, ge=0)
    clip_norm: float | None = Field(5.0, gt=0)


class RunConfig(Config):
    """How a run goes on, is watched and is kept.

    Attributes:
        begin: checkpoint or run folder whose parameters a new run begins with, in place of random ones.
        ema: decay of a moving average of the parameters, which validation and synthesis then use; null keeps none.
        steps: optimiser steps in all.
        minutes: stop after this long, with a checkpoint.
        threads: torch threads; 0 keeps torch's own choice.
        amp: bfloat16 autocast (losses stay float32).
        peak_tflops: what utilisation is measured against; null measures a large matrix product at the start.
        keep: checkpoints; older ones are deleted.
        keep_every: those of multiples of this many steps stay.
    """

    begin: str | None = None
    data: StreamConfig = StreamConfig()
    ema: float | None = Field(None, gt=0, lt=1)
    steps: int = Field(350_000, ge=1)
    minutes: float | None = Field(None, gt=0)
    seed: int = Field(0, ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: bool = True
    peak_tflops: float | None = Field(None, gt=0)
    threads: int = Field(0, ge=0)
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep: int = Field(3, ge=1)
    keep_every: int | None = Field(None, ge=1)
