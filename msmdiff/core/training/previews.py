"""Pictures of a run in progress: samples from fixed noise, and what a masked model sees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msmdiff.core import files
from msmdiff.core.backbones.layers import gather_tokens, patchify, unpatchify
from msmdiff.core.backbones.routes import Route, partial
from msmdiff.core.build import Parts
from msmdiff.core.condition import Text
from msmdiff.core.config import Config
from msmdiff.core.data.images import grid, labelled
from msmdiff.core.data.loader import TrainingImages
from msmdiff.core.diffusion.coverage import is_primer
from msmdiff.core.diffusion.objectives import DrawRoute
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.model import Model
from msmdiff.core.samplers import editing
from msmdiff.core.samplers.times import visited
from msmdiff.core.sections import SampleConfig
from msmdiff.core.seeding import stream
from msmdiff.core.training.cost import Cost


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


def masked_at(stem: Path) -> Path:
    """Where `draw` writes what a masked model sees."""
    return stem.with_name(f"{stem.name}-masked.png")


MOST = 40
"""Samples of a preview, at most."""
SHARE = 0.05
"""Of the steps between two previews, what samples may cost; LEAST steps are always allowed."""
LEAST = 5.0

Tell = Callable[[str, int, int], None]
"""(what is done, how much of it is done, of how much)."""


@dataclass
class Plan:
    """How much a preview draws: `count` samples in `steps` steps of the sampler."""

    count: int
    steps: int | str


def plan(config: Config, cost: Cost, first: bool = False) -> Plan:
    """As many samples and steps as cost no more than a share of the training between two previews;
    before the first step, no more than a few steps.

    By operations, not by the clock, so that the same run draws the same pictures.
    """
    train, wanted = config.train, config.sample.steps
    passes_of_a_step = train.batch_size * cost.step_flops / max(1, cost.forward_flops)
    budget = LEAST if first else max(LEAST, SHARE * train.preview_every)
    affordable = budget * passes_of_a_step / (2 if config.sample.cfg_scale != 1 else 1)
    if isinstance(wanted, str):  # ADM's spacing: the number of steps is not ours to choose
        return Plan(MOST if affordable >= 50 * MOST else 8, wanted)
    for count in (MOST, 24, 16, 8):
        steps = min(wanted, 50, int(affordable / count))
        if steps >= min(wanted, 25):
            return Plan(count, steps)
    return Plan(8, max(min(wanted, 8), min(wanted, 25, int(affordable / 8))))


def draws_samples(config: Config, images_seen: int) -> bool:
    """Whether a preview shows samples: those of a network without any training are noise."""
    return images_seen > 0 or config.train.init_from is not None


def masks(config: Config) -> bool:
    """Whether there is something to show of the mask."""
    return config.objective.name in ("msm", "mdt", "maskdit")


def drawn(stem: Path, config: Config, images_seen: int) -> bool:
    """Whether everything that `draw` writes is there, and whole: a kill may have come between."""
    wanted = [samples_at(stem)] if draws_samples(config, images_seen) else []
    wanted += [masked_at(stem)] if masks(config) else []
    try:
        for path in wanted:
            with files.reading(path, "a picture"), Image.open(path) as picture:
                picture.load()
    except MsmdiffError:
        return False
    return True


def model_in_training(network: Any, parts: Parts, config: Config) -> Model:
    """The model that a training would draw from now."""
    sample = alone(config.sample, parts.objective.condition.count > 0)
    condition = parts.objective.condition
    if isinstance(condition, Text):
        sample = config.sample
    # Compiling would change the network in training, and with it the bits of the steps that follow.
    sample = sample.model_copy(update={"compile": False})
    drawn = config.model_copy(update={"sample": sample})
    return Model(
        backbone=network,
        process=parts.process,
        codec=parts.codec,
        condition=condition,
        config=drawn,
    )


def draw(
    model: Model,
    parts: Parts,
    dataset: TrainingImages,
    stem: Path,
    planned: Plan | None,
    tell: Tell,
) -> None:
    """Write `STEM-samples.png` where samples are planned, and `STEM-masked.png` where the training
    masks; `tell` hears of every step of the sampler.
    """
    training = model.backbone.training
    model.backbone.eval()
    if planned is not None:
        context = dataset.context(planned.count)
        picture = samples(model, planned.count, context, steps=planned.steps, tell=tell)
        names = list(dataset.source.class_names) if model.condition.count else []
        _save(_captioned(picture, model, names), samples_at(stem))
    *_, route_of = parts.objective.passes.values()
    if masks(model.config):
        images = next(dataset.sample(8, "preview"))
        context = dataset.context(len(images))
        seen = None if context is None else context.to(model.device)
        picture = masked_view(model, route_of, images, seen)
        _save(labelled(picture, rows=MASKED_ROWS), masked_at(stem))
    model.backbone.train(training)


MASKED_ROWS = ("image", "visible", "noised", "predicted")
"""The rows of `masked_view`."""
CONFETTI = (
    "masked pretraining: the network never sees a whole image, so samples are patchwork until it "
    "is fine-tuned"
)


def _captioned(picture: Image.Image, model: Model, names: Sequence[str]) -> Image.Image:
    """Samples with the classes over their columns, and a word on what a masked network draws."""
    shown = names if len(names) <= 10 else ()  # more classes do not keep to their columns
    title = CONFETTI if is_primer(model.config) else ""
    return labelled(picture, columns=shown, title=title)


def _save(picture: Image.Image, path: Path) -> None:
    with files.atomic(path) as part:
        picture.save(part, "PNG")


def samples(
    model: Model,
    count: int = MOST,
    context: Tensor | None = None,
    *,
    steps: int | str | None = None,
    tell: Tell = lambda what, done, total: None,
) -> Image.Image:
    """A grid of `count` samples from seeds 0, 1, ...; a conditional network shows its classes in
    turn, by columns.

    Args:
        context: of a network that draws from text, [count, tokens, width].
        steps: of the sampler; None: at most 50.
        tell: hears of every step.
    """
    options, classes = model.config.sample, model.condition.count
    if steps is None:
        steps = min(options.steps, 50) if isinstance(options.steps, int) else options.steps
    quick = model.config.model_copy(update={"sample": options.model_copy(update={"steps": steps})})
    seeds = range(count)
    y = context if context is not None else model.condition.deal(None, seeds)
    expected = max(1, len(visited(model.process.schedule, quick.sample)) - 1)
    watch = editing.counting(lambda done: tell("drawing a preview", done, max(done, expected)))
    drawn = replace(model, config=quick).batches(seeds, y, wraps=[watch])
    columns = min(classes, 10) if classes else 8
    return grid(to_hwc(torch.cat([batch.images for batch in drawn])), columns)


def curve(path: Path, title: str, points: Sequence[tuple[int, float]]) -> None:
    """A PNG of (images seen, value), the lowest marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), "o-", markersize=3)
    axis.plot(*min(points, key=lambda point: point[1]), "o", color="tab:red")
    axis.set(xlabel="images seen", ylabel=title)
    with files.atomic(path) as part:
        figure.savefig(part, dpi=110, format="png")


@torch.no_grad()
def masked_view(
    model: Model, route_of: DrawRoute, images: Tensor, context: Tensor | None = None
) -> Image.Image:
    """One column per image: the image, its visible part, that part noised, and the x0 predicted
    from it.

    images is what the codec encodes, [N, ...]. The noise is that of t = 0.5. A network that drops
    tokens predicts the visible ones only; where gaps are filled it predicts all.
    """
    network, codec, process, device = model.backbone, model.codec, model.process, model.device
    seed, patch = model.config.train.seed, network.patch_size
    tokens = network.grid[0] * network.grid[1]

    def draw(purpose: str, place: torch.device | str = device) -> torch.Generator:
        return stream(place, seed, f"preview-{purpose}")

    x0 = codec.encode(images.to(device), draw("codec"))
    route = route_of(len(x0), draw)
    if route is None or route.keep is None:
        route = Route(torch.arange(tokens, device=device).expand(len(x0), -1))
    keep = route.keep
    assert keep is not None
    t = torch.full((len(x0),), 0.5, device=device)
    x_t = process.add_noise(x0, t, torch.randn(x0.shape, generator=draw("noise"), device=device))
    output = process.feed(network, x_t, t, context, route).float()

    def visible(kept: Tensor) -> Tensor:
        """Kept tokens [N, K, D] -> their image, zero (mid-grey) elsewhere."""
        canvas = kept.new_zeros(len(kept), tokens, kept.shape[-1])
        canvas = canvas.scatter(1, keep.unsqueeze(-1).expand_as(kept), kept)
        return unpatchify(canvas, patch, network.grid)

    def of_kept(image: Tensor) -> Tensor:
        return visible(gather_tokens(patchify(image, patch), keep))

    if partial(route):
        predicted = of_kept(process.split(visible(output), x_t, t).x0)
    else:
        predicted = process.split(output, x_t, t).x0
    rows = [x0, of_kept(x0), of_kept(x_t), predicted]
    return grid(to_hwc(torch.cat([codec.decode(row) for row in rows])), columns=len(x0))
