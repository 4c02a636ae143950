"""Training losses: a network and one clean batch into named scalars, of which `loss` is minimised.

An objective is one or two passes over the same images and times, each along a route: `dsm` sees all
tokens, `msm` the visible ones (Lei et al. 2023), `mdt` all and then a masked set (Gao et al. 2023),
`edt` all and then all behind EDT's token masks (Chen et al. 2024). An objective with a loss of its
own is a file of its own (`maskdit`, `meanflow`), or a plugin's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from msmdiff.core import condition as conditions
from msmdiff.core import registry
from msmdiff.core.backbones.layers import gather_tokens, patchify
from msmdiff.core.backbones.routes import Route
from msmdiff.core.condition import Condition
from msmdiff.core.config import Config, settled
from msmdiff.core.diffusion import masking, time_sampling, variational
from msmdiff.core.diffusion.alignment import Alignment, Seen
from msmdiff.core.diffusion.masking import Mask
from msmdiff.core.diffusion.process import Process
from msmdiff.core.diffusion.suiting import does_not_suit, settle_route
from msmdiff.core.diffusion.time_sampling import Draw, TimeSampling
from msmdiff.core.registry import register
from msmdiff.core.sections import AUTO, MaskConfig, ObjectiveConfig
from msmdiff.core.seeding import sent

DrawRoute = Callable[[int, Draw], Route | None]
"""(batch size, draw) -> the route of a pass; None lets everyone through."""


def plain(batch: int, draw: Draw) -> None:
    """Everyone, through every block."""


@dataclass
class Stage:
    """The passes from a share of the training on.

    Attributes:
        start: that share, in [0, 1).
        passes: name -> routes.
        copies: times that each image is seen in a step.
    """

    start: float
    passes: dict[str, DrawRoute]
    copies: int = 1


class Objective:
    """The loss of one or two passes, each with noise, label dropout and route of its own.

    Args:
        process: the noise.
        times: how training times are drawn.
        passes: name -> its routes; a single pass is named "". Of the first stage of the training.
        config: distance, label dropout, how the variational bound counts.
        patch_size: side of the network's patches.
        condition: what the network is told, and its null.
        copies: times that each image is seen in a step, each with noise, time and tokens of its
            own.
        later: stages in which the passes are others.
    """

    def __init__(
        self,
        process: Process,
        times: TimeSampling,
        passes: dict[str, DrawRoute],
        config: ObjectiveConfig,
        *,
        patch_size: int,
        condition: Condition,
        copies: int = 1,
        later: Sequence[Stage] = (),
    ) -> None:
        self.copies = copies
        self.stages = [Stage(0.0, passes, copies), *later]
        self.process, self.times, self.passes, self.config = process, times, passes, config
        self.patch_size, self.condition = patch_size, condition
        self.distance = torch.abs if config.loss == "l1" else torch.square
        self.alignment: Alignment | None = None  # of a training, which sets it

    @property
    def forward_passes(self) -> float:
        """Passes of a step that are not followed by a backward one, for every one that is."""
        return 0.0

    @property
    def history(self) -> Any:
        """What a checkpoint has to keep of the time sampling; None where it has no memory."""
        return self.times if hasattr(self.times, "state_dict") else None

    def __call__(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        y: Tensor | None,
        draw: Draw,
        passed: float = 0.0,
    ) -> dict[str, Tensor]:
        """x0 [B, C, H, W] and labels y [B] or None, at the share of the training that has passed,
        -> scalars: `loss`, each pass's terms, and the `mask_ratio` drawn.

        Hidden pixels never reach a network that drops tokens.
        """
        stage = [stage for stage in self.stages if stage.start <= passed][-1]
        if stage.copies > 1:
            x0 = x0.repeat_interleave(stage.copies, dim=0)
            y = None if y is None else y.repeat_interleave(stage.copies, dim=0)
        t, importance = (sent(v, x0.device) for v in self.times.draw(len(x0), draw))
        aligns = self.alignment is not None and passed < self.alignment.until
        see = self.aligned if aligns else self.seen
        total, apart = torch.zeros(2, len(x0), device=x0.device)
        named: dict[str, Tensor] = {}
        for number, (name, route_of) in enumerate(stage.passes.items()):
            own = _numbered(draw, number)
            route = route_of(len(x0), own)
            terms = see(model, x0, t, y, route, own)
            # Times are drawn by the error of the prediction, not by how well features agree.
            total = total + terms["loss"]
            apart = apart + terms["alignment"].detach() if aligns else apart
            if len(stage.passes) > 1 or len(terms) > 2:
                for term, value in terms.items():
                    named[f"{name}_{term}" if name else term] = (value * importance).mean()
            if route is not None and route.keep is not None:
                share = route.keep.shape[1] * self.patch_size**2 / x0[0, 0].numel()
                named["mask_ratio"] = torch.full((), 1 - share, device=x0.device)
        if self.history is not None:
            self.history.update(t, total.detach() - apart)
        return {"loss": (total * importance).mean(), **named}

    def seen(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        t: Tensor,
        y: Tensor | None,
        route: Route | None,
        draw: Draw,
    ) -> dict[str, Tensor]:
        """One pass over x0 [B, C, H, W] at times t [B], its noise and label dropout drawn: what
        `terms` gives.
        """
        eps = torch.randn(x0.shape, generator=draw("noise"), device=x0.device)
        return self.terms(model, x0, eps, t, self._told(y, draw), route)

    def aligned(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        t: Tensor,
        y: Tensor | None,
        route: Route | None,
        draw: Draw,
    ) -> dict[str, Tensor]:
        """The same pass as `seen`, with the alignment's term."""
        alignment = self.alignment
        assert alignment is not None
        eps = torch.randn(x0.shape, generator=draw("noise"), device=x0.device)
        told = self._told(y, draw)
        with alignment.watching() as hidden:
            terms = self.terms(model, x0, eps, t, told, route)
        seen = Seen(x0=x0, eps=eps, t=t, y=told, route=route, hidden=hidden, draw=draw)
        term = alignment.weight * alignment.distance(seen)
        return {**terms, "loss": terms["loss"] + term, "alignment": term}

    def terms(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        eps: Tensor,
        t: Tensor,
        y: Tensor | None,
        route: Route | None,
    ) -> dict[str, Tensor]:
        """`variational.terms` of each image, [B], for given noise eps [B, C, H, W], times t [B] and
        route. The loss counts where the route says.
        """
        x_t = self.process.add_noise(x0, t, eps)
        output = self.process.feed(model, x_t, t, y, route)
        beside = self.beside(x_t, output, t, route)
        if route is not None and route.keep is not None and route.scored == "kept":
            if route.fill != "none":
                output = gather_tokens(patchify(output, self.patch_size), route.keep)
            x0, eps = (gather_tokens(patchify(z, self.patch_size), route.keep) for z in (x0, eps))
            x0, eps, output = (
                variational.channels_first(z, self.patch_size) for z in (x0, eps, output)
            )
        options = (self.distance, self.config.variational, self.config.channel_groups)
        terms = variational.terms(self.process, output, x0, eps, t, *options)
        for value in beside.values():
            terms["loss"] = terms["loss"] + value
        return {**terms, **beside}

    def beside(
        self, x_t: Tensor, output: Tensor, t: Tensor, route: Route | None
    ) -> dict[str, Tensor]:
        """What an objective adds to the error of the prediction, [B] each: here nothing."""
        return {}

    def _told(self, y: Tensor | None, draw: Draw) -> Tensor | None:
        """y with the null in a share of its rows; None for a network that is told nothing."""
        if y is None or isinstance(self.condition, conditions.Unconditional):
            return None
        if not self.config.label_dropout:
            return y
        dropped = torch.rand(len(y), generator=draw("label"), device=y.device)
        return conditions.drop(self.condition, y, dropped < self.config.label_dropout)


def _numbered(draw: Draw, number: int) -> Draw:
    """The draws of one pass; those of the first keep their plain names."""

    def own(purpose: str, *device: str) -> torch.Generator:
        return draw(f"{purpose}-{number}" if number else purpose, *device)

    return own


# ------------------------------------------------------------------ the objectives


@dataclass
class Setting:
    """What the passes of an objective are made of."""

    section: MaskConfig
    mask: Mask
    network: Any
    copies: int = 1

    def route(self, name: str) -> DrawRoute:
        """The routes of a name, for this mask and network; of `auto`, visible tokens."""
        entry = registry.find("route", "visible" if name == AUTO else name, "mask.route")
        made = entry.make(self.section, self.mask, self.network, **entry.takes(self.section))
        self.copies = max(self.copies, getattr(made, "copies", 1))
        return made.draw


class Kind(Protocol):
    """What is registered as an objective. An attribute `loss` may name a class of `Objective` with
    the constructor's options in front; `for_all_tokens`, True, says that a next stage which hides
    nothing keeps it. `error` and `over`, text, say what its loss is, where it is not the mean error
    of the prediction, over the tokens that the route of one pass says.
    """

    def settle(self, config: Config, backbone: Any) -> list[str]:
        """Complete what is left open, and say what does not go together."""

    def passes(self, setting: Setting) -> dict[str, DrawRoute]:
        """Name -> routes of each pass."""


@register("objective", "dsm")
class Dsm:
    """Denoising score matching: every token, in one pass."""

    def settle(self, config: Config, backbone: Any) -> list[str]:
        if not masking.hides(config.mask):
            return []
        return [
            f"objective.name 'dsm' sees every token, but mask.ratio is {config.mask.ratio}: use "
            "'msm', or a ratio of 0"
        ]

    def passes(self, setting: Setting) -> dict[str, DrawRoute]:
        return {"": plain}


@register("objective", "msm")
class Msm:
    """Masked score matching: one pass along the route that mask.route names, by default of the
    visible tokens only.
    """

    def settle(self, config: Config, backbone: Any) -> list[str]:
        return settle_route(config, backbone)

    def passes(self, setting: Setting) -> dict[str, DrawRoute]:
        return {"": setting.route(setting.section.route)}


@register("objective", "mdt")
class Mdt:
    """MDT's two passes: all tokens, and a masked set whose gaps the side-interpolater fills."""

    over: ClassVar = "all tokens, with and without the mask"

    def settle(self, config: Config, backbone: Any) -> list[str]:
        if backbone.published_objective != "mdt":
            return [does_not_suit(config, backbone)]
        mask: Any = config.mask
        if mask.route not in (AUTO, "side"):
            return [f"objective.name 'mdt' takes mask.route side, not {mask.route}"]
        mask.ratio = mask.ratio or 0.3
        if mask.spread is None:
            mask.spread = backbone.published_spread
        if mask.kind == "patch" and mask.ratio + mask.spread < 1:
            return []
        if mask.kind != "patch":
            return [
                "objective.name 'mdt' hides single tokens: mask.kind must be patch, not "
                f"{mask.kind}"
            ]
        return [
            f"objective.name 'mdt' hides up to mask.ratio {mask.ratio} plus mask.spread "
            f"{mask.spread} of the tokens: give less than 1 in all"
        ]

    def passes(self, setting: Setting) -> dict[str, DrawRoute]:
        return {"plain": plain, "masked": setting.route("side")}


@register("objective", "edt")
class Edt:
    """EDT's two passes: all tokens, and all behind masks that the network draws itself."""

    over: ClassVar = "all tokens, with and without the mask"

    def settle(self, config: Config, backbone: Any) -> list[str]:
        if backbone.published_objective != "edt":
            return [does_not_suit(config, backbone)]
        if not masking.hides(config.mask):
            return []
        ratio = config.mask.ratio
        return [f"objective.name 'edt' draws masks of its own: mask.ratio must be 0, not {ratio}"]

    def passes(self, setting: Setting) -> dict[str, DrawRoute]:
        def masked(batch: int, draw: Draw) -> Route:
            return setting.network.draw_masks(batch, draw("mask"))

        return {"plain": plain, "masked": masked}


def settle(config: Config, backbone: Any) -> list[str]:
    """Choose the objective where that is left open, as the backbone was published, and return what
    does not go together.
    """
    if config.objective.name == AUTO:
        routed = masking.hides(config.mask) or config.mask.route != AUTO
        model: Any = config.model
        light = config.mask.route == AUTO and getattr(model, "sparse", None) == "decoder"
        wanted = "maskdit" if light or config.mask.route == "maskdit" else "msm"
        config.objective.name = backbone.published_objective or (wanted if routed else "dsm")
        config.objective = settled("objective", config.objective)
    entry = registry.find("objective", config.objective.name, "objective.name")
    problems: list[str] = entry.make(**entry.takes(config.objective)).settle(config, backbone)
    chosen: Any = config.objective.model_dump()
    if config.model.model_dump().get("velocity_head") and chosen.get("tangent") != "head":
        problems.append(
            "model.velocity_head learns from objective.tangent head only (of objective.name "
            "meanflow): set that, or false"
        )
    if config.process.prediction == "average_velocity" and chosen["name"] != "meanflow":
        problems.append(
            "process.prediction average_velocity is learnt with objective.name meanflow only, not "
            f"{chosen['name']}: use velocity"
        )
    changes = len(masking.over_training(config.mask)) > 1
    if changes and config.objective.name not in ("msm", "maskdit"):
        problems.append(
            f"mask.schedule, mask.stages and mask.tail are of masked training with objective.name "
            f"msm or maskdit, not {config.objective.name}"
        )
    return problems


def idle(config: Config, network: Any) -> list[str]:
    """What a resolved `mask` section says that has no effect on this training, a sentence each."""
    section = config.mask
    name = {"msm": "visible", "mdt": "side"}.get(config.objective.name, "none")
    if section.route != AUTO:
        name = section.route
    taken = registry.entries("route")[name].options.model_fields if name != "none" else {}
    found = []
    for entry in registry.entries("route").values():
        for key, field in entry.options.model_fields.items():
            value = getattr(section, key, field.default)
            if key not in taken and value != field.default:
                found.append(f"mask.{key} {value} has no effect on the route {name}")
    route = registry.entries("route").get(section.route)
    needs_a_part = route is not None and getattr(route.make, "sparse", None)
    if route is not None and not needs_a_part and not masking.hides(section):
        found.append(f"mask.route {name} has no effect while mask.ratio is 0")
    joins = getattr(getattr(network, "trunk", None), "joins", None)
    options: Any = section
    if name == "tread" and joins and options.leave != taken["leave"].default:
        leave = network.trunk.symmetric_leave(options.enter, options.leave)
        found.append(
            f"mask.leave {options.leave} has no effect: the long skips let the route that enters "
            f"at block {options.enter} leave at {leave} of {network.trunk.depth}"
        )
    return list(dict.fromkeys(found))


def build(config: Config, process: Process, mask: Mask, network: Any) -> Objective:
    """The objective of a resolved configuration. `network` may lie on the meta device."""
    entry = registry.find("objective", config.objective.name, "objective.name")
    kind: Kind = entry.make(**entry.takes(config.objective))
    first, *later = _stages(config, kind, mask, network)
    return getattr(kind, "loss", Objective)(
        process,
        time_sampling.build(config.process, process.schedule),
        first.passes,
        config.objective,
        patch_size=network.patch_size,
        condition=conditions.of(config.model),
        copies=first.copies,
        later=later,
    )


def _stages(config: Config, kind: Kind, mask: Mask, network: Any) -> list[Stage]:
    """What the passes are over the training: those of `mask`, and of every later ratio."""
    stages = []
    for start, ratio in masking.over_training(config.mask):
        section = config.mask.model_copy(update={"ratio": ratio})
        seen = mask if start == 0 else masking.build(section, network.grid)
        setting = Setting(section, seen, network)
        stages.append(Stage(start, kind.passes(setting), setting.copies))
    return stages
