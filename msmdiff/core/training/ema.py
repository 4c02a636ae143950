"""Averages of the network's weights: exponential ones through ema-pytorch, and those of snapshots,
from which `posthoc` makes averages of other widths.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ema_pytorch import EMA
from torch import Tensor, nn

from msmdiff.core.sections import EmaConfig
from msmdiff.core.training import posthoc, sharding

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


class PowerAverage:
    """An average whose weights rise as a power of the step (Karras et al. 2024, eq. 121): after
    step t, average <- beta average + (1 - beta) weights with beta = (1 - 1/t)^(gamma + 1).
    """

    def __init__(self, module: nn.Module, width: float) -> None:
        self._online, self._power = module, posthoc.exponent(width) + 1
        self.network = copy.deepcopy(module).requires_grad_(False).eval()

    def update(self, step: int) -> None:
        """Take in the weights that follow so many steps."""
        fresh = float(-np.expm1(self._power * np.log1p(-1 / step))) if step > 1 else 1.0
        own: list[Tensor] = list(self.network.parameters())
        online: list[Tensor] = list(self._online.parameters())
        torch._foreach_lerp_(own, online, fresh)
        for mine, other in zip(self.network.buffers(), self._online.buffers(), strict=True):
            mine.copy_(other)


class Averages:
    """One average per decay, and per width of snapshots, updated together after every optimiser
    step.

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
        widths = config.widths if config.snapshots_every else []
        self._powers = {f"{width:g}": PowerAverage(module, width) for width in widths}
        self.updates = 0

    def update(self) -> None:
        """Take in the network's present weights."""
        self.updates += 1
        with torch.no_grad():
            for ema in self._emas.values():
                ema.update()
            for power in self._powers.values():
                power.update(self.updates)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The averaged networks by decay, in the configuration's order."""
        return {decay: ema.ema_model for decay, ema in self._emas.items()}

    @property
    def of_snapshots(self) -> dict[str, nn.Module]:
        """The averaged networks of snapshots by width; none where none are kept."""
        return {width: power.network for width, power in self._powers.items()}

    def copies(self) -> Iterator[nn.Module]:
        """All networks that are held beside the trained one."""
        yield from self.networks.values()
        yield from self.of_snapshots.values()

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the averaged weights."""
        own = {d: {"step": int(e.step), "initted": bool(e.initted)} for d, e in self._emas.items()}
        return {**own, "updates": self.updates}

    def state_dicts(self) -> dict[str, dict[str, Tensor]]:
        """The weights of all of them, by what a checkpoint calls them."""
        named = {f"ema-{decay}": network for decay, network in self.networks.items()}
        named |= {f"width-{width}": network for width, network in self.of_snapshots.items()}
        return {stem: network.state_dict() for stem, network in named.items()}

    def load(self, counters: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        """Restore counters, and weights as `state_dicts` names them."""
        for decay, ema in self._emas.items():
            ema.step.fill_(counters[decay]["step"])
            ema.initted.fill_(counters[decay]["initted"])
            sharding.load(ema.ema_model, tensors[f"ema-{decay}"])
        for width, network in self.of_snapshots.items():
            sharding.load(network, tensors[f"width-{width}"])
        self.updates = counters.get("updates", 0)  # which older checkpoints do not know
