"""Generation: seeds and labels in, images out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msmdiff.core.config import SampleConfig
from msmdiff.core.diffusion.codecs import Codec
from msmdiff.core.diffusion.process import Denoiser, Prediction, Process
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.samplers import SAMPLERS, guidance
from msmdiff.core.samplers.editing import Wrap
from msmdiff.core.samplers.times import visited
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
    null: int | Tensor = 0,
    guide: Callable[..., Tensor] | None = None,
) -> Denoiser:
    """Wrap a network as (x_t [B, C, H, W], t) -> Prediction, with guidance and clipping of x0.

    t is one number on the CPU for the whole batch, which lets steps without guidance do without its
    second pass, or [B] on x_t's device. After clipping, eps is derived again from the clipped x0
    (as ADM does), or left as the network gave it (`raw`, as MaskDM does), by
    `options.eps_after_clip`.
    """
    strength = guidance.schedule(options, process)
    channels = 3 if options.cfg_channels == "first3" else None

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        time, scale = process.model_time(t), strength(t)
        if t.ndim == 0:
            time = torch.full((len(x_t),), time.item(), device=x_t.device)
        output = guidance.combine(
            backbone, x_t, time, y, null, scale.item() if t.ndim == 0 else scale, channels, guide
        )
        prediction = process.split(output.float(), x_t, t)
        if options.threshold is not None or options.clip:
            x0 = prediction.x0
            prediction.x0 = (
                codec.clip(x0)
                if options.threshold is None
                else dynamic_threshold(x0, options.threshold)
            )
            if options.eps_after_clip == "derived":
                prediction.eps = process.eps_from_x0(prediction.x0, x_t, t)
        return prediction

    return denoise


def dynamic_threshold(x0: Tensor, quantile: float) -> Tensor:
    """Clip each image [B, ...] at this quantile of its absolute values, and scale that to 1
    (Saharia et al. 2022).
    """
    size = x0.abs().flatten(1)
    bound = size.kthvalue(max(1, round(quantile * size.shape[1])), dim=1).values.clamp(min=1)
    bound = bound.view(-1, *[1] * (x0.ndim - 1))
    return torch.maximum(torch.minimum(x0, bound), -bound) / bound


@torch.no_grad()
def generate(
    backbone: Callable[..., Tensor],
    process: Process,
    codec: Codec,
    options: SampleConfig,
    seeds: Sequence[int],
    labels: Sequence[int] | Tensor | None = None,
    *,
    num_classes: int = 0,
    null: int | Tensor | None = None,
    guide: Callable[..., Tensor] | None = None,
    batch_size: int = 64,
    decode_batch: int = 32,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    wraps: Sequence[Wrap] = (),
) -> Iterator[Images]:
    """Yield the images of `seeds` in batches; a seed gives one image whatever the batch it is in.

    Args:
        backbone, process, codec: from `weights.load`, on `device`.
        options: the `sample` section.
        seeds: one image each.
        labels: a class per seed, the features of a text per seed (float [N, tokens, width]), or
            None for the null.
        num_classes: the network's classes, 0 for an unconditional one or one that draws from text.
        null: the null class (by default num_classes), or the features of the empty text [tokens,
            width], which guidance of text needs.
        guide: a weaker network for autoguidance.
        batch_size: images per network pass; with `options.compile` the last batch is filled up to
            it.
        decode_batch: images per pass of the codec's decoder.
        start: initial noise [N, C, H, W] in place of the seeds' own.
        wraps: change the denoiser of each batch, see `editing`.

    Raises UsageError for guidance or labels that the network has no use for, or times that the
    process has not, and MsmdiffError for images that are not finite.
    """
    text = isinstance(labels, Tensor) and labels.is_floating_point()
    if text and null is None and guide is None and options.cfg_scale != 1:
        raise UsageError("guidance of text needs the features of the empty text")
    if (
        not text
        and not num_classes
        and (labels is not None or (options.cfg_scale != 1 and guide is None))
    ):
        raise UsageError("this network is unconditional: it takes no classes and no cfg scale")
    if options.cfg_scale != 1 and guide is None and not getattr(backbone, "null_class", True):
        raise UsageError(
            "this network has no null class to guide away from: set the scale to 1, or "
            "give a --guide"
        )
    if labels is not None and not text and not all(0 <= label < num_classes for label in labels):
        raise UsageError(f"classes must lie in 0..{num_classes - 1}")
    times = visited(process, options)
    sampler, device = SAMPLERS[options.sampler], torch.device(device)
    if options.compile:
        backbone = torch.compile(backbone, dynamic=False)
    for first in range(0, len(seeds), batch_size):
        rows = list(range(first, min(first + batch_size, len(seeds))))
        count = len(rows)
        if options.compile:  # one shape: anything else would be compiled anew
            rows += rows[-1:] * (batch_size - count)
        y = None if labels is None else torch.as_tensor(labels)[rows].to(device)
        y = y.float() if text and y is not None else y
        noise = SeedNoise([seeds[i] for i in rows], codec.shape, device)
        x = noise()  # always drawn: the steps' noise comes after it
        x = x if start is None else start[rows].to(device)
        empty = null if null is not None else num_classes
        denoise = denoiser(backbone, process, codec, options, y, empty, guide)
        for wrap in wraps:
            denoise, x = wrap(denoise, x)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
            z = sampler(denoise, process, x, times, noise, options)[:count]
        if not z.isfinite().all():
            raise MsmdiffError(
                "sampling gave numbers that are not finite: try more steps, sample.clip, or fp32"
            )
        images = torch.cat(
            [codec.decode(part, options.rounding).cpu() for part in z.split(decode_batch)]
        )
        yield Images(
            [seeds[i] for i in rows[:count]], images, None if y is None or text else y[:count].cpu()
        )
