"""The optimiser of a training run and its learning rate."""

from __future__ import annotations

import torch

from model.run_config import AdamWConfig
from model.system import System
from model.train_config import OptimiserConfig


def adamw(network: System, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; the lip encoder's own part has `lip_lr`."""
    lips = [parameter for parameter in network.lip_encoder.network.parameters() if parameter.requires_grad]
    inside = {id(parameter) for parameter in lips}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in inside]
    groups = [{"params": others, "scale": 1.0}]
    if lips:
        groups.append({"params": lips, "scale": (config.lip_lr or config.lr) / config.lr})
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def set_rate(optimiser: torch.optim.Optimizer, config: AdamWConfig, step: int, epoch: int) -> float:
    """Learning rate of a step: a straight rise over `warmup` steps, times `decay` for each epoch."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    rate = float(config.lr * warm * config.decay**epoch)
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    return rate
