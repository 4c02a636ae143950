"""Pictures of a run in progress: samples from fixed noise, and what a masked model sees."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msmdiff.core.backbones.layers import gather_tokens, patchify, unpatchify
from msmdiff.core.build import Parts
from msmdiff.core.config import Config
from msmdiff.core.data.images import grid
from msmdiff.core.samplers.generate import generate
from msmdiff.core.seeding import stream


def to_hwc(images: Tensor) -> np.ndarray:
    """uint8 [N, 3, H, W] -> NumPy [N, H, W, 3]."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def samples(network: Any, parts: Parts, config: Config, device: torch.device, count: int = 40) -> Image.Image:
    """A grid of `count` samples from seeds 0, 1, ...; a conditional network shows its classes in turn, by columns."""
    classes = network.num_classes
    columns = min(classes, 10) if classes else 8
    labels = [i % classes for i in range(count)] if classes else None
    options = config.sample.model_copy(update={"steps": min(config.sample.steps, 50)})
    drawn = generate(
        network, parts.process, parts.codec, options, range(count), labels, num_classes=classes, device=device
    )
    return grid(to_hwc(torch.cat([batch.images for batch in drawn])), columns)


@torch.no_grad()
def masked_view(network: Any, parts: Parts, images: Tensor, seed: int, device: torch.device) -> Image.Image:
    """One column per image: the image, its visible part, that part noised, and the x0 predicted there.

    images is uint8 [N, 3, H, W]. The noise is that of t = 0.5.
    """
    x0 = parts.codec.encode(images.to(device), stream(device, seed, "preview-codec"))
    keep = parts.mask.draw(len(x0), stream(device, seed, "preview-mask"))
    if keep is None:
        keep = torch.arange(parts.mask.tokens, device=device).expand(len(x0), -1)
    t = torch.full((len(x0),), 0.5, device=device)
    eps = torch.randn(x0.shape, generator=stream(device, seed, "preview-noise"), device=device)
    x_t = parts.process.add_noise(x0, t, eps)
    patch = network.patch_size
    output = network(x_t, parts.process.model_time(t), None, keep).float()

    def visible(tokens: Tensor) -> Tensor:
        """Kept tokens [N, K, D] -> their image, mid-grey (zero) elsewhere."""
        canvas = tokens.new_zeros(len(tokens), parts.mask.tokens, tokens.shape[-1])
        canvas = canvas.scatter(1, keep.unsqueeze(-1).expand_as(tokens), tokens)
        return parts.codec.decode(unpatchify(canvas, patch, network.grid))

    noised = gather_tokens(patchify(x_t, patch), keep)
    predicted = parts.process.split(output, noised, t).x0
    rows = [
        parts.codec.decode(x0),
        visible(gather_tokens(patchify(x0, patch), keep)),
        visible(noised),
        visible(predicted),
    ]
    return grid(to_hwc(torch.cat(rows)), columns=len(x0))
