"""Training losses: a network and one clean batch into named scalars, of which `loss` is minimised.

An objective is one or two passes over the same images and times: `dsm` sees all tokens, `msm` the
visible ones (Lei et al. 2023), `mdt` all and then a masked set (Gao et al. 2023), `edt` all and
then all behind EDT's token masks (Chen et al. 2024).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msmdiff.core.backbones.layers import gather_tokens, patchify
from msmdiff.core.config import MaskConfig, ObjectiveConfig
from msmdiff.core.diffusion import hybrid
from msmdiff.core.diffusion.masking import Mask, mdt_kept
from msmdiff.core.diffusion.process import Process
from msmdiff.core.diffusion.time_sampling import LossSecondMoment

Draw = Callable[..., torch.Generator]
"""(purpose[, device]) -> the generator for this batch, on the given device or the batch's own."""

Keep = Callable[[int, Draw], Any]
"""(batch size, draw) -> what a pass hides, in the form its network takes; None for nothing."""


class Objective:
    """The loss of one or two passes, each with noise, label dropout and mask of its own.

    Args:
        process: the noise.
        passes: name -> what it hides; a single pass is named "".
        config: distance, label dropout, how the variational bound counts.
        patch_size: side of the network's patches.
        null: what stands for no label: a class, or the features of an empty text [tokens, width];
            None where the network takes no labels.
        history: draws times by their past losses; None where the process draws them.
    """

    def __init__(
        self,
        process: Process,
        passes: dict[str, Keep],
        config: ObjectiveConfig,
        patch_size: int,
        null: int | Tensor | None,
        history: LossSecondMoment | None = None,
    ) -> None:
        self.process, self.passes, self.config, self.patch_size = (
            process,
            passes,
            config,
            patch_size,
        )
        self.null, self.history = null, history
        self.distance = torch.abs if config.loss == "l1" else torch.square

    def __call__(
        self, model: Callable[..., Tensor], x0: Tensor, y: Tensor | None, draw: Draw
    ) -> dict[str, Tensor]:
        """x0 [B, C, H, W] and labels y [B] or None -> scalars: `loss`, each pass's terms, and the
        `mask_ratio` drawn.

        Hidden pixels never reach a network that drops tokens.
        """
        if self.history is not None:
            t, importance = (
                v.to(x0.device) for v in self.history.draw(len(x0), draw("time", "cpu"))
            )
        else:
            t, importance = (
                self.process.sample_t(len(x0), draw("time")),
                torch.ones((), device=x0.device),
            )
        total = torch.zeros(len(x0), device=x0.device)
        named: dict[str, Tensor] = {}
        for i, (name, keep) in enumerate(self.passes.items()):

            def own(purpose: str, *device: str, i: int = i) -> torch.Generator:
                return draw(f"{purpose}-{i}" if i else purpose, *device)

            eps = torch.randn(x0.shape, generator=own("noise"), device=x0.device)
            kept = keep(len(x0), own)
            terms = self.terms(model, x0, eps, t, self._labels(y, own), kept)
            total = total + terms["loss"]
            if len(self.passes) > 1 or len(terms) > 2:
                named |= {
                    f"{name}_{k}" if name else k: (v * importance).mean() for k, v in terms.items()
                }
            if isinstance(kept, Tensor):
                share = kept.shape[1] * self.patch_size**2 / x0[0, 0].numel()
                named["mask_ratio"] = torch.full((), 1 - share, device=x0.device)
        if self.history is not None:
            self.history.update(t, total.detach())
        return {"loss": (total * importance).mean(), **named}

    def terms(
        self, model: Callable[..., Tensor], x0: Tensor, eps: Tensor, t: Tensor, y: Any, keep: Any
    ) -> Any:
        """`hybrid.terms` of each image, [B], for given noise eps [B, C, H, W], times t [B] and
        hidden tokens.

        Where the network answers with the patches of the kept tokens only, the loss is theirs
        alone.
        """
        output = model(self.process.add_noise(x0, t, eps), self.process.model_time(t), y, keep)
        if output.ndim == 3:
            x0, eps = (gather_tokens(patchify(z, self.patch_size), keep) for z in (x0, eps))
            x0, eps, output = (hybrid.channels_first(z, self.patch_size) for z in (x0, eps, output))
        options = (self.distance, self.config.variational, self.config.channel_groups)
        return hybrid.terms(self.process, output, x0, eps, t, *options)

    def _labels(self, y: Tensor | None, draw: Draw) -> Tensor | None:
        """y with a share of its rows replaced by the null label; None for a network without labels."""
        if y is None or self.null is None or not self.config.label_dropout:
            return None if self.null is None else y
        dropped = (
            torch.rand(len(y), generator=draw("label"), device=y.device) < self.config.label_dropout
        )
        return drop_labels(y, dropped, self.null)


def drop_labels(y: Tensor, dropped: Tensor, null: int | Tensor) -> Tensor:
    """Labels [B] or text features [B, tokens, width], with `null` in the rows where dropped [B] is
    true.
    """
    dropped = dropped.view(-1, *[1] * (y.ndim - 1))
    if isinstance(null, int):
        return y.masked_fill(dropped, null)
    return torch.where(dropped, null.to(y), y)


def build(
    config: ObjectiveConfig, masking: MaskConfig, process: Process, mask: Mask, network: Any
) -> Objective:
    """The objective that a resolved configuration asks for. `network` may lie on the meta device."""

    def nothing(batch: int, draw: Draw) -> None:
        return None

    def visible(batch: int, draw: Draw) -> Tensor | None:
        return mask.draw(batch, draw("mask"))

    def mdt(batch: int, draw: Draw) -> Tensor:
        extra = torch.rand((), generator=draw("ratio", "cpu")).item() if masking.spread else None
        kept = mdt_kept(mask.tokens, masking.ratio, extra, masking.spread or 0.0)
        generator = draw("mask")
        noise = torch.rand(batch, mask.tokens, generator=generator, device=generator.device)
        return noise.argsort(dim=1)[:, :kept]

    def edt(batch: int, draw: Draw) -> Any:
        return network.draw_masks(batch, draw("mask"))

    passes: dict[str, dict[str, Keep]] = {
        "dsm": {"": nothing},
        "msm": {"": visible},
        "mdt": {"plain": nothing, "masked": mdt},
        "edt": {"plain": nothing, "masked": edt},
    }
    history = (
        LossSecondMoment(process.timesteps)
        if process.time_sampling == "loss_second_moment"
        else None
    )
    null = network.num_classes or None
    return Objective(process, passes[config.name], config, network.patch_size, null, history)
