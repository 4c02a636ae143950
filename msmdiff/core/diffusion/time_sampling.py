"""Drawing training times where the losses are large."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

RECORDED = 10
"""Losses remembered for each time."""

UNIFORM = 0.001
"""Share of the draws that stays uniform."""


class LossSecondMoment:
    """Importance sampling of times by sqrt(E[L_t^2]) over each time's last losses (Nichol &
    Dhariwal 2021, eq. 18).

    Uniform until every time has its ten losses. Lives on the CPU, where a draw costs nothing; its
    history belongs to a run's checkpoint.
    """

    def __init__(self, timesteps: int) -> None:
        self.losses = np.zeros((timesteps, RECORDED))
        self.counts = np.zeros(timesteps, dtype=np.int64)
        # Replaced in a training of several processes, which share one history.
        self.gather: Callable[[Tensor], Tensor] = lambda values: values

    def weights(self) -> np.ndarray:
        """What each time is drawn in proportion to, [T] float64; ones until the history is full."""
        if (self.counts < RECORDED).any():
            return np.ones(len(self.counts))
        moments = np.sqrt(np.mean(self.losses**2, axis=1))
        return moments / moments.sum() * (1 - UNIFORM) + UNIFORM / len(self.counts)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n times [n] in {1/T, ..., 1} and their importance weights 1 / (T p) [n], float32 on the
        CPU.
        """
        p = torch.from_numpy(self.weights())
        p = p / p.sum()
        k = torch.multinomial(p, n, replacement=True, generator=generator)
        return (k + 1).float() / len(p), (1 / (len(p) * p[k])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the losses [n] of the times t [n], of all processes, in order."""
        t, losses = self.gather(t), self.gather(losses)
        indices = (t * len(self.counts)).round().long().cpu() - 1
        for k, loss in zip(indices.tolist(), losses.double().cpu().tolist(), strict=True):
            if not math.isfinite(loss):
                continue  # its step is left out too, or stops the training
            if self.counts[k] == RECORDED:
                self.losses[k, :-1] = self.losses[k, 1:]
                self.losses[k, -1] = loss
            else:
                self.losses[k, self.counts[k]] = loss
                self.counts[k] += 1

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": torch.from_numpy(self.losses), "counts": torch.from_numpy(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.counts = state["losses"].numpy(), state["counts"].numpy()
