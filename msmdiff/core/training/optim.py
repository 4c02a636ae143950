"""Optimisers by name, and the learning rate as a pure function of images seen.

A new optimiser is one function here or in a plugin: `make(parameters, *, lr, eps, weight_decay,
**options)`, registered with its options. `parameters` are a list, which also knows which of them
are matrices of blocks.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from pydantic import Field, StrictBool
from torch import nn

from msmdiff.core import registry
from msmdiff.core.backbones.routes import blocks_of
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import OptimConfig

Beta = Annotated[float, Ge(0), Lt(1)]


class Parameters(list[nn.Parameter]):
    """Those parameters that are trained, in the network's order.

    Attributes:
        matrices: those of them that are the weights [out, in] of linear layers in blocks.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], matrices: Iterable[nn.Parameter] = ()
    ) -> None:
        super().__init__(p for p in parameters if p.requires_grad)
        inside = {id(p) for p in matrices}
        self.matrices = [p for p in self if id(p) in inside]

    @classmethod
    def of(cls, network: nn.Module, beside: Iterable[nn.Parameter] = ()) -> "Parameters":
        """A network's, as long as it is not sharded, and others behind them."""
        linear = [m for b in blocks_of(network) for m in b.modules() if isinstance(m, nn.Linear)]
        weights = [p for layer in linear for p in layer.parameters() if p.ndim == 2]
        return cls([*network.parameters(), *beside], weights)


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


class MuonOptions(Options):
    betas: list[Beta] = Field(
        default=[0.9, 0.95],
        min_length=2,
        max_length=2,
        description="The decays of AdamW's two moments, for all that is no matrix of a block.",
    )
    momentum: Beta = Field(0.95, description="The decay of Muon's momentum.")
    nesterov: StrictBool = Field(True, description="Look ahead along the momentum.")
    ns_steps: int = Field(
        5, ge=1, le=99, description="Newton-Schulz iterations that orthogonalise an update."
    )


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for the first group and its AdamW for the second, with one state and one list
    of groups: whoever saves, shards or sets the rate meets one optimiser.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self._parts = (muon, adamw)
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self._parts, self.param_groups, strict=True):
            # Loading a state, or sharding, has put others in the place of those that it knew.
            part.state, part.param_groups = self.state, [group]
            part.step()
        return loss


@register("optimiser", "muon", MuonOptions)
def muon(
    parameters: Parameters,
    *,
    betas: list[float],
    momentum: float,
    nesterov: bool,
    ns_steps: int,
    **common: Any,
) -> MuonAndAdamW:
    """torch's Muon (Jordan et al. 2024) for the matrices of blocks, AdamW for the rest.

    A matrix's update has singular values of about 1 and is scaled to the root mean square of
    AdamW's, 0.2 (Liu et al. 2025), so that one rate and one decay serve both. A matrix that makes
    queries, keys and values is taken as a whole. `optim.eps` is AdamW's.

    Raises UsageError for a network without such matrices.
    """
    if not parameters.matrices:
        raise UsageError(
            "optim.name muon needs the matrices of a network's blocks, and this network has none "
            "(a class called Block with linear layers): use adamw"
        )
    inside = {id(p) for p in parameters.matrices}
    of_matrices = torch.optim.Muon(
        parameters.matrices,
        lr=common["lr"],
        weight_decay=common["weight_decay"],
        momentum=momentum,
        nesterov=nesterov,
        ns_steps=ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = Parameters(p for p in parameters if id(p) not in inside)
    return MuonAndAdamW(of_matrices, adamw(rest, betas=betas, **common))


def build(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser a resolved section asks for.

    Raises UsageError for parameters that it cannot train.
    """
    assert config.lr is not None, "resolve the configuration first"
    entry = registry.find("optimiser", config.name, "optim.name")
    trained = parameters if isinstance(parameters, Parameters) else Parameters(parameters)
    common = {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay}
    return entry.make(trained, **entry.takes(config), **common)


def state_size(config: OptimConfig, parameters: Parameters) -> int:
    """Numbers that the optimiser keeps beside these parameters, counted on a small step."""
    matrix, other = nn.Parameter(torch.zeros(20, 20)), nn.Parameter(torch.zeros(400))
    matrix.grad, other.grad = torch.zeros(20, 20), torch.zeros(400)
    optimizer = build(config, Parameters([matrix, other], parameters.matrices and [matrix]))
    optimizer.step()
    of_matrices = sum(p.numel() for p in parameters.matrices)
    counts = {matrix: of_matrices, other: sum(p.numel() for p in parameters) - of_matrices}
    return sum(_kept(optimizer.state[p]) * count for p, count in counts.items())


def _kept(state: dict[str, Any]) -> int:
    """Numbers of one parameter's state for each of its 400 numbers."""
    values = [value.numel() for value in state.values() if isinstance(value, torch.Tensor)]
    return round(sum(values) / 400)


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
