"""Exponential moving averages of the network's weights, through ema-pytorch."""

from typing import Any

import numpy as np
import torch
from ema_pytorch import EMA
from torch import Tensor, nn

from msmdiff.core.sections import EmaConfig
from msmdiff.core.training import sharding

# ema-pytorch's ramp 1 - (1 + k)^-power with this power is the full decay from the first step on.
_NO_RAMP = 64.0


def progress(config: EmaConfig, decay: float, steps: int) -> tuple[int, float]:
    """How far an average has come after so many steps of training.

    Returns the step whose weights it was a plain copy of last (0: those before training), and which
    share of it came in since.
    """
    every = config.update_every
    if config.warmup == "constant":
        return 0, 1 - decay ** (steps // every)
    updates = np.arange(0, steps, every)  # by the steps before them; those of the ramp are copies
    ramp = updates[updates > config.update_after_step] - config.update_after_step
    kept = np.minimum(1 - (1.0 + ramp) ** -config.power, decay)
    copied = int(updates[: len(updates) - len(ramp)].max(initial=0)) + 1
    return copied, 1 - float(kept.prod())


class Averages:
    """One average per decay, updated together after every optimiser step.

    Args:
        module: the unwrapped network; its present weights are where the averages start.
        config: the `ema` section.
    """

    def __init__(self, module: nn.Module, config: EmaConfig) -> None:
        constant = config.warmup == "constant"
        self._emas: dict[str, EMA] = {}
        for decay in config.decays:
            ema = EMA(
                module,
                beta=decay,
                update_every=config.update_every,
                update_after_step=0 if constant else config.update_after_step,
                power=_NO_RAMP if constant else config.power,
                use_foreach=True,
                include_online_model=False,
            )
            if (
                constant
            ):  # ema-pytorch would otherwise copy the weights once more after the first step
                ema.initted.fill_(True)
                ema.step.fill_(1)
            ema.ema_model.eval()
            self._emas[f"{decay:g}"] = ema

    def update(self) -> None:
        """Take in the network's present weights."""
        with torch.no_grad():
            for ema in self._emas.values():
                ema.update()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The averaged networks by decay, in the configuration's order."""
        return {decay: ema.ema_model for decay, ema in self._emas.items()}

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the averaged weights."""
        return {d: {"step": int(e.step), "initted": bool(e.initted)} for d, e in self._emas.items()}

    def load(self, counters: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        """Restore counters and weights, both by decay."""
        for decay, ema in self._emas.items():
            ema.step.fill_(counters[decay]["step"])
            ema.initted.fill_(counters[decay]["initted"])
            sharding.load(ema.ema_model, tensors[decay])
