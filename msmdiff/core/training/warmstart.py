"""Starting from other weights: what fits is loaded, positions are resized, and everything else is
named.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msmdiff.core import build as road
from msmdiff.core.errors import UsageError
from msmdiff.core.weights import Stored


@dataclass
class Report:
    """Names of parameters, by what became of them; `share` is the loaded part of the network's
    numbers.
    """

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    share: float = 0.0

    def lines(self) -> list[str]:
        """For people: a count each, with names where they matter."""
        lines = [f"loaded {len(self.loaded)} tensors ({self.share:.0%} of the parameters)"]
        for name in ("resized", "missing", "unexpected"):
            if names := getattr(self, name):
                lines.append(
                    f"{name} {len(names)}: "
                    f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
                )
        return lines


def start_from(backbone: Any, stored: Stored, allow_partial: bool = False) -> Report:
    """Load `stored` into a fresh `backbone`, in place.

    Learned positions and relative-position tables go to another grid by bicubic interpolation,
    special tokens unchanged, fixed positions are computed anew; a label table keeps the rows of the
    classes both have, and its null class; tensors of another shape stay as initialised ("missing").
    Raises UsageError when less than half of the network's numbers are loaded, unless
    `allow_partial`.
    """
    with torch.device("meta"):
        origin = road.build(stored.config).backbone
    own, report = backbone.state_dict(), Report()
    fixed = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    report.unexpected = [name for name in stored.tensors if name not in own]
    loaded = 0
    for name, target in own.items():
        source = stored.tensors.get(name)
        if source is not None:  # half precision has no interpolation on a CPU
            source = source.to(target.dtype)
        fitted = None
        if source is not None and source.shape == target.shape:
            fitted = None if _moved(name, origin, backbone) else source
        if fitted is not None:
            report.loaded.append(name)
        elif source is not None:
            fitted = (
                target
                if name in fixed
                else _fitted(
                    name=name, source=source, target=target, origin=origin, backbone=backbone
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


def _fitted(name: str, source: Tensor, target: Tensor, origin: Any, backbone: Any) -> Tensor | None:
    """A tensor of another grid or other classes, brought to this network's; None where none is."""
    alike = source.shape[-1] == target.shape[-1]
    if name.endswith("pos_embed") and alike:
        return _resize_positions(source, target, origin, backbone)
    if name.endswith("bias_table") and alike:
        return _resize_bias_table(source, target)
    if name == "label_emb.weight" and alike:
        return _shared_rows(source, target, origin.num_classes, backbone.num_classes)
    return None


def _shared_rows(source: Tensor, target: Tensor, old: int, new: int) -> Tensor:
    """The label table's rows of the classes that both have, and the null class's."""
    fitted, shared = target.clone(), min(old, new)
    fitted[:shared] = source[:shared]
    if len(source) > old and len(target) > new:
        fitted[-1] = source[-1]
    return fitted


def _moved(name: str, origin: Any, backbone: Any) -> bool:
    """Same shape, other meaning: the grid, the special tokens or the classes changed, and the rows
    happen to agree.
    """
    if name == "label_emb.weight":
        return origin.num_classes != backbone.num_classes
    same = _grids(origin) == _grids(backbone) and origin.special_tokens == backbone.special_tokens
    return name.endswith("pos_embed") and not same


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
