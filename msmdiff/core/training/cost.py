"""What a configuration costs, counted on the meta device before anything is allocated."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from msmdiff.core import build as road
from msmdiff.core.backbones.routes import Hidden, Route
from msmdiff.core.config import Config, section
from msmdiff.core.diffusion import alignment, masking
from msmdiff.core.seeding import stream


@dataclass
class Cost:
    """Counts for one configuration.

    Attributes:
        parameters: numbers in the network.
        forward_flops: floating-point operations of one image's forward pass with every token (a
            multiply-add is two).
        masked_flops: the same with the mask.
        tokens, kept: tokens of an image, and those that the mask keeps.
        two_passes: a training step runs the network twice, without and with the mask.
        copies: passes with other tokens of the same image.
        forward_passes: passes of a training step without a backward one, in those with.
        alignment_flops: what an alignment adds to a step for one image, on average over a training.
    """

    parameters: int
    forward_flops: int
    masked_flops: int
    tokens: int
    kept: int
    two_passes: bool = False
    copies: int = 1
    forward_passes: float = 0.0
    alignment_flops: int = 0

    @property
    def step_flops(self) -> int:
        """Per image of a training step: the backward pass costs two forward passes."""
        trained = 3 * (self.copies * self.masked_flops + self.two_passes * self.forward_flops)
        beside = round(self.forward_passes * self.masked_flops) + self.alignment_flops
        return trained + self.copies * beside


def measure(config: Config) -> Cost:
    """Count one image's forward pass through a resolved configuration, with and without its
    mask.
    """
    with torch.device("meta"):
        parts = road.build(config)
        network = parts.backbone
        x, t = torch.empty(1, *parts.codec.shape), torch.empty(1)
        y = parts.objective.condition.example(1, "meta")
        route = _route(parts)
        with FlopCounterMode(display=False) as full, torch.no_grad():
            network(x, t, y)
        with FlopCounterMode(display=False) as masked, torch.no_grad():
            network(x, t, y, route)
        aligned = _alignment_flops(config, parts, full.get_total_flops(), masked.get_total_flops())
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        forward_flops=full.get_total_flops(),
        masked_flops=masked.get_total_flops(),
        tokens=parts.mask.tokens,
        kept=parts.mask.kept,
        two_passes=len(parts.objective.passes) > 1,
        copies=parts.objective.copies,
        forward_passes=parts.objective.forward_passes,
        alignment_flops=aligned,
    )


def _alignment_flops(config: Config, parts: road.Parts, forward: int, masked: int) -> int:
    """Of a projector, forth and back, and of the networks that are followed; their mean over the
    training. The default device is meta.
    """
    made = parts.alignment(config)
    if made is None:
        return 0
    kept, tokens = parts.mask.kept, parts.mask.tokens
    keep = None if kept == tokens else torch.empty(1, kept, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made.projected(Hidden(torch.empty(1, kept, made.hidden_size), keep))
    projected = counter.get_total_flops()
    return round(made.until * (3 * projected + made.passes(forward, masked)))


def pieces(config: Config) -> Iterator[tuple[float, Config]]:
    """(share of the training, configuration with that ratio all the while) of a mask that changes
    over a training; of one that does not, one piece.
    """
    ratios = masking.over_training(config.mask)
    ends = [start for start, _ in ratios[1:]] + [1.0]
    for (start, ratio), end in zip(ratios, ends, strict=True):
        piece = config.model_copy(deep=True)
        piece.mask.ratio, piece.mask.tail, piece.mask.schedule = ratio, 0.0, "constant"
        own = piece.objective.model_dump(exclude=set(alignment.keys(config.objective)))
        if not masking.hides(piece.mask) and piece.objective.name in ("msm", "maskdit"):
            own = {"name": "dsm"}
        aligned = alignment.during(config.objective, start, end)
        piece.objective = section("objective", **own, **aligned)
        yield end - start, piece


def flops_per_image(config: Config) -> float:
    """Of a training step, for one image, over all ratios that the mask goes through."""
    return sum(share * measure(piece).step_flops for share, piece in pieces(config))


def _route(parts: road.Parts) -> Route | None:
    """The route of the masked pass, with as many tokens as the mask keeps, on the meta device."""
    *_, route_of = parts.objective.passes.values()
    copies = parts.objective.copies
    route = route_of(copies, lambda purpose, device="cpu": stream(device, 0, purpose))
    if route is None or route.keep is None:
        return None
    keep = torch.empty(1, parts.mask.kept, dtype=torch.long, device="meta")
    return replace(route, keep=keep, dropped=False)
