"""Generation: seeds and labels in, images out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msmdiff.core.config import SampleConfig
from msmdiff.core.diffusion.codecs import Codec
from msmdiff.core.diffusion.process import Prediction, Process
from msmdiff.core.errors import UsageError
from msmdiff.core.samplers import SAMPLERS, guidance
from msmdiff.core.samplers.times import GRIDS
from msmdiff.core.seeding import SeedNoise


@dataclass
class Images:
    """One finished batch: the seeds, uint8 images [B, 3, H, W] on the CPU, and labels [B] or None."""

    seeds: list[int]
    images: Tensor
    labels: Tensor | None


def denoiser(
    backbone: Callable[..., Tensor],
    process: Process,
    codec: Codec,
    options: SampleConfig,
    y: Tensor | None,
    null_class: int = 0,
) -> Callable[[Tensor, Tensor], Prediction]:
    """Wrap a network as (x_t, t) -> Prediction, with guidance and clipping of x0.

    After clipping, eps is derived again from the clipped x0 (as ADM does), or left as the network gave it (`raw`, as
    MaskDM does), by `options.eps_after_clip`.
    """
    scale: float | guidance.Strength = options.cfg_scale
    if options.cfg_power is not None and options.cfg_scale != 1:
        scale = guidance.power_cosine(options.cfg_scale, options.cfg_power, process.timesteps)
    channels = 3 if options.cfg_channels == "first3" else None
    network = guidance.classifier_free(backbone, null_class, scale, channels)

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = process.split(network(x_t, process.model_time(t), y).float(), x_t, t)
        if options.clip:
            prediction.x0 = codec.clip(prediction.x0)
            if options.eps_after_clip == "derived":
                prediction.eps = process.eps_from_x0(prediction.x0, x_t, t)
        return prediction

    return denoise


@torch.no_grad()
def generate(
    backbone: Callable[..., Tensor],
    process: Process,
    codec: Codec,
    options: SampleConfig,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    num_classes: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> Iterator[Images]:
    """Yield the images of `seeds` in batches; a seed gives one image whatever the batch it is in.

    Args:
        backbone, process, codec: from `weights.load`, on `device`.
        options: the `sample` section.
        seeds: one image each.
        labels: a class per seed, or None for the null class.
        num_classes: the network's classes, 0 for an unconditional one.
        batch_size: images per network pass.
        autocast: dtype the network runs in, or None for float32.

    Raises UsageError for guidance or labels that the network has no use for, or too many steps.
    """
    if not num_classes and (labels is not None or options.cfg_scale != 1):
        raise UsageError("this network is unconditional: it takes no classes and no cfg scale")
    if labels is not None and not all(0 <= label < num_classes for label in labels):
        raise UsageError(f"classes must lie in 0..{num_classes - 1}")
    times = GRIDS[options.grid](process.timesteps, options.steps)
    sampler, kind = SAMPLERS[options.sampler], torch.device(device).type
    for start in range(0, len(seeds), batch_size):
        chunk = list(seeds[start : start + batch_size])
        y = None if labels is None else torch.tensor(labels[start : start + batch_size], device=device)
        noise = SeedNoise(chunk, codec.shape, device)
        with torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
            z = sampler(
                denoiser(backbone, process, codec, options, y, num_classes), process, noise(), times, noise, options
            )
        yield Images(chunk, codec.decode(z).cpu(), None if y is None else y.cpu())
