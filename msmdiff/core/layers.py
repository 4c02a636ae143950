"""Layers of a configuration: nested dictionaries laid over each other, later ones winning.

Where a later layer makes another choice (another sampler, optimiser, size), what earlier layers
said of the old choice's own options no longer applies, unless both declare the option alike.
"""

import copy
from typing import Any

from msmdiff.core import registry, sections
from msmdiff.core.sections import Section

SECTIONS: dict[str, type[Section]] = {
    "data": sections.DataConfig,
    "codec": sections.CodecConfig,
    "model": sections.ModelConfig,
    "process": sections.ProcessConfig,
    "mask": sections.MaskConfig,
    "objective": sections.ObjectiveConfig,
    "optim": sections.OptimConfig,
    "ema": sections.EmaConfig,
    "train": sections.TrainConfig,
    "sample": sections.SampleConfig,
    "eval": sections.EvalConfig,
}
"""The sections of a configuration by name, in the order they are written."""

ALL_TOKENS: dict[str, Any] = {
    "mask": {"ratio": 0.0, "kind": "patch", "route": "auto", "schedule": "constant", "tail": 0.0},
    "objective": {"name": "dsm"},
}
"""The layer of a training that hides nothing, such as a fine-tuning."""


def all_tokens(objective: str) -> dict[str, Any]:
    """The layer of a training that hides nothing, after one with this objective, which stays where
    it is not about hidden tokens.
    """
    known = registry.entries("objective").get(objective)
    stays = known is not None and getattr(known.make, "for_all_tokens", False)
    return {"mask": ALL_TOKENS["mask"]} if stays else ALL_TOKENS


def merge(base: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """`layer` over `base`; neither is changed. An empty section (None) says nothing."""
    merged = dict(base)
    for name, content in layer.items():
        if name in SECTIONS and content is None:
            continue
        if name == "plugins" and isinstance(content, list) and isinstance(base.get(name), list):
            merged[name] = [*dict.fromkeys([*base[name], *content])]
            continue
        if name not in SECTIONS or not isinstance(content, dict):
            merged[name] = copy.deepcopy(content)
            continue
        section = SECTIONS[name]
        over = section.prepare(content)
        under = base.get(name)
        under = dict(section.prepare(under)) if isinstance(under, dict) else {}
        stale = _stale_dimensions(under, over) if name == "model" else _stale(section, under, over)
        if name == "data":
            stale |= _stale_source(section, under, over)
        kept = {key: value for key, value in under.items() if key not in stale}
        merged[name] = {**kept, **copy.deepcopy(over)}
    return merged


def _stale_dimensions(under: dict[str, Any], over: dict[str, Any]) -> set[str]:
    """Another size: what was said of the old one's dimensions no longer applies."""
    same = over.get("name") in (None, under.get("name"))
    return set() if same else set(under) - {"num_classes"}


def _stale_source(section: type[Section], under: dict[str, Any], over: dict[str, Any]) -> set[str]:
    """Other data, whose kind goes by its look: what was said of the old kind's options no longer
    applies.
    """
    same = over.get("source") in (None, under.get("source"))
    named = over.get("kind", under.get("kind", sections.AUTO)) != sections.AUTO
    return set() if same or named else set(under) - set(section.model_fields)


def _stale(section: type[Section], under: dict[str, Any], over: dict[str, Any]) -> set[str]:
    """The keys of `under` that were options of a choice which `over` makes otherwise."""
    stale: set[str] = set()
    for key, kind in section.CHOICES.items():
        default = section.model_fields[key].default
        old, new = under.get(key, default), over.get(key, under.get(key, default))
        if old == new:
            continue
        before, after = _options(kind, old), _options(kind, new)
        if kind == "objective" and new == sections.AUTO:
            after = {}  # it goes by the network and the mask, whatever came before
        for name, field in before.items():
            other = after.get(name)
            alike = other is not None and (field.annotation, field.description) == (
                other.annotation,
                other.description,
            )
            if not alike:
                stale.add(name)
    return stale


def _options(kind: str, choice: Any) -> dict[str, Any]:
    """The option fields of a choice; of one that is still automatic, those of all."""
    known = registry.entries(kind)
    if isinstance(choice, str) and choice in known:
        return dict(known[choice].options.model_fields)
    if choice not in (None, sections.AUTO):
        return {}
    return {k: f for entry in known.values() for k, f in entry.options.model_fields.items()}
