"""Held-out loss by noise level: how well a network in training denoises images it never sees.

Images, noise levels and noise are the same at every measurement and in every run, and no token is
hidden. The error is that of eps-hat, whatever the network predicts and whatever it is trained with:
|eps - eps_hat|^2, averaged over numbers. Noise levels lie evenly in log-SNR, which means the same
in every schedule. The mean over log-SNR is then the variational bound of continuous time (Kingma et
al. 2021, "Variational diffusion models"), up to a factor and the levels beyond the bins. Only
losses in the same space (codec, image size) compare.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from msmdiff.core.build import Parts
from msmdiff.core.condition import Classes, Condition, Text
from msmdiff.core.config import Config
from msmdiff.core.data import checking, halves
from msmdiff.core.data.latents import Latents
from msmdiff.core.data.loader import center_crops, flip
from msmdiff.core.data.source import Source
from msmdiff.core.diffusion.process import Process
from msmdiff.core.diffusion.schedules import Schedule
from msmdiff.core.errors import UsageError
from msmdiff.core.sections import DataConfig
from msmdiff.core.seeding import numpy_stream, stream
from msmdiff.core.training import launch

EDGES = (-5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0)
"""Ends of the bins in log-SNR, log(alpha^2 / sigma^2): from nearly pure noise to a nearly clean
image. Every published schedule reaches them all."""

SEED = 0
"""Of the choice of images and of the noise: one for all runs, so that their losses compare."""

BATCH = 32
"""Images per network pass."""


# ------------------------------------------------------------------ the images


@dataclass
class HeldOut:
    """What is looked at.

    Attributes:
        name: the source and the number of images, which stand in the log.
        images: what a codec's `encode` takes, [N, ...].
        y: what the network is told of each, or None.
    """

    name: str
    images: Tensor
    y: Tensor | None


def source_of(config: Config) -> str | None:
    """Where held-out images come from: `eval.heldout`, or the other half of `SOURCE:train`; None:
    nowhere.

    Raises UsageError for images that are among the training's.
    """
    wanted, trained = config.eval.heldout, config.data.source
    if wanted is None:
        part = halves.named(trained)
        return f"{part[0]}:test" if part and part[1] == "train" else None
    if halves.overlap(wanted, trained):
        raise UsageError(
            f"eval.heldout {wanted}: the training on {trained} sees these images: name others"
        )
    return wanted


def opened_alike(config: Config, spec: str) -> DataConfig:
    """The `data` section that opens other images as a training opens its own: the same classes, and
    all of their images, on the same ground; of the same kind where it is the other half.
    """
    data, known = config.data, DataConfig.model_fields
    changes: dict[str, Any] = {"source": spec, "crop": "center", "share": 1.0}
    if halves.whole(spec) != halves.whole(data.source):
        changes["kind"] = known["kind"].default
        own = {key: field for key, field in type(data).model_fields.items() if key not in known}
        changes |= {key: field.default for key, field in own.items()}
    return data.model_copy(update=changes)


def open_images(
    config: Config, condition: Condition, trained: Source, note: Callable[[str], None]
) -> HeldOut | None:
    """The held-out images of a training, cropped in the centre; None where there are none.

    Args:
        condition: which of classes and captions the network is told.
        trained: the training's own images, whose classes count.
        note: told of images that are left out.

    Raises UsageError or MsmdiffError for images that cannot be read or do not fit.
    """
    spec = source_of(config)
    if spec is None:
        return None
    data = opened_alike(config, spec)
    source = checking.checked(checking.opened(data, note), data, note, launch.from_first)
    source.check(config)
    order = numpy_stream(SEED, "heldout").permutation(len(source))[: config.eval.heldout_n]
    y: Tensor | None
    if isinstance(source, Latents):
        images, y = source.gather(order)
        images = flip(images, None)
    else:
        images = center_crops(source, order, data.image_size)
        y = None if source.labels is None else torch.from_numpy(source.labels[order])
    if isinstance(condition, Text):
        assert isinstance(source, Latents)  # `check` refused others: only packed sets have captions
        y = source.context(order, numpy_stream(SEED, "heldout-caption"))
    elif isinstance(condition, Classes):
        y = _classes(y, source, trained, condition)
    else:
        y = None
    return HeldOut(f"{spec}, {len(images)} images", images, y)


def _classes(y: Tensor | None, source: Source, trained: Source, condition: Classes) -> Tensor:
    """Classes by their names: the training's index of each."""
    if y is None:
        raise UsageError(
            f"eval.heldout {source.spec} has no classes, which the network is told: name images "
            "with classes, laid out as the training's"
        )
    names, known = list(source.class_names), list(trained.class_names)
    if names and known:
        if strange := [names[i] for i in y.unique().tolist() if names[i] not in known]:
            raise UsageError(
                f"eval.heldout {source.spec} has the class {strange[0]}, which {trained.spec} "
                "has not"
            )
        index = torch.tensor([known.index(name) if name in known else -1 for name in names])
        y = index[y]
    if int(y.max()) >= condition.count:
        raise UsageError(
            f"eval.heldout {source.spec} has class {int(y.max())}, but model.num_classes is "
            f"{condition.count}"
        )
    return y


# ------------------------------------------------------------------ the loss


def bins(schedule: Schedule) -> list[int]:
    """The numbers of the bins that a schedule reaches from end to end."""
    ends = torch.tensor([schedule.latest, schedule.earliest], dtype=torch.float64)
    low, high = schedule.log_snr(ends).tolist()
    edges = enumerate(pairwise(EDGES))
    return [number for number, (a, b) in edges if low <= a and b <= high]


def times(schedule: Schedule, number: int, count: int) -> Tensor:
    """`count` times whose log-SNRs lie evenly in a bin, float64 on the CPU."""
    low, high = EDGES[number], EDGES[number + 1]
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return schedule.time_at(low + (high - low) * places)


def noise_of(number: int, images: range, shape: tuple[int, ...]) -> Tensor:
    """The noise of images in a bin, [len(images), *shape]: each by its own place, on the CPU, so
    that it is the same in any batch and on any device.
    """
    streams = (stream("cpu", SEED, "heldout-noise", number, i) for i in images)
    return torch.stack([torch.randn(shape, generator=each) for each in streams])


@torch.no_grad()
def errors(
    network: Callable[..., Tensor],
    process: Process,
    x0: Tensor,
    y: Tensor | None,
    number: int,
    images: range,
    count: int,
) -> Tensor:
    """Mean squared error of eps-hat in one bin of each of `images` (their places among `count`),
    [B], for x0 [B, C, H, W] and what the network is told of them.
    """
    t = times(process.schedule, number, count)[images.start : images.stop].to(x0.device)
    eps = noise_of(number, images, tuple(x0.shape[1:])).to(x0.device)
    x_t = process.add_noise(x0, t, eps)
    output = process.feed(network, x_t, t, y).float()
    estimate = process.split(output, x_t, t)
    return (estimate.eps - eps).square().flatten(1).mean(1)


class Validation:
    """The held-out loss of networks in one training.

    Args:
        held: the images.
        parts: the training's codec and process.
        every: steps between measurements.
        device: where the network lies.
    """

    def __init__(self, held: HeldOut, parts: Parts, every: int, device: torch.device) -> None:
        self.held, self.parts, self.every, self.device = held, parts, every, device
        self.bins = bins(parts.process.schedule)

    @classmethod
    def of(
        cls,
        config: Config,
        parts: Parts,
        trained: Source,
        device: torch.device,
        note: Callable[[str], None],
    ) -> "Validation | None":
        """What a configuration asks for; None where it asks for none or has no images for it.

        Raises what `open_images` raises, and UsageError for a schedule that reaches no bin.
        """
        every = config.eval.heldout_every
        every = config.train.checkpoint_every if every is None else every
        if every == 0:
            return None
        held = open_images(config, parts.objective.condition, trained, note)
        if held is None:
            note(
                "note: no held-out loss: --data SOURCE:train keeps some of the images back for "
                "it, or eval.heldout names images that are not trained on (--set "
                "eval.heldout=FOLDER)"
            )
            return None
        if held.images.dtype == torch.uint8:
            parts.codec.load(device)  # what encodes them may be missing
        made = cls(held, parts, every, device)
        if not made.bins:
            raise UsageError(
                f"process.schedule {config.process.schedule} reaches none of the noise levels of "
                f"the held-out loss, log-SNR {EDGES[0]:g} to {EDGES[-1]:g}: eval.heldout_every=0 "
                "leaves it out"
            )
        if missed := len(EDGES) - 1 - len(made.bins):
            note(
                f"note: val_loss leaves out {missed} bins of noise that process.schedule "
                f"{config.process.schedule} does not reach: compare bins, not their mean"
            )
        return made

    def __call__(self, network: Any) -> dict[str, Any]:
        """`val_loss`, the mean over bins; `val_loss_0`, ..., from the noisiest bin on; and
        `val_of`, which images it is of.
        """
        training = network.training
        network.eval()
        count = len(self.held.images)
        sums = torch.zeros(len(self.bins), dtype=torch.float64, device=self.device)
        for start in range(0, count, BATCH):
            images = range(start, min(start + BATCH, count))
            x0, y = self._batch(images)
            for place, number in enumerate(self.bins):
                found = errors(network, self.parts.process, x0, y, number, images, count)
                sums[place] += found.double().sum()
        network.train(training)
        means = (sums / count).tolist()
        named = {f"val_loss_{n}": mean for n, mean in zip(self.bins, means, strict=True)}
        return {"val_loss": sum(means) / len(means), **named, "val_of": self.held.name}

    def _batch(self, images: range) -> tuple[Tensor, Tensor | None]:
        """x0 of some of the images, and what the network is told of them, on the device."""
        rows = slice(images.start, images.stop)
        # A fresh draw of a VAE's posterior would be another image.
        draw = stream(self.device, SEED, "heldout-codec", images.start)
        with torch.no_grad():
            x0 = self.parts.codec.encode(self.held.images[rows].to(self.device), draw)
        y = self.held.y
        return x0, None if y is None else y[rows].to(self.device)


# ------------------------------------------------------------------ the picture
