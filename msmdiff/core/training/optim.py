"""Optimisers by name, and the learning rate as a pure function of images seen."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from msmdiff.core.config import OptimConfig


def build(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser a resolved section asks for, over all parameters in one group.

    `adan` is timm's, which equals the published Adan; `adan-pytorch` differs from it (its first
    step moves nothing and its bias corrections are off by one) and takes the complements of the
    published betas, translated here.
    """
    assert config.lr is not None, "resolve the configuration first"
    assert config.betas is not None, "resolve the configuration first"
    betas = tuple(config.betas)
    common: dict = {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay}
    parameters = [p for p in parameters if p.requires_grad]
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, betas=(betas[0], betas[1]), fused=True, **common)
    if config.name == "adan":
        from timm.optim.adan import Adan

        return Adan(
            parameters, betas=(betas[0], betas[1], betas[2]), no_prox=config.no_prox, **common
        )
    from adan_pytorch import Adan as AdanPytorch

    return AdanPytorch(parameters, betas=tuple(1 - b for b in betas), **common)


def learning_rate(config: OptimConfig, images_seen: int, batch_size: int) -> float:
    """The rate of the step that starts after `images_seen` images: linear warm-up from 0, then the
    schedule.
    """
    assert config.lr is not None
    step = images_seen / batch_size
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant" or config.decay_steps is None:
        return config.lr
    progress = min(1.0, step / config.decay_steps)
    remaining = (
        1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    )
    return config.final_lr + (config.lr - config.final_lr) * remaining
