"""Which times a sampler visits, from pure noise (t = 1) down to the clean image (t = 0)."""

import torch
from torch import Tensor

from msmdiff.core.errors import UsageError


def even(timesteps: int, steps: int) -> Tensor:
    """steps + 1 grid times, evenly spaced over the whole range: [steps + 1] float64, falling from 1 to 0."""
    _check(timesteps, steps)
    k = torch.linspace(timesteps, 0, steps + 1, dtype=torch.float64).round()
    return k / timesteps


def maskdm(timesteps: int, steps: int) -> Tensor:
    """MaskDM's DDIM grid: the integer part of a float32 linspace(-1, T - 1, steps + 1); index -1 is clean."""
    _check(timesteps, steps)
    indices = torch.linspace(-1, timesteps - 1, steps + 1, dtype=torch.float32).int().flip(0)
    return (indices.double() + 1) / timesteps


def adm(timesteps: int, steps: int) -> Tensor:
    """ADM's respacing to `steps` evenly rounded indices from 0 to T - 1 (Dhariwal & Nichol 2021), then clean."""
    _check(timesteps, steps)
    stride = (timesteps - 1) / max(steps - 1, 1)
    indices = torch.tensor([round(stride * i) for i in range(steps)], dtype=torch.float64).flip(0)
    return torch.cat([(indices + 1) / timesteps, torch.zeros(1, dtype=torch.float64)])


GRIDS = {"even": even, "maskdm": maskdm, "adm": adm}


def _check(timesteps: int, steps: int) -> None:
    if not 1 <= steps <= timesteps:
        raise UsageError(f"sample.steps {steps} must lie between 1 and the process's {timesteps} time steps")
