"""A small classifier of the data at hand: its features give a Fréchet distance that needs no
download, and that is not FID.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msmdiff.core import files, tensor_files
from msmdiff.core.data.loader import center_crops
from msmdiff.core.data.source import Source
from msmdiff.core.diffusion.codecs import to_unit
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics.features import Features, clean, one_line
from msmdiff.core.registry import register
from msmdiff.core.seeding import key, numpy_stream, stream

WIDTHS = (32, 64, 128, 128)
"""Channels of the convolutions, each of which after the first halves the side."""

MOST_IMAGES = 20_000
"""Images that are held in memory, chosen at random of larger sets."""

BATCH, RATE, SMOOTHING = 128, 2e-3, 0.1
"""Images of a step, AdamW's highest rate, and label smoothing."""

MADE_BY = "msmdiff data features"


@dataclass
class Trained:
    """What a classifier was made of, as its file tells.

    Attributes:
        source, classes: the images, and how many classes they have.
        side: of the images that the network sees, in pixels.
        steps, seed: of its training.
        accuracy: on a tenth of the images, which it did not train on.
    """

    source: str
    classes: int
    side: int
    steps: int
    seed: int
    accuracy: float = 0.0


def network(classes: int) -> nn.ModuleDict:
    """`features`, [B, 3, H, W] -> [B, 128], and `head`, to the classes."""
    layers: list[nn.Module] = []
    for number, (before, width) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
        layers += [
            nn.Conv2d(before, width, 3, stride=1 + (number > 0), padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    pooled = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.ModuleDict({"features": pooled, "head": nn.Linear(WIDTHS[-1], classes)})


# ------------------------------------------------------------------ training


def train(
    source: Source,
    out: Path,
    *,
    side: int = 32,
    steps: int = 500,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Train a classifier of a source's classes, and write it.

    Args:
        side: of the square that images are cropped to, in pixels.
        progress: told of the steps that are done, and of all.

    Raises UsageError for a source without two classes or with too few images, and Unreadable.
    """
    labels = source.labels
    if labels is None or len(source.class_names) < 2:
        raise UsageError(
            f"{source.spec} has no classes to tell apart: a classifier's features need a folder "
            "for each class, or a source that brings classes"
        )
    order = numpy_stream(seed, "classifier-images").permutation(len(source))[:MOST_IMAGES]
    held = len(order) // 10
    if held < 2:
        raise UsageError(f"{source.spec} holds {len(order)} images: a classifier needs at least 20")
    images = center_crops(source, order, side).to(device)
    y = torch.from_numpy(labels[order]).to(device)
    torch.manual_seed(key(seed, "classifier"))
    net = network(len(source.class_names)).to(device)
    _fit(net, images[held:], y[held:], (steps, seed), progress=progress)
    accuracy = _accuracy(net.eval(), images[:held], y[:held])
    made = Trained(source.spec, len(source.class_names), side, steps, seed, round(accuracy, 4))
    about = {name: str(value) for name, value in asdict(made).items()}
    tensors = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
    tensor_files.write(out, tensors, {"made_by": MADE_BY, **about})
    return made


def _fit(
    net: nn.ModuleDict,
    images: Tensor,
    y: Tensor,
    length: tuple[int, int],
    *,
    progress: Callable[[int, int], None],
) -> None:
    (steps, seed), size = length, min(BATCH, len(images))
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for step in range(steps):
        generator = stream("cpu", seed, "classifier-step", step)
        rows = torch.randint(len(images), (size,), generator=generator).to(images.device)
        x = _shifted(to_unit(images[rows]), generator)
        said = net["head"](net["features"](x))
        loss = F.cross_entropy(said, y[rows], label_smoothing=SMOOTHING)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        rate.step()
        progress(step + 1, steps)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, H, W], each moved by up to an eighth of its side; edges are repeated."""
    side = images.shape[-1]
    reach = side // 8
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    places = torch.randint(2 * reach + 1, (len(images), 2), generator=generator).tolist()
    moved = [x[:, i : i + side, j : j + side] for x, (i, j) in zip(padded, places, strict=True)]
    return torch.stack(moved)


@torch.no_grad()
def _accuracy(net: nn.ModuleDict, images: Tensor, y: Tensor) -> float:
    right = 0
    for rows, classes in zip(images.split(BATCH), y.split(BATCH), strict=True):
        said = net["head"](net["features"](to_unit(rows)))
        right += int((said.argmax(1) == classes).sum())
    return right / len(y)


def ours(path: Path) -> bool:
    """Whether `train` wrote a file."""
    try:
        files.require_regular(path)
        return tensor_files.metadata(path).get("made_by") == MADE_BY
    except MsmdiffError:
        return False


# ------------------------------------------------------------------ the features


@register("features", "classifier")
class ClassifierFeatures(Features):
    """The 128 pooled features of a classifier that `msmdiff data features` trained. Not FID.

    Args:
        weights: its file.

    Raises UsageError without a file, and MsmdiffError for a file that is none of a classifier.
    """

    prefix = "classifier-"

    width, resize, metric = WIDTHS[-1], "clean", "fd_classifier"

    def __init__(
        self,
        weights: Path | None = None,
        device: torch.device | str = "cpu",
        *,
        spatial: bool = False,
    ) -> None:
        if weights is None:
            raise UsageError(
                "features of a classifier need its file (--features net.safetensors, "
                "measure.weights, eval.weights): `msmdiff data features SOURCE -o net.safetensors` "
                "trains one"
            )
        state = tensor_files.read(weights)
        if not ours(weights):
            raise MsmdiffError(f"{weights} was not written by `{MADE_BY}`: it is no classifier")
        self.made = told(weights)
        net: Any = network(self.made.classes)
        try:
            net.load_state_dict(state)
        except RuntimeError as error:
            raise MsmdiffError(f"{weights} is not a whole classifier: {one_line(error)}") from None
        self.name = f"{self.prefix}{self.width}/{files.checksum(weights)[:8]}"
        self.title, self.suffix = self.titles(self.name)
        self.device = torch.device(device)
        self._network = net["features"].to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        x = images.to(self.device)
        if x.shape[-2:] != (self.made.side, self.made.side):
            x = clean(x, self.made.side)
        return self._network(to_unit(x)).float(), None

    @classmethod
    def titles(cls, name: str) -> tuple[str, str]:
        over = f"over the classifier {name.rpartition('/')[2]}"
        return f"Fréchet distance {over}", f" {over}"


def told(path: Path) -> Trained:
    """What a classifier's file tells of it. Raises MsmdiffError where it is damaged."""
    about = tensor_files.metadata(path)
    with files.reading(path, "a classifier's file"):
        return Trained(
            source=about["source"],
            classes=int(about["classes"]),
            side=int(about["side"]),
            steps=int(about["steps"]),
            seed=int(about["seed"]),
            accuracy=float(about["accuracy"]),
        )
