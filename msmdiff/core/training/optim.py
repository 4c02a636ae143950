"""Optimisers by name, and the learning rate as a pure function of images seen.

A new optimiser is one function here or in a plugin: `make(parameters, *, lr, eps, weight_decay,
**options)`, registered with its options.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from pydantic import Field, StrictBool
from torch import nn

from msmdiff.core import registry
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import OptimConfig

Beta = Annotated[float, Ge(0), Lt(1)]
Parameters = list[nn.Parameter]


class AdamWOptions(Options):
    betas: list[Beta] = Field(
        default=[0.99, 0.99],
        min_length=2,
        max_length=2,
        description="The decays of the two moments.",
    )


@register("optimiser", "adamw", AdamWOptions)
def adamw(parameters: Parameters, *, betas: list[float], **common: Any) -> torch.optim.Optimizer:
    """torch's fused AdamW (Loshchilov & Hutter 2019)."""
    return torch.optim.AdamW(parameters, betas=(betas[0], betas[1]), fused=True, **common)


class AdanPytorchOptions(Options):
    betas: list[Beta] = Field(
        default=[0.98, 0.92, 0.99], min_length=3, max_length=3, description="Adan's three decays."
    )


class AdanOptions(AdanPytorchOptions):
    no_prox: StrictBool = Field(
        False, description="Apply weight decay before the step instead of proximally."
    )


@register("optimiser", "adan", AdanOptions)
def adan(
    parameters: Parameters, *, betas: list[float], no_prox: bool, **common: Any
) -> torch.optim.Optimizer:
    """timm's Adan (Xie et al. 2024), which equals the published one."""
    from timm.optim.adan import Adan

    moments = (betas[0], betas[1], betas[2])
    return Adan(parameters, betas=moments, no_prox=no_prox, **common)


@register("optimiser", "adan-pytorch", AdanPytorchOptions)
def adan_pytorch(
    parameters: Parameters, *, betas: list[float], **common: Any
) -> torch.optim.Optimizer:
    """adan-pytorch's Adan, whose first step moves nothing and whose corrections are off by one."""
    from adan_pytorch import Adan

    # It takes the complements of the published betas.
    return Adan(parameters, betas=tuple(1 - beta for beta in betas), **common)


def build(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser a resolved section asks for, over all parameters in one group."""
    assert config.lr is not None, "resolve the configuration first"
    entry = registry.find("optimiser", config.name, "optim.name")
    trained = [p for p in parameters if p.requires_grad]
    common = {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay}
    return entry.make(trained, **entry.takes(config), **common)


def state_size(config: OptimConfig) -> int:
    """Numbers that the optimiser keeps for each parameter, counted on a small step."""
    trained = nn.Parameter(torch.zeros(1000))
    trained.grad = torch.zeros(1000)
    optimizer = build(config, [trained])
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    kept = sum(value.numel() for value in values if isinstance(value, torch.Tensor))
    return round(kept / trained.numel())


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
