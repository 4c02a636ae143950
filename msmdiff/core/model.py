"""A model: a trained network and the road around it, which images are drawn from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.backbones.routes import Route, Trunk, compile_blocks
from msmdiff.core.condition import Condition
from msmdiff.core.config import Config
from msmdiff.core.diffusion import routing
from msmdiff.core.diffusion.codecs import Codec
from msmdiff.core.diffusion.process import Denoiser, Estimate, Process
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.samplers import guidance
from msmdiff.core.samplers.editing import Wrap
from msmdiff.core.samplers.times import visited
from msmdiff.core.sections import SampleConfig
from msmdiff.core.seeding import SeedNoise, stream

DECODED_AT_ONCE = 32
"""Images per pass of the codec's decoder."""


@dataclass
class Images:
    """One finished batch: the seeds, uint8 images [B, 3, H, W] on the CPU, and the classes [B], or
    None where there are none.
    """

    seeds: list[int]
    images: Tensor
    labels: Tensor | None


@dataclass
class Model:
    """What samples are drawn from.

    Attributes:
        backbone: the network, in evaluation mode, on the device that it draws on.
        process, codec, condition: what its numbers mean.
        config: of which `sample` says how images are drawn.
        report: what the weights file says of itself.
        path: that file.
        guide: the weaker network of `sample.guide`.
    """

    backbone: Any
    process: Process
    codec: Codec
    condition: Condition
    config: Config
    report: dict[str, str] = field(default_factory=dict)
    path: Path = Path()
    guide: Any = None

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def draw(
        self,
        seeds: int | Sequence[int],
        classes: int | str | Sequence[int | str] | Tensor | None = None,
        *,
        batch_size: int = 64,
    ) -> Tensor:
        """The images of `seeds`: uint8 [N, 3, H, W] on the CPU; a seed is an image.

        Args:
            seeds: so many images, from seed 0 on, or the seeds themselves.
            classes: one class for all, by number or name, one for each seed, or the features of a
                text for each [N, tokens, width]; None draws the classes in turn, by the seeds.

        Raises UsageError for what are not seeds or not as many classes, and what `batches` raises.
        """
        seeds = checked_seeds(range(seeds) if isinstance(seeds, int) else seeds)
        if classes is None:
            y = self.condition.deal(None, seeds)
        else:
            wanted = [classes] * len(seeds) if isinstance(classes, int | str) else classes
            y = self.condition.values(wanted)
            if y is not None and len(y) != len(seeds):
                raise UsageError(
                    f"classes has {len(y)} values for {len(seeds)} seeds: give one for each, or "
                    "one number for all"
                )
        drawn = self.batches(seeds, y, batch_size=batch_size)
        return torch.cat([batch.images for batch in drawn])

    def pictures(
        self, seeds: int | Sequence[int], classes: Any = None, *, batch_size: int = 64
    ) -> list[Image.Image]:
        """The same as `draw`, as PIL images."""
        drawn = self.draw(seeds, classes, batch_size=batch_size)
        return [Image.fromarray(image.numpy()) for image in drawn.permute(0, 2, 3, 1).contiguous()]

    @torch.no_grad()
    def features(
        self,
        images: Tensor,
        classes: Any = None,
        *,
        time: float = 0.1,
        block: int | None = None,
    ) -> Tensor:
        """What a block of the network makes of images: hidden tokens [B, L, D] of the patches,
        without special tokens, on the CPU.

        Args:
            images: uint8 [B, 3, H, W] of the network's size.
            classes: one for all or each; None is the null.
            time: how noisy the images are made first, 0 not at all; the noise is by their place.
                The network is told at least the schedule's earliest time.
            block: its number, in the order of the network; None is the middle one.

        Raises UsageError for images of another size, and for a block that there is not.
        """
        side = self.config.data.image_size
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, side, side):
            raise UsageError(
                f"images are {images.dtype} {list(images.shape)}: give uint8 [B, 3, {side}, {side}]"
            )
        known = self._blocks()
        number = len(known) // 2 if block is None else block
        if not 0 <= number < len(known):
            raise UsageError(f"block {number}: this network's blocks are 0..{len(known) - 1}")
        wanted = [classes] * len(images) if isinstance(classes, int | str) else classes
        y = self.condition.values(wanted)
        self.codec.load(self.device)
        x0 = self.codec.encode(images.to(self.device), stream(self.device, 0, "features"))
        eps = SeedNoise(list(range(len(images))), self.codec.shape, self.device)()
        t = torch.full((len(images),), time, device=self.device)
        x_t = self.process.add_noise(x0, t, eps)
        told = t.clamp(min=self.process.schedule.earliest)  # before it some networks have no time
        with self._behind(number) as found:
            self.process.feed(self.backbone, x_t, told, None if y is None else y.to(self.device))
        return found[-1].float().cpu()

    @contextmanager
    def _behind(self, number: int) -> Iterator[list[Tensor]]:
        """Inside, a pass leaves the tokens [B, L, D] behind this block; outside they are there."""
        found: list[Tensor] = []
        trunk = getattr(self.backbone, "trunk", None)
        if isinstance(trunk, Trunk):
            with trunk.watching((number + 1,)) as hidden:
                yield found
                found += [hidden[number + 1].tokens]
            return

        def keep(block: Any, given: Any, made: Any) -> None:
            found.append(made[0] if isinstance(made, tuple) else made)

        hook = self._blocks()[number].register_forward_hook(keep)
        try:
            yield found
        finally:
            hook.remove()

    def _blocks(self) -> list[Any]:
        """The network's blocks in its order; of a plugin's network, what looks like them."""
        if hasattr(self.backbone, "trunk_blocks"):
            return list(self.backbone.trunk_blocks())
        return [m for m in self.backbone.modules() if hasattr(m, "attn") and hasattr(m, "mlp")]

    @torch.no_grad()
    def batches(
        self,
        seeds: Sequence[int],
        y: Tensor | None = None,
        *,
        batch_size: int = 64,
        start: Tensor | None = None,
        wraps: Sequence[Wrap] = (),
    ) -> Iterator[Images]:
        """Yield the images of `seeds` in batches; a seed gives one image whatever its batch.

        Args:
            y: what the network is told, a row for each seed; None is the null.
            batch_size: images per network pass; with `sample.compile` the last batch is filled up
                to it.
            start: initial noise [N, C, H, W] in place of the seeds' own.
            wraps: change the denoiser of each batch, see `editing`.

        Raises UsageError for guidance that the network has no use for, or times that the process
        has not, and MsmdiffError for images that are not finite.
        """
        options, device, schedule = self.config.sample, self.device, self.process.schedule
        y = self.condition.values(y)
        self._check_guidance()
        self.codec.load(device)  # before the first step: what decodes the last one may be missing
        times = visited(schedule, options)
        entry = registry.find("sampler", options.sampler, "sample.sampler")
        if options.compile:
            compile_blocks(self.backbone, dynamic=False)
        for first in range(0, len(seeds), batch_size):
            rows = list(range(first, min(first + batch_size, len(seeds))))
            count = len(rows)
            if options.compile:  # one shape: anything else would be compiled anew
                rows += rows[-1:] * (batch_size - count)
            told = None if y is None else y[rows].to(device)
            noise = SeedNoise([seeds[i] for i in rows], self.codec.shape, device)
            x = noise()  # always drawn: the steps' noise comes after it
            x = x if start is None else start[rows].to(device)
            if schedule.start_std != 1:
                x = x * schedule.start_std
            weak = routing.weak_route(options, self.config.mask, self.backbone, noise)
            denoise = self.denoiser(told, weak)
            for wrap in wraps:
                denoise, x = wrap(denoise, x)
            half = options.precision == "bf16"
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                z = entry.make(denoise, schedule, x, times, noise, **entry.takes(options))
            if getattr(z, "shape", None) != x.shape:
                gave = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise MsmdiffError(
                    f"the sampler {entry.name} gave {gave}, not images of the noise's shape "
                    f"{list(x.shape)}"
                )
            z = z[:count]
            labels = told[:count].cpu() if told is not None and self.condition.count else None
            yield Images([seeds[i] for i in rows[:count]], self._decoded(z), labels)

    def denoiser(
        self,
        y: Tensor | None,
        weak: Callable[[], Route] | None = None,
    ) -> Denoiser:
        """(x_t [B, C, H, W], t) -> x0 and eps, guided and clipped as `sample` says; `weak` as
        `routing.weak_route` gives it.

        t is one number on the CPU for the whole batch, which lets steps without guidance do without
        its second pass, or [B] on x_t's device; a third argument, like t, is the time that a step
        goes to, for the average velocity down to it. After clipping, eps is derived again from the
        clipped x0 (as ADM does), or left as the network gave it (`raw`, as MaskDM does).
        """
        options, process = self.config.sample, self.process
        strength = guidance.schedule(options, process.schedule)
        channels = 3 if options.cfg_channels == "first3" else None

        def denoise(x_t: Tensor, t: Tensor, until: Tensor | None = None) -> Estimate:
            at = strength(t)
            scale = at.item() if t.ndim == 0 else at
            if options.cfg_scale == 1:  # one pass, also where the network has no null to ask
                scale = 1.0
            guided = guidance.Guided(
                network=self.backbone,
                condition=self.condition,
                scale=scale,
                channels=channels,
                guide=self.guide,
                weak=weak,
            )
            output = process.feed(guided, x_t, t, y, until=until)
            estimate = process.split(output.float(), x_t, t)
            return self._clipped(estimate, x_t, t, options)

        return denoise

    def _clipped(
        self, estimate: Estimate, x_t: Tensor, t: Tensor, options: SampleConfig
    ) -> Estimate:
        if options.threshold is not None:
            estimate.x0 = dynamic_threshold(estimate.x0, options.threshold)
        elif options.clip:
            estimate.x0 = self.codec.clip(estimate.x0)
        else:
            return estimate
        if options.eps_after_clip == "derived":
            estimate.eps = self.process.eps_from_x0(estimate.x0, x_t, t)
        return estimate

    def _check_guidance(self) -> None:
        options = self.config.sample
        if options.cfg_scale == 1 or self.guide is not None or options.cfg_against == "route":
            return
        if not self.condition.guidable:
            raise UsageError(self.condition.why_not_guided)

    def _decoded(self, z: Tensor) -> Tensor:
        if not z.isfinite().all():
            raise MsmdiffError(
                "sampling gave numbers that are not finite: try more steps, sample.clip, or fp32"
            )
        rounding = self.config.sample.rounding
        parts = [self.codec.decode(part, rounding).cpu() for part in z.split(DECODED_AT_ONCE)]
        return torch.cat(parts)


def checked_seeds(seeds: Sequence[int]) -> list[int]:
    """Seeds as plain integers. Raises UsageError for what are none."""
    example = "give whole numbers of 0 or more, such as range(16) or [3]"
    if not isinstance(seeds, Iterable):
        raise UsageError(f"seeds {seeds!r}: {example}")
    checked = []
    for seed in seeds:
        if not hasattr(seed, "__index__") or isinstance(seed, bool) or int(seed) < 0:
            raise UsageError(f"seeds: {seed!r} is no seed: {example}")
        checked.append(int(seed))
    if not checked:
        raise UsageError(f"seeds: there are none: {example}")
    return checked


def dynamic_threshold(x0: Tensor, quantile: float) -> Tensor:
    """Clip each image [B, ...] at this quantile of its absolute values, and scale that to 1
    (Saharia et al. 2022).
    """
    size = x0.abs().flatten(1)
    place = max(1, round(quantile * size.shape[1]))
    bound = size.kthvalue(place, dim=1).values.clamp(min=1)
    bound = bound.view(-1, *[1] * (x0.ndim - 1))
    return torch.maximum(torch.minimum(x0, bound), -bound) / bound
