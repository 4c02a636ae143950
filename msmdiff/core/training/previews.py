"""Pictures of a run in progress: samples from fixed noise, and what a masked model sees."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msmdiff.core.backbones.layers import gather_tokens, patchify, unpatchify
from msmdiff.core.build import Parts
from msmdiff.core.config import Config, SampleConfig
from msmdiff.core.data.images import grid
from msmdiff.core.data.loader import TrainingImages
from msmdiff.core.samplers.generate import generate
from msmdiff.core.seeding import stream


def to_hwc(images: Tensor) -> np.ndarray:
    """uint8 [N, 3, H, W] -> NumPy [N, H, W, 3]."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def alone(options: SampleConfig, labelled: bool) -> SampleConfig:
    """The sample section for a network in training: no scale without labels to guide by, and no
    autoguidance.

    That scale is for its guide, another network's weights: here it is to be seen how this one is
    getting on.
    """
    if labelled and options.guide is None:
        return options
    return options.model_copy(update={"cfg_scale": 1.0, "guide": None})


def samples_at(stem: Path) -> Path:
    """Where `draw` writes samples."""
    return stem.with_name(f"{stem.name}-samples.png")


def draw(
    network: Any,
    parts: Parts,
    config: Config,
    dataset: TrainingImages,
    device: torch.device,
    stem: Path,
) -> None:
    """Write `STEM-samples.png`, and `STEM-masked.png` where the training masks."""
    training = network.training
    network.eval()
    context = dataset.context(40)
    picture = samples(network, parts, config, device, context=context)
    picture.save(samples_at(stem))
    if config.objective.name in ("msm", "mdt"):
        images = next(dataset.sample(8, "preview"))
        seen = None if context is None else context[: len(images)].to(device)
        picture = masked_view(network, parts, images, config.train.seed, device, seen)
        picture.save(stem.with_name(f"{stem.name}-masked.png"))
    network.train(training)


def samples(
    network: Any,
    parts: Parts,
    config: Config,
    device: torch.device,
    count: int = 40,
    context: Tensor | None = None,
) -> Image.Image:
    """A grid of `count` samples from seeds 0, 1, ...; a conditional network shows its classes in
    turn, by columns.

    A network that draws from text takes context, [count, tokens, width].
    """
    classes = network.num_classes
    columns = min(classes, 10) if classes else 8
    labels = [i % classes for i in range(count)] if classes else context
    steps = config.sample.steps
    options = alone(config.sample, labels is not None).model_copy(
        update={"steps": min(steps, 50) if isinstance(steps, int) else steps}
    )
    null = parts.objective.null
    road = (network, parts.process, parts.codec, options, range(count), labels)
    drawn = generate(*road, num_classes=classes, null=null, device=device)
    return grid(to_hwc(torch.cat([batch.images for batch in drawn])), columns)


def curve(path: Path, title: str, points: Sequence[tuple[int, float]]) -> None:
    """A PNG of (images seen, value), the lowest marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), "o-", markersize=3)
    axis.plot(*min(points, key=lambda point: point[1]), "o", color="tab:red")
    axis.set(xlabel="images seen", ylabel=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@torch.no_grad()
def masked_view(
    network: Any,
    parts: Parts,
    images: Tensor,
    seed: int,
    device: torch.device,
    context: Tensor | None = None,
) -> Image.Image:
    """One column per image: the image, its visible part, that part noised, and the x0 predicted
    from it.

    images is what the codec encodes, [N, ...]. The noise is that of t = 0.5, the mask that of the
    objective's last pass. A network that drops tokens predicts the visible ones only; MDT fills in
    the others.
    """

    def draw(purpose: str, place: torch.device | str = device) -> torch.Generator:
        return stream(place, seed, f"preview-{purpose}")

    x0 = parts.codec.encode(images.to(device), draw("codec"))
    *_, mask = parts.objective.passes.values()
    keep = mask(len(x0), draw)
    if keep is None:
        keep = torch.arange(parts.mask.tokens, device=device).expand(len(x0), -1)
    t = torch.full((len(x0),), 0.5, device=device)
    x_t = parts.process.add_noise(
        x0, t, torch.randn(x0.shape, generator=draw("noise"), device=device)
    )
    output = network(x_t, parts.process.model_time(t), context, keep).float()

    def visible(tokens: Tensor) -> Tensor:
        """Kept tokens [N, K, D] -> their image, zero (mid-grey) elsewhere."""
        canvas = tokens.new_zeros(len(tokens), parts.mask.tokens, tokens.shape[-1])
        return unpatchify(
            canvas.scatter(1, keep.unsqueeze(-1).expand_as(tokens), tokens),
            network.patch_size,
            network.grid,
        )

    def of_kept(image: Tensor) -> Tensor:
        return visible(gather_tokens(patchify(image, network.patch_size), keep))

    partial = output.ndim == 3
    predicted = parts.process.split(visible(output) if partial else output, x_t, t).x0
    rows = [x0, of_kept(x0), of_kept(x_t), of_kept(predicted) if partial else predicted]
    return grid(to_hwc(torch.cat([parts.codec.decode(row) for row in rows])), columns=len(x0))
