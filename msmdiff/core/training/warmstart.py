"""Starting from other weights: what fits is loaded, positions are resized, and everything else is
named.
"""

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msmdiff.core import backbones
from msmdiff.core import build as road
from msmdiff.core.backbones.blocks import options_of
from msmdiff.core.config import Config
from msmdiff.core.diffusion import alignment
from msmdiff.core.errors import UsageError
from msmdiff.core.weights import Stored, published


def next_stage(config: Config) -> dict[str, Any]:
    """The configuration that weights were trained with -> the layer that a next stage starts from.

    It takes over what the network is and how a step is made; not how long the last stage went, nor
    what was derived for its length, its width or its machine: those are null or default again.
    """
    layer = config.as_dict()
    for section, key in (
        ("train", "steps"),
        ("train", "max_seconds"),
        ("train", "precision"),
        ("train", "init_from"),
        ("optim", "decay_steps"),
    ):
        del layer[section][key]
    for option in alignment.keys(config.objective):  # of the stage that asks for it
        del layer["objective"][option]
    if "velocity_head" in layer["model"]:  # for training only: an objective that needs one says so
        layer["model"]["velocity_head"] = False
    if config.optim.lr == road.derived_rate(config.model):
        del layer["optim"]["lr"]
    return layer


def told_by(config: Config) -> dict[str, Any]:
    """What a configuration says of a published file's network that its shapes do not tell."""
    fields = config.model.model_dump()
    usual = inspect.signature(backbones.network_class(config.model)).parameters
    told: dict[str, Any] = {}
    for name in published.UNTOLD:
        # What is as usual is for the file to say: it may be of another family, without that key.
        if name in fields and fields[name] != usual[name].default:
            told[name] = fields[name]
    return told


@dataclass
class Report:
    """Names of parameters, by what became of them; `share` is the loaded part of the network's
    numbers, `classes` says which rows of a label table were taken, and `blocks` which options of
    blocks differ.
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    share: float = 0.0
    classes: str = ""
    blocks: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: a count each, with names where they matter."""
        lines = [f"loaded {len(self.loaded)} tensors ({self.share:.0%} of the parameters)"]
        if self.blocks:
            lines.append(f"the blocks are made otherwise than there: {'; '.join(self.blocks)}")
        for name in ("resized", "missing", "unexpected"):
            if names := getattr(self, name):
                lines.append(
                    f"{name} {len(names)}: "
                    f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
                )
        return lines + ([self.classes] if self.classes else [])


def start_from(
    backbone: Any, stored: Stored, allow_partial: bool = False, class_names: Sequence[str] = ()
) -> Report:
    """Load `stored` into a fresh `backbone`, in place.

    Learned positions and relative-position tables go to another grid by bicubic interpolation,
    special tokens unchanged, fixed positions are computed anew; a label table keeps the rows of the
    classes both have (`class_names`: the data's), and its null class; tensors of another shape stay
    as initialised ("missing"). Raises UsageError, unless `allow_partial`, when less than half of
    the network's numbers are loaded, or when classes of another number have no names to go by.
    """
    with torch.device("meta"):
        origin = road.build(stored.config).backbone
    own, report = backbone.state_dict(), Report()
    report.blocks = options_of(backbone).unlike(options_of(origin))
    rows = None
    if "label_emb.weight" in own and "label_emb.weight" in stored.tensors:
        matched = _Classes(stored, origin.num_classes, list(class_names), backbone.num_classes)
        rows, report.classes = matched.rows(allow_partial), matched.said()
        if len(stored.tensors["label_emb.weight"]) > matched.old and backbone.null_class:
            rows[matched.new] = matched.old
    fixed = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    report.unexpected = [name for name in stored.tensors if name not in own]
    loaded = 0
    for name, target in own.items():
        source = stored.tensors.get(name)
        if source is not None:  # half precision has no interpolation on a CPU
            source = source.to(target.dtype)
        fitted = None
        if source is not None and source.shape == target.shape:
            fitted = None if _moved(name, origin, backbone, rows) else source
        if fitted is not None:
            report.loaded.append(name)
        elif source is not None:
            fitted = (
                target
                if name in fixed
                else _fitted(
                    name=name,
                    source=source,
                    target=target,
                    origin=origin,
                    backbone=backbone,
                    rows=rows,
                )
            )
            (report.missing if fitted is None else report.resized).append(name)
        else:
            report.missing.append(name)
        if fitted is not None:
            target.copy_(fitted)
            loaded += target.numel()
    report.share = loaded / sum(v.numel() for v in own.values())
    if report.share < 0.5 and not allow_partial:
        details = "; ".join(report.lines()[1:])
        raise UsageError(
            f"only {report.share:.0%} of the network's parameters are in {stored.path} "
            f"({details}): is it another architecture? --allow-partial starts from it all the same"
        )
    return report


def _fitted(
    name: str,
    source: Tensor,
    target: Tensor,
    origin: Any,
    backbone: Any,
    rows: dict[int, int] | None,
) -> Tensor | None:
    """A tensor of another grid or other classes, brought to this network's; None where none is."""
    alike = source.shape[-1] == target.shape[-1]
    if name.endswith("pos_embed") and alike:
        return _resize_positions(source, target, origin, backbone)
    if name.endswith("bias_table") and alike:
        return _resize_bias_table(source, target)
    if name == "label_emb.weight" and alike and rows is not None:
        return _shared_rows(source, target, rows)
    return None


class _Classes:
    """Which of the data's classes are which of a weights file's: by name where both have names,
    else by number.
    """

    def __init__(self, stored: Stored, old: int, names: list[str], new: int) -> None:
        self.path, self.old, self.new = stored.path, old, new
        self.names = names
        self.old_names: list[str] = json.loads(stored.notes.get("class_names", "[]"))

    def rows(self, allow_partial: bool) -> dict[int, int]:
        """Row of the new table -> row of the old one, but for the null class.

        Raises UsageError where numbers alone would have to tell different classes apart.
        """
        if self.names and self.old_names:
            number = {name: i for i, name in enumerate(self.old_names)}
            return {i: number[name] for i, name in enumerate(self.names) if name in number}
        if self.old != self.new and not allow_partial:
            whose = "the data" if self.old_names else str(self.path)
            raise UsageError(
                f"{self.path} knows {self.old} classes, this training {self.new}, and {whose} does "
                "not name them, so that which is which cannot be told: --allow-partial takes them "
                "by number"
            )
        return {i: i for i in range(min(self.old, self.new))}

    def said(self) -> str:
        """What was matched, for people."""
        if not (self.names and self.old_names):
            return f"classes 0 to {min(self.old, self.new) - 1} taken by number: no names to go by"
        if self.names == self.old_names:
            return ""
        known = [name for name in self.names if name in self.old_names]
        fresh = [name for name in self.names if name not in self.old_names]
        return f"classes matched by name: {_some(known)}; new: {_some(fresh)}"


def _some(names: list[str]) -> str:
    """Up to six names."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "") or "none"


def _shared_rows(source: Tensor, target: Tensor, rows: dict[int, int]) -> Tensor:
    """The label table's rows of the classes that both have, the null class among them."""
    fitted = target.clone()
    for new, old in rows.items():
        fitted[new] = source[old]
    return fitted


def _moved(name: str, origin: Any, backbone: Any, rows: dict[int, int] | None) -> bool:
    """Same shape, other meaning: the grid, the special tokens or the classes changed, and the rows
    happen to agree.
    """
    if name == "label_emb.weight":
        return rows != {i: i for i in range(len(backbone.label_emb.weight))}
    same_grid = _grids(origin) == _grids(backbone)
    same_tokens = origin.special_tokens == backbone.special_tokens
    return name.endswith("pos_embed") and not (same_grid and same_tokens)


def _grids(network: Any) -> list[tuple[int, int]]:
    """The grids of patches in a network's sequence: one, or the wavelet network's two."""
    return getattr(network, "grids", [network.grid])


def _resize_positions(source: Tensor, target: Tensor, origin: Any, backbone: Any) -> Tensor:
    """[1, S + L, D] -> [1, S' + L', D], grid by grid; a special token that is new keeps its fresh
    row.
    """
    fitted = target.clone()
    for row, token in enumerate(backbone.special_tokens):
        if token in origin.special_tokens:
            fitted[:, row] = source[:, origin.special_tokens.index(token)]
    old, new = len(origin.special_tokens), len(backbone.special_tokens)
    for grid, size in zip(_grids(origin), _grids(backbone), strict=True):
        patches, old = source[:, old : old + math.prod(grid)], old + math.prod(grid)
        fitted[:, new : new + math.prod(size)] = (
            patches if grid == size else _interpolate(patches, grid, size)
        )
        new += math.prod(size)
    return fitted


def _resize_bias_table(source: Tensor, target: Tensor) -> Tensor:
    """Biases by relative position on square grids, [(2n - 1)^2 + spare, heads] -> those of another
    n.

    The outermost positions meet the outermost: a head that looks at the far corner still does.
    MDT's spare rows, which nothing reads, stay as they are.
    """
    old, new = math.isqrt(len(source)), math.isqrt(len(target))
    table = _interpolate(source[None, : old**2], (old, old), (new, new), align_corners=True)[0]
    return torch.cat([table, target[new**2 :]])


def _interpolate(
    rows: Tensor, grid: tuple[int, int], size: tuple[int, int], align_corners: bool = False
) -> Tensor:
    """[1, rows * columns, D] on one grid -> the same field on another, bicubic."""
    image = rows.transpose(1, 2).unflatten(2, grid)  # [1, D, rows, columns]
    image = F.interpolate(
        image, size=size, mode="bicubic", align_corners=align_corners, antialias=not align_corners
    )
    return image.flatten(2).transpose(1, 2)
