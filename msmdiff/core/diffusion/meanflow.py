"""MeanFlow (Geng et al. 2025, "Mean Flows for One-step Generative Modeling") and improved MeanFlow.

The network tells the average velocity u(x_t, r, t) of the way from time t down to r, with which one
step crosses it: x_r = x_t - (t - r) u. From (t - r) u = the integral of v over r..t follows, by the
derivative along the way, u = v - (t - r) du/dt: the training target, which needs no integral. Where
r = t it is flow matching's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.backbones.layers import gather_tokens, patchify, plain_attention, unpatchify
from msmdiff.core.backbones.routes import Route, partial
from msmdiff.core.condition import Unconditional
from msmdiff.core.config import Config
from msmdiff.core.diffusion import masking
from msmdiff.core.diffusion.flow import Velocity
from msmdiff.core.diffusion.objectives import DrawRoute, Objective, Setting, plain
from msmdiff.core.diffusion.schedules import Schedule
from msmdiff.core.diffusion.time_sampling import Draw
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import AUTO
from msmdiff.core.seeding import sent

JVP_COST = 2.0
"""Forward passes that one pass with its derivative costs: every product has two terms, of which
weights bring one."""


class AverageVelocityOptions(Options):
    time_scale: float = Field(
        1.0,
        gt=0,
        description="What times and intervals in 0..1 are multiplied by before the network embeds "
        "them; a large one makes their derivatives large.",
    )


@register("prediction", "average_velocity", AverageVelocityOptions)
class AverageVelocity(Velocity):
    """The mean of the velocity over a step down from t, and the velocity itself over none
    (MeanFlow).
    """

    def __init__(self, schedule: Schedule, *, time_scale: float = 1.0) -> None:
        super().__init__(schedule)
        self.time_scale = time_scale

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_t, self.time_scale * t.float()

    def interval(self, t: Tensor, until: Tensor) -> Tensor:
        """What the network is fed as the length of a step from t to `until`."""
        return self.time_scale * (t - until).float()


class MeanFlowOptions(Options):
    equal_times: float = Field(
        0.75,
        ge=0,
        le=1,
        description="The share of images with r = t, which learn the velocity itself (0.5 in the "
        "improved form).",
    )
    guidance_omega: float = Field(
        1.0,
        ge=0,
        le=100,
        description="The weight w of the sample's velocity in the guided velocity w v + (1 - w - "
        "k) u_null + k u_class, which is learnt.",
    )
    guidance_kappa: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The weight k of the class's velocity in it: the guidance scale is w / (1 - "
        "k), and 0 beside w = 1 learns without guidance.",
    )
    adaptive_power: float = Field(
        1.0,
        ge=0,
        le=2,
        description="The power p of the adaptive weight: squared errors S count S / (S + c)^p, "
        "without a gradient below.",
    )
    adaptive_offset: float = Field(0.01, gt=0, description="The offset c of the adaptive weight.")
    tangent: Literal["sample", "network", "head"] = Field(
        "sample",
        description="Along which velocity u is differentiated: the sample's, the network's own, "
        "or that of a velocity head (the last two are the improved form's).",
    )


@dataclass
class Way:
    """One pass over a batch.

    Attributes:
        x_t, t, r: where it starts, [B, C, H, W], and the times that it leads from and to, [B].
        y, route: what the network is told.
        apart: outside of so many images, the first ones, r is t.
    """

    x_t: Tensor
    t: Tensor
    r: Tensor
    y: Tensor | None
    route: Route | None
    apart: int

    def first(self) -> "Way":
        """The images whose times lie apart."""
        n, route = self.apart, self.route
        if route is not None and route.keep is not None:
            route = replace(route, keep=route.keep[:n])
        y = None if self.y is None else self.y[:n]
        return Way(self.x_t[:n], self.t[:n], self.r[:n], y, route, n)


class MeanFlow(Objective):
    """The loss of average velocities; `settings` are the objective's options."""

    settings: MeanFlowOptions

    def seen(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        t: Tensor,
        y: Tensor | None,
        route: Route | None,
        draw: Draw,
    ) -> dict[str, Tensor]:
        """As `Objective.seen`; the second time of each image is drawn like the first, and the two
        are sorted.
        """

        def second(purpose: str, *device: str) -> torch.Generator:
            return draw(f"{purpose}-until", *device)

        other = sent(self.times.draw(len(t), second)[0], t.device)
        t, r = torch.maximum(t, other), torch.minimum(t, other)
        # The number of images with r < t, right on average: a batch of few has to have some. One at
        # least is differentiated, so that all processes of a sharded training make the same passes;
        # where it has r = t, that adds nothing.
        chance = torch.rand((), generator=draw("apart", "cpu"), device="cpu").item()
        apart = min(int((1 - self.settings.equal_times) * len(t) + chance), len(t))
        r = torch.cat([r[:apart], t[apart:]])
        apart = max(apart, int(self.settings.equal_times < 1))
        eps = torch.randn(x0.shape, generator=draw("noise"), device=x0.device)
        told = self._told(y, draw)
        return self.averaged(model, x0, eps, Way(x0, t, r, told, route, apart))

    def terms(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        eps: Tensor,
        t: Tensor,
        y: Tensor | None,
        route: Route | None,
    ) -> dict[str, Tensor]:
        """The loss of r = t."""
        return self.averaged(model, x0, eps, Way(x0, t, t, y, route, 0))

    def averaged(
        self, model: Callable[..., Tensor], x0: Tensor, eps: Tensor, way: Way
    ) -> dict[str, Tensor]:
        """Of each image, [B]: the adaptive `loss`, the mean squared error `mse` behind it, and
        `correction`, the mean square of (t - r) du/dt. `way.x_t` is made here.
        """
        way = replace(way, x_t=self.process.add_noise(x0, way.t, eps))
        velocity = self._answered(self.process.target(x0, eps, way.t), way.route)
        velocity, along = self._guided(model, velocity, way)
        correction = self._correction(model, along, way)
        target = velocity - correction
        head = self.settings.tangent == "head"
        answer = self._ask(model, way, way.r, velocity=head or None)
        u, told = answer if head else (answer, None)
        error = (u.float() - target).flatten(1).square()
        terms = {"loss": self._adaptive(error), "mse": error.mean(1)}
        if told is not None:
            beside = (told.float() - velocity).flatten(1).square()
            terms["loss"] = terms["loss"] + self._adaptive(beside)
            terms["velocity_mse"] = beside.mean(1)
        return {**terms, "correction": correction.flatten(1).square().mean(1)}

    @property
    def forward_passes(self) -> float:
        """Without a gradient: those of guidance, of the tangent, and the derivative's."""
        settings, apart = self.settings, 1 - self.settings.equal_times
        guided = self._guides
        known = guided and settings.guidance_kappa > 0
        null = guided and settings.guidance_omega + settings.guidance_kappa != 1
        along = settings.tangent == "head" or (settings.tangent == "network" and not known)
        return known + null + apart * (JVP_COST + along)

    @property
    def _guides(self) -> bool:
        settings = self.settings
        off = settings.guidance_omega == 1 and settings.guidance_kappa == 0
        return not off and not isinstance(self.condition, Unconditional)

    def _ask(self, model: Callable[..., Tensor], way: Way, until: Tensor, **more: Any) -> Any:
        return self.process.feed(model, way.x_t, way.t, way.y, way.route, until=until, **more)

    @torch.no_grad()
    def _guided(
        self, model: Callable[..., Tensor], velocity: Tensor, way: Way
    ) -> tuple[Tensor, Tensor]:
        """The velocity that is learnt, guided (equation 19 of the paper), and the one that u is
        differentiated along, of the images that lie apart; both as the network answers.
        """
        settings, known = self.settings, None
        if self._guides:
            assert way.y is not None
            omega, kappa = settings.guidance_omega, settings.guidance_kappa
            guided = omega * velocity
            if omega + kappa != 1:
                nulls = replace(way, y=self.condition.nulls(way.y))
                guided = guided + (1 - omega - kappa) * self._ask(model, nulls, way.t).float()
            if kappa:
                known = self._ask(model, way, way.t).float()
                guided = guided + kappa * known
            velocity = guided
        if settings.tangent == "sample" or not way.apart:
            return velocity, velocity[: way.apart]
        if settings.tangent == "network" and known is not None:
            return velocity, known[: way.apart]
        few = way.first()
        if settings.tangent == "network":
            return velocity, self._ask(model, few, few.t).float()
        return velocity, self._ask(model, few, few.t, velocity=True)[1].float()

    @torch.no_grad()
    def _correction(self, model: Callable[..., Tensor], along: Tensor, way: Way) -> Tensor:
        """(t - r) du/dt of every image, as the network answers: zero where r = t."""
        if not way.apart:
            return torch.zeros_like(self._answered(way.x_t, way.route))
        few = way.first()

        def average(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return self._ask(model, replace(few, x_t=x, t=t), r)

        at = (few.x_t, few.t, few.r)
        tangents = (self._imaged(along, few), torch.ones_like(few.t), torch.zeros_like(few.r))
        # Compiled blocks know no forward derivatives.
        with plain_attention(), torch.compiler.set_stance("force_eager"):
            rate = torch.func.jvp(average, at, tangents)[1].float()
        moved = (few.t - few.r).view(-1, *[1] * (rate.ndim - 1)) * rate
        equal = moved.new_zeros(len(way.t) - way.apart, *moved.shape[1:])
        return torch.cat([moved, equal])

    def _adaptive(self, error: Tensor) -> Tensor:
        """Squared errors [B, N] -> S / (S + c)^p of each image's sum S, [B]."""
        total = error.sum(1)
        offset, power = self.settings.adaptive_offset, self.settings.adaptive_power
        return total / (total.detach() + offset) ** power

    def _answered(self, image: Tensor, route: Route | None) -> Tensor:
        """An image as the network answers along a route: whole, or its kept patches."""
        if not partial(route):
            return image
        assert route is not None
        assert route.keep is not None
        return gather_tokens(patchify(image, self.patch_size), route.keep)

    def _imaged(self, answer: Tensor, way: Way) -> Tensor:
        """The other way round; nobody looks at hidden patches, which are zero."""
        if not partial(way.route):
            return answer
        assert way.route is not None
        assert way.route.keep is not None
        tokens = torch.zeros_like(patchify(way.x_t, self.patch_size))
        place = way.route.keep.unsqueeze(-1).expand_as(answer)
        rows, columns = (side // self.patch_size for side in way.x_t.shape[2:])
        return unpatchify(tokens.scatter(1, place, answer), self.patch_size, (rows, columns))


@register("objective", "meanflow", MeanFlowOptions)
class MeanFlowKind:
    """MeanFlow: the average velocity between two times, with which one to four steps draw an image
    (sampler meanflow).
    """

    for_all_tokens: ClassVar = True

    def __init__(self, **options: Any) -> None:
        self.settings = MeanFlowOptions(**options)

    @property
    def error(self) -> str:
        """The loss in words."""
        power, offset = self.settings.adaptive_power, self.settings.adaptive_offset
        beside = " and of its velocity head" if self.settings.tangent == "head" else ""
        return f"adaptive error S / (S + {offset:g})^{power:g}{beside}"

    def settle(self, config: Config, backbone: Any) -> list[str]:
        """Give the network what it needs, and say what does not go together."""
        return [
            *_wrong_process(config),
            *_wrong_network(config, self.settings),
            *_wrong_guidance(config, self.settings),
            *_wrong_mask(config, backbone),
        ]

    def passes(self, setting: Setting) -> dict[str, DrawRoute]:
        hides = masking.hides(setting.section)
        return {"": setting.route("visible") if hides else plain}

    def loss(self, *arguments: Any, **options: Any) -> Objective:
        """What `build` makes for this objective."""
        made = MeanFlow(*arguments, **options)
        made.settings = self.settings
        return made


def _wrong_process(config: Config) -> list[str]:
    wanted = {
        "process.schedule": (config.process.schedule, "flow"),
        "process.prediction": (config.process.prediction, "average_velocity"),
        "process.weighting": (config.process.weighting, "uniform"),
        "objective.loss": (config.objective.loss, "mse"),
        "objective.channel_groups": (config.objective.channel_groups, None),
    }
    return [
        f"objective.name meanflow needs {key} {'null' if value is None else value}, not {found}"
        for key, (found, value) in wanted.items()
        if found != value
    ]


def _wrong_network(config: Config, settings: MeanFlowOptions) -> list[str]:
    model: Any = config.model
    if not hasattr(model, "interval_embed"):
        return [
            f"objective.name meanflow needs a network that is told how long a step is, and "
            f"model.family {model.family} is not: use dit or uvit"
        ]
    model.interval_embed = True
    if settings.tangent == "head":
        model.velocity_head = True
    return []


def _wrong_guidance(config: Config, settings: MeanFlowOptions) -> list[str]:
    model: Any = config.model
    if settings.guidance_omega == 1 and settings.guidance_kappa == 0:
        return []
    asked = (
        f"objective.guidance_omega {settings.guidance_omega:g} and guidance_kappa "
        f"{settings.guidance_kappa:g} ask for guidance"
    )
    if not model.num_classes and not getattr(model, "context_tokens", 0):
        return [f"{asked}, and the network knows no classes: set 1 and 0, or model.num_classes"]
    if not config.objective.label_dropout:
        return [f"{asked}, for which the null class must be learnt: set objective.label_dropout"]
    return []


def _wrong_mask(config: Config, backbone: Any) -> list[str]:
    if not masking.hides(config.mask):
        return []
    if config.mask.route not in (AUTO, "visible"):
        return [
            f"objective.name meanflow hides tokens along mask.route visible, not "
            f"{config.mask.route}"
        ]
    config.mask.route = "visible"
    if "none" not in backbone.fills or getattr(config.model, "sparse", "none") != "none":
        return ["objective.name meanflow with a mask needs a network with model.sparse none"]
    return []
