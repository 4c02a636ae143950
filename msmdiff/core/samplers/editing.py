"""Wrappers of a denoiser for pictures: filling in, watching, and going from one seed to another."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from msmdiff.core.diffusion.predictions import Estimate
from msmdiff.core.diffusion.process import Denoiser, Process

Wrap = Callable[[Denoiser, Tensor], tuple[Denoiser, Tensor]]
"""(denoiser, initial noise [B, C, H, W]) -> what takes their place."""


def inpainting(process: Process, known: Tensor, held: Tensor) -> Wrap:
    """Replacement conditioning (Song et al. 2021, appendix I.2): the kept part is always the known
    x0, noised.

    known [1, C, H, W] and held, bool [1, 1, H, W], are in the space of the diffusion. The noise of
    the kept part is the initial noise throughout, so that every sampler carries it along exactly.
    """

    def wrap(denoise: Denoiser, start: Tensor) -> tuple[Denoiser, Tensor]:
        noise = start / process.schedule.start_std

        def filled(x_t: Tensor, t: Tensor, *until: Tensor) -> Estimate:
            mixed = torch.where(held, process.add_noise(known, t, noise), x_t)
            estimate = denoise(mixed, t, *until)
            estimate.x0 = torch.where(held, known, estimate.x0)
            estimate.eps = torch.where(held, noise, estimate.eps)
            return estimate

        latest = torch.tensor(process.schedule.latest, dtype=torch.float64)
        return filled, torch.where(held, process.add_noise(known, latest, noise), start)

    return wrap


def counting(tell: Callable[[int], None]) -> Wrap:
    """Tells, after each evaluation of the denoiser, how many there have been in this batch."""

    def wrap(denoise: Denoiser, start: Tensor) -> tuple[Denoiser, Tensor]:
        done = 0

        def counted(x_t: Tensor, t: Tensor, *until: Tensor) -> Estimate:
            nonlocal done
            estimate = denoise(x_t, t, *until)
            done += 1
            tell(done)
            return estimate

        return counted, start

    return wrap


def wholly_kept(held: Tensor, side: int) -> Tensor:
    """bool [1, 1, H, W] in pixels -> [1, 1, side, side]: places all of whose pixels are kept."""
    return F.adaptive_avg_pool2d(held.float(), side) > 1 - 1e-6


class Trajectory:
    """Remembers the x0 predictions of a sampling; `wrap` goes to `Model.batches`."""

    def __init__(self) -> None:
        self.x0: list[Tensor] = []

    def wrap(self, denoise: Denoiser, start: Tensor) -> tuple[Denoiser, Tensor]:
        def watched(x_t: Tensor, t: Tensor, *until: Tensor) -> Estimate:
            prediction = denoise(x_t, t, *until)
            self.x0.append(prediction.x0)
            return prediction

        return watched, start

    def pick(self, columns: int) -> list[Tensor]:
        """So many of them, evenly from the first to the last."""
        last = len(self.x0) - 1
        return [
            self.x0[round(i * last / max(columns - 1, 1))]
            for i in range(min(columns, len(self.x0)))
        ]


def slerp(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Noises from a to b [C, H, W] along the great circle, which keeps their norm: [steps, C, H,
    W].
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1, 1).acos()
    w = torch.linspace(0, 1, steps, device=a.device).view(-1, 1, 1, 1)
    if angle < 1e-4:
        return a + w * (b - a)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)
