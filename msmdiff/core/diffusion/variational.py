"""The loss of networks that learn their variance: squared error plus variational bound (Nichol &
Dhariwal 2021).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from msmdiff.core.diffusion.predictions import Estimate
from msmdiff.core.diffusion.process import Process
from msmdiff.core.diffusion.schedules import Table


def terms(
    process: Process,
    output: Tensor,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    distance: Callable[[Tensor], Tensor] = torch.square,
    variational: Literal["hybrid", "rescaled", "kl"] = "hybrid",
    channel_groups: list[int] | None = None,
) -> dict[str, Tensor]:
    """The loss of each image: `mse` (weighted by the process), `vb` where the output has 2C
    channels, their sum `loss`.

    output [B, C or 2C, ...] is the network's at x_t = alpha x0 + sigma eps [B, C, ...], t [B];
    every term is [B]. The variational bound trains the variance only: the predicted mean enters it
    detached. It counts once (`hybrid`), T / 1000 times (`rescaled`), or alone and T times, then for
    the mean too (`kl`). The errors of `channel_groups` (numbers of channels, in order) are averaged
    within each group and added.
    """
    output, channels = output.float(), x0.shape[1]
    error = distance(output[:, :channels] - process.target(x0, eps, t))
    groups = error.split(channel_groups or channels, dim=1)
    mse = process.weight(t) * sum(group.flatten(1).mean(1) for group in groups)
    if output.shape[1] == channels:
        return {"mse": mse, "loss": mse}
    table = process.table("a learned variance")
    x_t = process.add_noise(x0, t, eps)
    if variational == "kl":
        vb = variational_bound(table, process.split(output, x_t, t), x0, x_t, t) * table.timesteps
        return {"vb": vb, "loss": vb}
    frozen = torch.cat([output[:, :channels].detach(), output[:, channels:]], dim=1)
    vb = variational_bound(table, process.split(frozen, x_t, t), x0, x_t, t)
    if variational == "rescaled":
        vb = vb * (table.timesteps / 1000)
    return {"mse": mse, "vb": vb, "loss": mse + vb}


def channels_first(tokens: Tensor, patch: int) -> Tensor:
    """Patch vectors [B, K, p*p*C] -> their pixels in one row, [B, C, K*p*p], for `terms` on visible
    tokens.
    """
    return tokens.unflatten(-1, (patch**2, -1)).flatten(1, 2).transpose(1, 2)


def variational_bound(
    table: Table, prediction: Estimate, x0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)) of the training step before t, in bits per dimension,
    [B].

    At the first step it is instead the negative log-likelihood of x0 on its 8-bit grid.
    """
    assert prediction.log_variance is not None
    low = table.log_variance_bounds(t)[0].to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1))
    mean = table.posterior_mean(prediction.x0, x_t, t)
    gap = table.posterior_mean(x0, x_t, t) - mean
    log_variance = prediction.log_variance
    kl = log_variance - low + torch.exp(low - log_variance) - 1
    kl = (kl + gap.square() * torch.exp(-log_variance)) / 2
    first = (table.index(t) <= 1).view(-1, *[1] * (x_t.ndim - 1))
    nats = torch.where(first, -discretised_log_likelihood(x0, mean, log_variance / 2), kl)
    return nats.flatten(1).mean(1) / math.log(2)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of x in -1..1, on bins of 2/255, under a Gaussian; the outermost bins reach
    to infinity.
    """
    centred, inverse = x - mean, torch.exp(-log_std)
    below = _normal_cdf(inverse * (centred - 1 / 255))
    above = _normal_cdf(inverse * (centred + 1 / 255))
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """The tanh approximation that the published losses contain."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
