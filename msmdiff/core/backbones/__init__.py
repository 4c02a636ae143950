"""The registry: families of networks, and their published sizes by name.

A new backbone is one file and one line in FAMILIES. Its constructor is its configuration: every
keyword argument is a key of the `model` section.
"""

import inspect
from typing import Any, Protocol

from pydantic import ConfigDict, ValidationError, create_model
from torch import Tensor, nn

from msmdiff.core.backbones import dit, edt, maskdwt, mdt, uvit
from msmdiff.core.config import ModelConfig
from msmdiff.core.errors import UsageError, nearest

FAMILIES: dict[str, type[nn.Module]] = {
    "uvit": uvit.UViT,
    "maskdwt": maskdwt.MaskDWT,
    "dit": dit.DiT,
    "mdt": mdt.MDT,
    "mdtv2": mdt.MDTv2,
    "edt": edt.EDT,
}
SIZES: dict[str, dict[str, Any]] = {
    name: {"family": family, **fields}
    for family, sizes in {
        "uvit": uvit.SIZES,
        "maskdwt": maskdwt.SIZES,
        "dit": dit.SIZES,
        "mdt": mdt.SIZES,
        "edt": edt.SIZES,
    }.items()
    for name, fields in sizes.items()
}
# What the published code calls these sizes, where a paper's name differs.
ALIASES: dict[str, str] = {name.replace("-", "_").replace("/", "_"): name for name in mdt.SIZES} | {
    "cifar10_uvit_small": "U-ViT-S/2",
    "celeba64_uvit_small": "U-ViT-S/4",
    "imagenet64_uvit_mid": "U-ViT-M/4",
    "imagenet64_uvit_large": "U-ViT-L/4",
    "imagenet256_uvit_large": "U-ViT-L/2",
    "imagenet256_uvit_huge": "U-ViT-H/2",
    "imagenet512_uvit_large": "U-ViT-L/4",
    "imagenet512_uvit_huge": "U-ViT-H/4",
    "mscoco_uvit_small": "U-ViT-S/2-T2I",
}


class Backbone(Protocol):
    """What the objectives and samplers ask of a network."""

    patch_size: int
    grid: tuple[int, int]
    num_classes: int
    gradient_checkpointing: bool

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor: ...


def resolve(config: ModelConfig) -> ModelConfig:
    """Fill in a named size, check every key against the family's network, and return the complete
    section.

    Raises UsageError for an unknown name, family or key (with the nearest valid one), a wrong type
    or a missing key.
    """
    given = {k: v for k, v in config.model_dump().items() if v is not None}
    name = given.pop("name", None)
    name = ALIASES.get(name, name)
    if name is not None and name not in SIZES:
        raise UsageError(
            f"model.name '{name}' is not a known size{nearest(name, list(SIZES))}; sizes: "
            f"{', '.join(SIZES)}"
        )
    fields = {**SIZES.get(name, {}), **given}
    num_classes = fields.pop("num_classes")
    family = fields.pop("family", None)
    if family not in FAMILIES:
        raise UsageError(
            f"model.family must be one of {', '.join(FAMILIES)} (or give model.name), "
            f"not {family!r}"
        )
    schema = _schema(family)
    if unknown := [key for key in fields if key not in schema.model_fields]:
        near = nearest(unknown[0], list(schema.model_fields))
        raise UsageError(
            f"unknown configuration key 'model.{unknown[0]}' for family {family}{near}"
        )
    try:
        complete = schema.model_validate(fields).model_dump()
    except ValidationError as error:
        problems = (
            f"model.{e['loc'][0]}: {e['msg'][0].lower()}{e['msg'][1:]}" for e in error.errors()
        )
        raise UsageError("; ".join(problems)) from None
    return ModelConfig(name=name, family=family, num_classes=num_classes, **complete)


def build(config: ModelConfig, shape: tuple[int, int, int]) -> Any:
    """A freshly initialised network for inputs [B, *shape], from a resolved section."""
    fields = {
        k: v for k, v in config.model_dump().items() if k not in ("name", "family", "num_classes")
    }
    assert config.family is not None, "resolve the model section first"
    return FAMILIES[config.family](shape, config.num_classes, **fields)


def _schema(family: str) -> Any:
    parameters = inspect.signature(FAMILIES[family]).parameters.values()
    fields: dict[str, Any] = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model(family, __config__=ConfigDict(extra="forbid"), **fields)
