"""Settings for one's own images, where nobody gave any: which network, patches, prediction, batch
and length suit the images, their number and the machine.

One rule for each, from the user's side: on a CPU something can be seen after minutes, on a GPU
after an hour. What the user says wins, and what is chosen here is stored as if the user had said
it, so that a run goes on with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch

from msmdiff.core import backbones, registry
from msmdiff.core.config import section
from msmdiff.core.data import halves
from msmdiff.core.data.latents import Latents
from msmdiff.core.data.source import PROBES, Source
from msmdiff.core.errors import MsmdiffError

Machine = Literal["cpu", "cuda"]

SIDE: dict[Machine, int] = {"cpu": 32, "cuda": 64}
"""The largest images, in pixels, that are chosen."""
GRID: dict[Machine, int] = {"cpu": 8, "cuda": 16}
"""Patches along a side, at most: 64 tokens on a CPU, 256 on a GPU."""
PATCHES = (1, 2, 4, 8, 16)
BATCH: dict[Machine, int] = {"cpu": 32, "cuda": 128}
VISITS: dict[Machine, int] = {"cpu": 60, "cuda": 100}
"""How often a training sees each image."""
STEPS: dict[Machine, tuple[int, int]] = {"cpu": (1500, 6000), "cuda": (5000, 50_000)}
"""Between so many steps."""
MANY = 10_000
"""From so many images on a GPU trains U-ViT-S."""
ASSUMED = 2000
"""Images of data that are not here."""
NARROW = 512
"""Below this width, or where a patch holds more than an eighth of the width in numbers, a network
cannot carry the noise of its patches, which has no structure; the clean image it can."""


@dataclass(frozen=True)
class Facts:
    """What the choice is made from: how many images there are, the median of their shorter sides
    (None: not known), and what they are trained on; of encoded ones, the codec's section.
    """

    images: int
    side: int | None
    machine: Machine
    codec: dict[str, Any] | None = None


@dataclass(frozen=True)
class Choice:
    """A layer of the configuration, and a line that says why."""

    layer: dict[str, Any]
    reason: str


def chosen_for(source: str) -> bool:
    """Whether settings are chosen for data: the embedded digits have presets of their own."""
    return halves.parted(source)[0] != "digits"


def _machine() -> Machine:
    return "cuda" if torch.cuda.is_available() else "cpu"


def facts_of(source: Source) -> Facts:
    """The facts of some data on this machine. An image that cannot be read tells nothing here: it
    is named when the training begins.
    """
    machine = _machine()
    if isinstance(source, Latents):
        return Facts(len(source), **_packed(source, machine))
    sides = []
    for index in sorted({i * len(source) // PROBES for i in range(PROBES)}):
        try:
            sides.append(min(source.image(index).size))
        except MsmdiffError:
            continue
    return Facts(len(source), int(median(sides)) if sides else None, machine)


def facts_of_none() -> Facts:
    """What is taken for granted of data that are not here, to plan with."""
    return Facts(ASSUMED, None, _machine())


def _packed(source: Latents, machine: Machine) -> dict[str, Any]:
    """The facts of encoded images, which one codec reads, at one size."""
    if not source.moments:
        return {"side": source.image_size, "machine": machine}
    channels, side = source.shape[-3] // 2, source.shape[-1]
    image = source.image_size or 8 * side  # a cache does not tell: Stable Diffusion's factor
    codec = {"name": source.codec["name"], "channels": channels, "factor": image // side}
    return {"side": image, "machine": machine, "codec": codec}


def choose(given: Mapping[str, Any], facts: Facts) -> Choice:
    """What `given`, a layer of the configuration, leaves open.

    Raises UsageError for a network or a codec that there is not.
    """
    data, told, train = (dict(given.get(name) or {}) for name in ("data", "model", "train"))
    side = data.get("image_size") or image_size(facts)
    packed = facts.codec if "name" not in (given.get("codec") or {}) else None
    codec = section("codec", **{**(packed or {}), **(given.get("codec") or {})})
    entry = registry.find("codec", codec.name, "codec.name")
    latent = max(1, int(side) // entry.make.factor_of(entry.takes(codec)))
    model: dict[str, Any] = {}
    if told.get("name") is None and told.get("family") is None:
        model = network(facts, int(told.get("patch_size") or patch_size(latent, facts.machine)))
    batch = train.get("batch_size") or BATCH[facts.machine]
    layer = {
        "data": {} if "image_size" in data else {"image_size": side},
        "model": model,
        "codec": packed or {},
        "process": _process(given, {**model, **told}, getattr(codec, "channels", 3)),
        "optim": {"warmup_steps": 100},
        "train": {
            "batch_size": batch,
            "steps": train.get("steps") or length(facts, int(batch)),
            "preview_every": 500,
            "checkpoint_every": 500,
        },
    }
    return Choice(layer, _reason(layer, facts, latent))


def image_size(facts: Facts) -> int:
    """The side of the images as they are, in fours, up to the machine's limit; of encoded ones,
    theirs.
    """
    if facts.codec is not None and facts.side is not None:
        return facts.side
    limit = SIDE[facts.machine]
    return limit if facts.side is None else max(8, min(limit, facts.side // 4 * 4))


def patch_size(latent: int, machine: Machine) -> int:
    """The smallest patch that leaves no more than the machine's grid of tokens."""
    fitting = [p for p in PATCHES if latent % p == 0]
    return next((p for p in fitting if latent // p <= GRID[machine]), fitting[-1])


def network(facts: Facts, patch: int) -> dict[str, Any]:
    """A size by name: a larger one where there are a GPU and many images."""
    size = "XXS" if facts.machine == "cpu" else "XS" if facts.images < MANY else "S"
    name = f"U-ViT-{size}/{patch}"
    if name in backbones.sizes():
        return {"name": name}
    return {"name": f"U-ViT-{size}/4", "patch_size": patch}


def length(facts: Facts, batch: int) -> int:
    """Steps in which every image is seen as often as the machine allows."""
    least, most = STEPS[facts.machine]
    return min(most, max(least, math.ceil(VISITS[facts.machine] * facts.images / batch)))


def prediction(width: int | None, patch_numbers: int) -> str | None:
    """What suits a network of this width, for patches of so many numbers; None: nothing known."""
    if width is None:
        return None
    return "x0" if width < NARROW or patch_numbers > width // 8 else "eps"


def _process(given: Mapping[str, Any], model: dict[str, Any], channels: int) -> dict[str, Any]:
    """Prediction and noise, unless the user chose one of them: they belong together. x0 learns
    fastest on a straight path.
    """
    told = given.get("process") or {}
    if "prediction" in told or "schedule" in told:
        return {}
    known = backbones.resolve(section("model", **{"name": None, "num_classes": 0, **model}))
    fields = known.model_dump()
    if fields.get("learn_sigma"):
        return {}  # published with the noise as its target
    numbers = channels * (fields.get("patch_size") or 1) ** 2
    found = prediction(fields.get("hidden_size"), numbers)
    if found == "x0":
        return {"prediction": "x0", "schedule": "flow", "time_sampling": "logit_normal"}
    return {} if found is None else {"prediction": found}


def _reason(layer: dict[str, Any], facts: Facts, latent: int) -> str:
    about = f" of about {facts.side} px" if facts.side else ""
    machine = "a GPU" if facts.machine == "cuda" else "a CPU"
    model, parts = layer["model"], []
    if "image_size" in layer["data"]:
        parts.append(f"images of {layer['data']['image_size']} px")
    if model:
        patch = model.get("patch_size") or int(model["name"].rpartition("/")[2])
        parts.append(f"{model['name']} with {(latent // patch) ** 2} patches of {patch}x{patch}")
    if layer["process"].get("prediction") == "x0":
        parts.append("flow matching with prediction x0, since a narrow network cannot learn eps")
    parts.append(f"batch {layer['train']['batch_size']}, {layer['train']['steps']:,} steps")
    return (
        f"chosen for {facts.images:,} images{about} on {machine}: {'; '.join(parts)} "
        "(flags and --set override)"
    )
