"""Training losses. An objective turns one clean batch into named scalars, of which `loss` is minimised."""

from collections.abc import Callable

import torch
from torch import Tensor

from msmdiff.core.backbones.layers import gather_tokens, patchify
from msmdiff.core.config import ObjectiveConfig
from msmdiff.core.diffusion import hybrid
from msmdiff.core.diffusion.masking import Mask
from msmdiff.core.diffusion.process import Process

Draw = Callable[[str], torch.Generator]
"""Purpose -> the generator for this batch, on its device."""


class ScoreMatching:
    """Denoising score matching, on all tokens (`dsm`) or on the visible ones only (`msm`, Lei et al. 2023).

    Args:
        process: the noise.
        mask: which tokens `msm` keeps; None for `dsm`.
        loss: `mse` or `l1`, averaged over what is predicted, then weighted by the process.
        patch_size: side of the network's patches.
        null_class: label that stands for no label; None for an unconditional network.
        label_dropout: probability that a label is replaced by the null class.
    """

    def __init__(
        self,
        process: Process,
        mask: Mask | None,
        loss: str,
        patch_size: int,
        null_class: int | None,
        label_dropout: float,
    ) -> None:
        self.process, self.mask, self.patch_size = process, mask, patch_size
        self.null_class, self.label_dropout = null_class, label_dropout
        self.distance = torch.abs if loss == "l1" else torch.square

    def __call__(self, model: Callable[..., Tensor], x0: Tensor, y: Tensor | None, draw: Draw) -> dict[str, Tensor]:
        """x0 [B, C, H, W] and labels y [B] or None -> {"loss": scalar}. Hidden pixels never reach the network."""
        t = self.process.sample_t(len(x0), draw("time"))
        eps = torch.randn(x0.shape, generator=draw("noise"), device=x0.device)
        if self.null_class is None:
            y = None
        elif y is not None:
            dropped = torch.rand(len(y), generator=draw("label"), device=y.device) < self.label_dropout
            y = y.masked_fill(dropped, self.null_class)
        keep = self.mask.draw(len(x0), draw("mask")) if self.mask is not None else None
        return {"loss": self.loss(model, x0, eps, t, y, keep)}

    def loss(
        self, model: Callable[..., Tensor], x0: Tensor, eps: Tensor, t: Tensor, y: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """The loss for given noise eps [B, C, H, W], times t [B] and kept tokens keep [B, K]."""
        output = model(self.process.add_noise(x0, t, eps), self.process.model_time(t), y, keep)
        target = self.process.target(x0, eps, t)
        if keep is not None:
            target = gather_tokens(patchify(target, self.patch_size), keep)
        if output.numel() == 2 * target.numel():
            return self._with_variance(output, x0, eps, t, keep)
        per_image = self.distance(output.float() - target).flatten(1).mean(1)
        return (self.process.weight(t) * per_image).mean()

    def _with_variance(self, output: Tensor, x0: Tensor, eps: Tensor, t: Tensor, keep: Tensor | None) -> Tensor:
        """The loss of a network that learns its variance too, on the visible pixels."""
        if keep is not None:
            x0, eps = (gather_tokens(patchify(z, self.patch_size), keep) for z in (x0, eps))
            x0, eps, output = (hybrid.channels_first(z, self.patch_size) for z in (x0, eps, output))
        return hybrid.terms(self.process, output, x0, eps, t, self.distance)["loss"].mean()


def build(config: ObjectiveConfig, process: Process, mask: Mask, patch_size: int, num_classes: int) -> ScoreMatching:
    """The objective a configuration asks for."""
    return ScoreMatching(
        process,
        mask if config.name == "msm" else None,
        config.loss,
        patch_size,
        num_classes or None,
        config.label_dropout,
    )
