"""MaskDiT's loss (Zheng et al. 2023): the error on kept patches, and a reconstruction of hidden
ones.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.backbones.layers import patchify
from msmdiff.core.backbones.routes import Route
from msmdiff.core.config import Config
from msmdiff.core.diffusion.objectives import DrawRoute, Objective, Setting
from msmdiff.core.diffusion.suiting import settle_route
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import AUTO


class MaskDitOptions(Options):
    reconstruction: float = Field(
        0.1,
        ge=0,
        description="The weight of the error on hidden patches, which is measured against the "
        "noisy image.",
    )


class Reconstructing(Objective):
    """The error on kept patches, and how well x0 tells the hidden patches of the noisy image."""

    reconstruction = 0.1

    def beside(
        self, x_t: Tensor, output: Tensor, t: Tensor, route: Route | None
    ) -> dict[str, Tensor]:
        """MaskDiT's second term (Zheng et al. 2023, eq. 6), [B]: squared error of x0 on hidden
        patches, against x_t's patches of mean 0 and variance 1.
        """
        if route is None or route.keep is None or not self.reconstruction:
            return {}
        x0 = patchify(self.process.split(output, x_t, t).x0, self.patch_size)  # [B, L, p*p*C]
        target = patchify(x_t, self.patch_size)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        error = (x0 - target).square().mean(dim=-1)  # [B, L]
        hidden = torch.ones_like(error).scatter(1, route.keep, 0.0)
        each = (error * hidden).sum(dim=1) / hidden.sum(dim=1)
        return {"reconstruction": self.reconstruction * each}


@register("objective", "maskdit", MaskDitOptions)
class MaskDit:
    """MaskDiT: the error on kept patches, and a reconstruction of the hidden ones; needs a network
    with model.sparse decoder.
    """

    def __init__(self, *, reconstruction: float) -> None:
        self.reconstruction = reconstruction
        if reconstruction:
            self.over = (
                f"the visible tokens, plus {reconstruction:g} x reconstruction of the others"
            )

    def settle(self, config: Config, backbone: Any) -> list[str]:
        if config.mask.route == AUTO:
            config.mask.route = "maskdit"
        return settle_route(config, backbone)

    def passes(self, setting: Setting) -> dict[str, DrawRoute]:
        return {"": setting.route(setting.section.route)}

    def loss(self, *arguments: Any, **options: Any) -> Objective:
        """What `build` makes for this objective."""
        made = Reconstructing(*arguments, **options)
        made.reconstruction = self.reconstruction
        return made
