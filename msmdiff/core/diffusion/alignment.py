"""Alignment: a term beside the loss that pulls hidden tokens of a network towards better features
of the same image, so that it learns faster.

LayerSync takes the features of one of its own later blocks, SRA those of its average at less noise;
REPA, which takes another network's, is a file of its own (`repa`). Features are compared at the
tokens that both have, so that masked training aligns what it sees. A new one is a class here or in
a plugin.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from msmdiff.core import registry
from msmdiff.core.backbones.layers import gather_tokens
from msmdiff.core.backbones.routes import Hidden, Route, Trunk
from msmdiff.core.diffusion.codecs import Codec
from msmdiff.core.diffusion.process import Process
from msmdiff.core.diffusion.schedules import Table
from msmdiff.core.diffusion.time_sampling import Draw
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import ObjectiveConfig

OF_XL = 28
"""Blocks of the networks whose numbers of blocks the papers give."""

WIDEST = 2048
"""The papers' projectors are as wide."""


@dataclass
class Surroundings:
    """What an alignment is made for.

    Attributes:
        network: the student, perhaps on the meta device; only looked at.
        process, codec: what its numbers mean.
    """

    network: Any
    process: Process
    codec: Codec

    @property
    def trunk(self) -> Trunk:
        """Raises UsageError for a network that has no blocks to look behind."""
        trunk = getattr(self.network, "trunk", None)
        if trunk is None:
            raise UsageError(
                "objective.alignment looks at a network's hidden tokens, and this one shows none: "
                "use model.family uvit or dit, or alignment none"
            )
        return trunk

    def behind(self, option: str, block: int | None, of_xl: int) -> int:
        """The number of blocks behind which is looked; by default the same share of the network as
        `of_xl` are of XL's. Raises UsageError where there are not as many.
        """
        depth = self.trunk.depth
        if block is None:
            return min(max(1, round(of_xl * depth / OF_XL)), depth)
        if not 1 <= block <= depth:
            raise UsageError(f"objective.{option} {block}: this network has blocks 1 to {depth}")
        return block


@dataclass
class Seen:
    """One pass, as an alignment sees it.

    Attributes:
        x0, eps, t: the batch [B, C, H, W], its noise, its times [B].
        y, route: what the network was told.
        hidden: the tokens behind the blocks that are watched, by the blocks' number.
        draw: the batch's generators.
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    y: Tensor | None
    route: Route | None
    hidden: Mapping[int, Hidden]
    draw: Draw


class AlignmentOptions(Options):
    align_weight: float = Field(0.5, ge=0, le=100, description="The weight of the alignment.")
    align_until: float = Field(
        1.0,
        gt=0,
        le=1,
        description="The share of the training after which the alignment is off (HASTE).",
    )
    align_block: int | None = Field(
        None,
        ge=1,
        description="The number of blocks behind which tokens are aligned; null takes the paper's "
        "share of the network.",
    )


class Alignment:
    """One alignment of one training.

    Attributes:
        weight, until: of the term, and the share of the training after which it is off.
        student: the number of blocks behind which tokens are aligned.
        projector: trained beside the network, and no part of its weights; None where features are
            compared as they are.
        averaged: whether it needs a moving average of the weights.
    """

    averaged: ClassVar[bool] = False
    projector: nn.Module | None = None

    def __init__(
        self, around: Surroundings, weight: float, until: float, watched: tuple[int, ...]
    ) -> None:
        self.around, self.weight, self.until = around, weight, until
        self._watched, self.student = watched, watched[0]
        self._project: Any = None
        self.hidden_size: int = around.network.hidden_size

    def start(
        self,
        device: torch.device,
        averages: Mapping[str, nn.Module],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Get ready for training: once, before the first step.

        Args:
            averages: the moving averages of the network, by decay; the first one teaches.
            autocast: the precision of the training's passes.

        Raises UsageError or MsmdiffError for what is missing.
        """
        if self.projector is not None:
            self.projector.to(device)

    def prepare(self, prepare: Callable[[nn.Module], Any]) -> None:
        """Let several processes share what the projector learns, and train it in their precision:
        Accelerate's `prepare`, which may wrap it.
        """
        if self.projector is not None:
            self._project = prepare(self.projector)

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser trains beside the network."""
        return [] if self.projector is None else list(self.projector.parameters())

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {} if self.projector is None else {"projector": self.projector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError where it was another one."""
        if self.projector is not None:
            self.projector.load_state_dict(state["projector"])

    @contextmanager
    def watching(self) -> Iterator[Mapping[int, Hidden]]:
        """Inside, what the student's blocks make of a batch is kept."""
        with self.around.trunk.watching(self._watched) as hidden:
            yield hidden

    def projected(self, hidden: Hidden) -> Hidden:
        """The student's tokens as they are compared with the features."""
        if self.projector is None:
            return hidden
        return Hidden((self._project or self.projector)(hidden.tokens), hidden.keep)

    def distance(self, seen: Seen) -> Tensor:
        """How far the tokens are from the features, [B]: 0 where they are equal."""
        raise NotImplementedError

    def passes(self, forward: int, masked: int) -> int:
        """Operations of other networks for one image, where the student's pass takes `forward` with
        all tokens and `masked` with the mask.
        """
        return 0

    def rehearsal(self) -> nn.Module | None:
        """Frozen networks that are not the student's own, on the meta device: called with x0 [B,
        *shape] they do what a step does with them, to be counted.
        """
        return None


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of tokens a and b [B, K, D], their mean, [B]."""
    return (1 - F.cosine_similarity(a.float(), b.float(), dim=-1)).mean(1)


def paired(a: Hidden, b: Hidden) -> tuple[Tensor, Tensor]:
    """The tokens of both, at the places that both have: two of [B, K, D]."""
    if a.keep is None and b.keep is not None:
        return gather_tokens(a.tokens, b.keep), b.tokens
    if b.keep is None and a.keep is not None:
        return a.tokens, gather_tokens(b.tokens, a.keep)
    return a.tokens, b.tokens


def projection(width: int, inner: int | None, out: int) -> nn.Sequential:
    """REPA's projector: Linear, SiLU, Linear, SiLU, Linear; `inner` None is 2048, or 4 x width
    where that is less.
    """
    inner = inner or min(WIDEST, 4 * width)
    return nn.Sequential(
        nn.Linear(width, inner),
        nn.SiLU(),
        nn.Linear(inner, inner),
        nn.SiLU(),
        nn.Linear(inner, out),
    )


# ------------------------------------------------------------------ without another network


@register("alignment", "none")
def none(around: Surroundings) -> None:
    """No alignment."""


class LayerSyncOptions(AlignmentOptions):
    align_weight: float = Field(0.2, ge=0, le=100, description="The weight of the alignment.")
    align_to: int | None = Field(
        None,
        ge=1,
        description="The number of blocks behind which the features lie; null takes the paper's "
        "share of the network.",
    )


@register("alignment", "layersync", LayerSyncOptions)
class LayerSync(Alignment):
    """LayerSync: early tokens follow those of a later block of the same pass, by their cosine."""

    def __init__(
        self,
        around: Surroundings,
        *,
        align_weight: float,
        align_until: float,
        align_block: int | None,
        align_to: int | None,
    ) -> None:
        early = around.behind("align_block", align_block, 8)
        self.late = around.behind("align_to", align_to, 16)
        if early >= self.late:
            raise UsageError(
                f"objective.align_to {self.late} must lie behind objective.align_block {early}: "
                "early tokens follow later ones"
            )
        super().__init__(around, align_weight, align_until, (early, self.late))

    def distance(self, seen: Seen) -> Tensor:
        early, late = paired(seen.hidden[self.student], seen.hidden[self.late])
        return cosine_distance(early, late.detach())


class SraOptions(AlignmentOptions):
    align_to: int | None = Field(
        None,
        ge=1,
        description="The number of the average's blocks behind which the features lie; null takes "
        "the paper's share of the network.",
    )
    align_earlier: float = Field(
        0.2,
        ge=0,
        le=1,
        description="The average sees the image at a time that is lower by up to this.",
    )
    align_sees: Literal["kept", "all"] = Field(
        "kept",
        description="Which tokens the average sees of a masked image: those that the network "
        "sees, or all at the price of a whole pass.",
    )
    align_width: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="The width of the projector; null takes 2048, or 4 x hidden_size where that "
        "is less.",
    )


@register("alignment", "sra", SraOptions)
class Sra(Alignment):
    """SRA: projected tokens follow a later block of the network's average, which sees the image at
    less noise; the distance is smooth L1.
    """

    averaged = True

    def __init__(
        self,
        around: Surroundings,
        *,
        align_weight: float,
        align_until: float,
        align_block: int | None,
        align_to: int | None,
        align_earlier: float,
        align_sees: Literal["kept", "all"],
        align_width: int | None,
    ) -> None:
        early = around.behind("align_block", align_block, 8)
        self.late = around.behind("align_to", align_to, 20)
        super().__init__(around, align_weight, align_until, (early,))
        self.earlier, self.sees = align_earlier, align_sees
        self.projector = projection(self.hidden_size, align_width, self.hidden_size)

    def start(
        self,
        device: torch.device,
        averages: Mapping[str, nn.Module],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().start(device, averages, autocast)
        self.teacher: Any = next(iter(averages.values()))
        self.autocast = autocast

    def distance(self, seen: Seen) -> Tensor:
        student = self.projected(seen.hidden[self.student])
        told, features = paired(student, self.features(seen))
        each = F.smooth_l1_loss(told.float(), features.float(), reduction="none", beta=0.05)
        return each.flatten(1).mean(1)

    @torch.no_grad()
    def features(self, seen: Seen) -> Hidden:
        """What the average's later block makes of the same noise at an earlier time."""
        process = self.around.process
        lower = torch.rand(len(seen.t), generator=seen.draw("alignment"), device=seen.t.device)
        t = self._time(seen.t - self.earlier * lower)
        x_t = process.add_noise(seen.x0, t, seen.eps)
        route = seen.route if self.sees == "kept" else None
        with self.autocast(), self.teacher.trunk.watching((self.late,)) as hidden:
            process.feed(self.teacher, x_t, t, seen.y, route)
        return hidden[self.late]

    def passes(self, forward: int, masked: int) -> int:
        return masked if self.sees == "kept" else forward

    def _time(self, t: Tensor) -> Tensor:
        """The nearest time that the schedule has."""
        schedule = self.around.process.schedule
        if isinstance(schedule, Table):
            return (t * schedule.timesteps).round().clamp(min=1) / schedule.timesteps
        return t.clamp(min=schedule.earliest)


# ------------------------------------------------------------------ what a configuration asks for


def build(config: ObjectiveConfig, around: Surroundings) -> Alignment | None:
    """The alignment of an `objective` section; None where it asks for none.

    Raises UsageError for blocks that the network has not.
    """
    entry = registry.find("alignment", config.alignment, "objective.alignment")
    return entry.make(around, **entry.takes(config))


def keys(config: ObjectiveConfig) -> dict[str, Any]:
    """The keys of an `objective` section that choose its alignment."""
    entry = registry.find("alignment", config.alignment, "objective.alignment")
    return {"alignment": entry.name, **entry.takes(config)}


def words(config: ObjectiveConfig) -> str:
    """What the term adds to the words for a loss; nothing without one."""
    chosen = keys(config)
    if config.alignment == "none":
        return ""
    weight = f"{chosen['align_weight']:g} x " if "align_weight" in chosen else ""
    until = chosen.get("align_until", 1.0)
    ends = f" until {until:.0%} of the training" if until < 1 else ""
    return f", plus {weight}alignment ({config.alignment}){ends}"


def during(config: ObjectiveConfig, start: float, end: float) -> dict[str, Any]:
    """These keys for a training that is the part from start to end of the section's own, which are
    shares of it.
    """
    chosen = keys(config)
    share = (chosen.get("align_until", 1.0) - start) / (end - start)
    if share <= 0:
        return {"alignment": "none"}
    return {**chosen, "align_until": min(share, 1.0)} if "align_until" in chosen else chosen
