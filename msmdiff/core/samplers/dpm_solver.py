"""Exponential integrators: DPM-Solver, DPM-Solver++ (Lu et al. 2022) and UniPC (Zhao et al. 2023).

With the half log-SNR l = log(alpha / sigma), the probability-flow ODE from s to t has the exact
solution

    x_t = sigma_t / sigma_s x_s + alpha_t int_0^h e^(u - h) x0(l_s + u) du   (DPM-Solver++, UniPC)
    x_t = alpha_t / alpha_s x_s - sigma_t int_0^h e^(h - u) eps(l_s + u) du  (DPM-Solver)

where h = l_t - l_s. The second is the first with l, alpha, sigma and x0 replaced by -l, sigma,
alpha and eps, so that one code serves both. A method of order p puts a polynomial through p values
of the network; its integral is a weighted sum of them, with weights that depend on times only and
are computed before the first step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, StrictBool
from torch import Tensor

from msmdiff.core.diffusion.process import Denoiser, Noise
from msmdiff.core.diffusion.schedules import Schedule
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.registry import Entry, Options, register
from msmdiff.core.samplers.times import Plan, planned, subdivide
from msmdiff.core.sections import SampleConfig


class MultistepOptions(Options):
    order: Literal[1, 2, 3] = Field(2, description="The order of the method.")
    lower_order_final: StrictBool = Field(
        True,
        description="Lower the order in the last steps of a multistep method (of DPM-Solver only "
        "below 10 steps).",
    )
    denoise_to_zero: StrictBool = Field(
        False, description="Make one more evaluation at the end, which gives the clean image."
    )


class SolverOptions(MultistepOptions):
    method: Literal["multistep", "singlestep", "fast", "adaptive"] = Field(
        "multistep",
        description="How steps are combined: singlestep takes steps // order intervals, fast "
        "mixes orders to use all steps.",
    )
    taylor: StrictBool = Field(False, description="Take differences by Taylor expansion.")


class _Line:
    """The coordinates of one prediction: l, and the two scales, on a sequence of times."""

    def __init__(self, schedule: Schedule, times: Tensor, predicts: str) -> None:
        alpha, sigma = schedule.alpha_sigma(times)
        half = schedule.log_snr(times) / 2
        self.l, self.own, self.other = (
            (half, alpha, sigma) if predicts == "x0" else (-half, sigma, alpha)
        )

    def step(
        self, s: int, t: int, at: list[int], rule: Callable[[float, list[float]], list[float]]
    ) -> list[float]:
        """[factor of x_s, weights of the network's values at the times `at`] for the step from s to
        t.

        `rule` takes h and the places of those values in units of h from s.
        """
        h = (self.l[t] - self.l[s]).item()
        places = [((self.l[k] - self.l[s]) / h).item() for k in at]
        return [
            (self.other[t] / self.other[s]).item(),
            *(self.own[t].item() * w for w in rule(h, places)),
        ]


def interpolate(h: float, places: list[float], curvature: float = 1.0) -> list[float]:
    """Weights w with sum_j w_j m(places_j) = int_0^1 h e^(-h (1 - u)) p(u) du for the polynomial p
    through the values.

    `curvature` multiplies the integral of the quadratic term.
    """
    moments = [-torch.expm1(torch.tensor(-h, dtype=torch.float64)).item()]
    for k in range(1, len(places)):
        moments.append(1 - k * moments[-1] / h)
    if len(places) == 3:
        moments[2] *= curvature
    powers = torch.tensor(places, dtype=torch.float64) ** torch.arange(len(places))[:, None]
    return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()


def _midpoint(h: float, places: list[float]) -> list[float]:
    """The published rule of two values, one of them at the start: the slope counts half of the
    whole integral.
    """
    (whole,) = interpolate(h, [0.0])
    # The start stands second beside the value at the end, with which UniPC corrects.
    slope = whole / (2 * (places[0] + places[1]))
    return [whole - slope, slope] if places[0] == 0 else [slope, whole - slope]


def _single(h: float, places: list[float], taylor: bool) -> list[float]:
    """Values at the start and at inner places; the published third-order rule leaves out the first
    inner one.
    """
    if taylor or len(places) == 1:
        return interpolate(h, places)
    if len(places) == 2:
        return _midpoint(h, places)
    first, last = interpolate(h, [places[0], places[2]])
    return [first, 0.0, last]


def _multi(h: float, places: list[float], taylor: bool) -> list[float]:
    """Values at the start and before it. The published third-order rule halves the quadratic term,
    which leaves it at second-order accuracy; `unipc` takes it in full."""
    return (
        _midpoint(h, places)
        if len(places) == 2 and not taylor
        else interpolate(h, places, curvature=0.5)
    )


def _unified(h: float, places: list[float]) -> list[float]:
    """UniPC's published rule, for its predictor and its corrector: a single unknown coefficient is
    1/2, several are solved for (its B(h) = e^h - 1, `bh2`).
    """
    return _midpoint(h, places) if len(places) == 2 else interpolate(h, places)


def solver_orders(method: str, evaluations: int, order: int) -> list[int]:
    """The orders of a singlestep solver's steps, each of which takes as many evaluations as its
    order.

    `singlestep`: all of one order, as many as fit. `fast`: all evaluations are used, the last ones
    at lower order (Lu et al. 2022, appendix D.3). Raises UsageError for fewer evaluations than one
    step of `singlestep` takes.
    """
    if method == "singlestep":
        if evaluations < order:
            raise UsageError(
                f"sample.steps {evaluations} are fewer than one step of sample.order {order} takes"
            )
        return [order] * (evaluations // order)
    full, rest = divmod(evaluations, order)
    if order == 3 and rest == 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * bool(rest)


def _lay(
    schedule: Schedule, entry: Entry, section: SampleConfig, ends: tuple[float, float]
) -> Tensor:
    """The times of a solver, of a singlestep one with the inner ones of its steps."""
    given = {name: getattr(section, name) for name in SolverOptions.model_fields}
    options, steps = SolverOptions(**given), int(section.steps)
    # U-ViT's fast solver on even times goes through a fine grid; DPM-Solver-fast cuts equal steps
    # of log-SNR.
    fine = options.method == "fast" and entry.name != "logsnr"
    if options.method in ("multistep", "adaptive") or fine:
        return entry.make(schedule, steps, *ends)
    orders = solver_orders(options.method, steps, options.order)
    return subdivide(schedule, entry.make(schedule, len(orders), *ends), orders)


def _integrate(
    denoise: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    predicts: Literal["eps", "x0"],
    options: SolverOptions,
) -> Tensor:
    """x [B, C, H, W] at times[0] -> x at times[-1], of which a last zero is reached by one plain
    prediction of x0.

    Raises UsageError where there are fewer steps than the order has.
    """
    to_zero = bool(times[-1] == 0)
    visited = times[:-1] if to_zero else times
    if len(visited) > 1:
        line = _Line(schedule, visited, predicts)

        def evaluate(x: Tensor, at: int) -> Tensor:
            return getattr(denoise(x, visited[at]), predicts)

        if options.method == "adaptive":
            x = _adaptive(
                denoise=denoise,
                schedule=schedule,
                x=x,
                times=visited,
                predicts=predicts,
                order=options.order,
            )
        elif options.method == "multistep":
            rule = partial(_multi, taylor=options.taylor)
            steps = len(visited) - 1
            lowers = options.lower_order_final and steps < 10
            x = _multistep(evaluate, line, x, _Multistep(rule, options.order, steps, lowers))
        else:
            x = _singlestep(
                evaluate=evaluate, line=line, x=x, evaluations=len(visited) - 1, options=options
            )
    return denoise(x, visited[-1]).x0 if to_zero else x


@register("sampler", "dpm_solver", SolverOptions)
@planned(Plan(stops=True, lay=_lay))
def dpm_solver(
    denoise: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise, **options: Any
) -> Tensor:
    """DPM-Solver: exponential integration of the noise (Lu et al. 2022)."""
    return _integrate(
        denoise=denoise,
        schedule=schedule,
        x=x,
        times=times,
        predicts="eps",
        options=SolverOptions(**options),
    )


@register("sampler", "dpm_solver++", SolverOptions)
@planned(Plan(stops=True, lay=_lay))
def dpm_solver_pp(
    denoise: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise, **options: Any
) -> Tensor:
    """DPM-Solver++: exponential integration of x0 (Lu et al. 2022)."""
    return _integrate(
        denoise=denoise,
        schedule=schedule,
        x=x,
        times=times,
        predicts="x0",
        options=SolverOptions(**options),
    )


@register("sampler", "unipc", MultistepOptions)
@planned(Plan(stops=True))
def unipc(
    denoise: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise, **options: Any
) -> Tensor:
    """UniPC: a predictor and a corrector that shares its evaluations (Zhao et al. 2023)."""
    given = MultistepOptions(**options)
    to_zero = bool(times[-1] == 0)
    visited = times[:-1] if to_zero else times
    if len(visited) > 1:
        line = _Line(schedule, visited, "x0")
        plan = _Multistep(
            rule=_unified,
            order=given.order,
            steps=len(visited) - 1,
            lowers=given.lower_order_final,
            corrects=True,
        )
        x = _multistep(lambda x, at: denoise(x, visited[at]).x0, line, x, plan)
    return denoise(x, visited[-1]).x0 if to_zero else x


def _combine(factors: list[float], x: Tensor, values: list[Tensor]) -> Tensor:
    out = factors[0] * x
    for factor, value in zip(factors[1:], values, strict=True):
        if factor:
            out = out.add_(value, alpha=factor)
    return out


def _singlestep(
    evaluate: Callable[[Tensor, int], Tensor],
    line: _Line,
    x: Tensor,
    evaluations: int,
    options: SolverOptions,
) -> Tensor:
    if options.method == "singlestep" and evaluations % options.order:
        raise UsageError(
            f"sample.method singlestep of order {options.order} cannot cut {evaluations} given "
            f"steps into threes or twos of its own: choose a multiple of {options.order}, method "
            "fast, or sample.times logsnr"
        )
    plan: list[tuple[int, bool, list[float]]] = []
    for order in solver_orders(options.method, evaluations, options.order):
        start = len(plan)
        for j in range(order):
            # Inner values come by Taylor expansion in either variant; only the last sum differs.
            rule = partial(_single, taylor=options.taylor or j < order - 1)
            places = list(range(start, start + j + 1))
            plan.append((start + j, j == order - 1, line.step(start, start + j + 1, places, rule)))
    base, current, values = x, x, []
    for at, ends, factors in plan:
        values.append(evaluate(current, at))
        current = _combine(factors, base, values)
        if ends:
            base, values = current, []
    return current


@dataclass
class _Multistep:
    """How a multistep method goes.

    Attributes:
        rule: weights of the values at hand for a step.
        order: of the method.
        steps: how many there are.
        lowers: the last steps are of lower order.
        corrects: go each step once more with the value at its end (UniC).
    """

    rule: Callable[[float, list[float]], list[float]]
    order: int
    steps: int
    lowers: bool
    corrects: bool = False


def _multistep(
    evaluate: Callable[[Tensor, int], Tensor], line: _Line, x: Tensor, plan: _Multistep
) -> Tensor:
    order, steps = plan.order, plan.steps
    if steps < order:
        raise UsageError(f"sample.steps {steps} are fewer than sample.order {order}")
    predictions: list[list[float]] = []
    corrections: list[list[float]] = [[0.0]]
    for i in range(steps):
        final = steps - i if plan.lowers else order
        past = list(range(i, i - min(order, i + 1, final), -1))
        predictions.append(line.step(i, i + 1, past, plan.rule))
        corrections.append(line.step(i, i + 1, [i + 1, *past], plan.rule))
    values: list[Tensor] = []
    before = x
    for i, factors in enumerate(predictions):
        values.insert(0, evaluate(x, i))
        if i and plan.corrects:
            x = _combine(corrections[i], before, values[: len(corrections[i]) - 1])
        before, x = x, _combine(factors, x, values[: len(factors) - 1])
        del values[order:]
    return x


def _adaptive(
    denoise: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    predicts: Literal["eps", "x0"],
    order: int,
) -> Tensor:
    """DPM-Solver-12 and -23 (Lu et al. 2022, appendix C): the difference of two orders sets the
    step.

    Each image of x [B, C, H, W] goes at a pace of its own, so that it is the same in any batch. The
    published code's points [B, D] share one pace, which the largest difference sets. Reading the
    differences makes the host wait at every step.
    """
    if order == 1:
        raise UsageError("sample.method adaptive compares two orders: set sample.order to 2 or 3")
    line = _Anywhere(schedule, predicts, x)
    paces = len(x) if x.ndim == 4 else 1
    time, end = times[0].to(x.dtype).expand(paces), times[-1].to(x.dtype)
    absolute, relative, safety = 0.0078, 0.05, 0.9
    lower, h = x, torch.full((paces,), 0.05, dtype=x.dtype)
    active = (time - end).abs() > 1e-5
    while active.any():
        ahead = line.time_at(line.half(time) + h)
        tried, better = _two_orders(
            denoise=denoise, line=line, x=x, span=(time, ahead), order=order
        )
        size = (relative * torch.maximum(tried.abs(), lower.abs())).clamp(min=absolute)
        error = ((better - tried) / size).flatten(1).square().mean(1).sqrt().cpu()
        error = error if paces > 1 else error.max()[None]
        if not error[active].isfinite().all():
            raise MsmdiffError(
                "sampling gave numbers that are not finite: try a method of fixed steps, or fp32"
            )
        taken = active & (error <= 1)
        x = torch.where(line.wide(taken), better, x)
        lower = torch.where(line.wide(taken), tried, lower)
        active = active & ~(taken & ((ahead - end).abs() <= 1e-5))
        # An image that is there goes through its last step again and again, unheeded: a step of
        # length 0 would divide by 0.
        time = torch.where(taken & active, ahead, time)
        wanted = safety * h * error.clamp(min=1e-30) ** (-1 / order)
        h = torch.where(active, torch.minimum(wanted, line.half(end) - line.half(time)), h)
    return x


class _Anywhere:
    """The coordinates of one prediction at any times [K], K being 1 or the B of x, in x's precision
    as published.
    """

    def __init__(self, schedule: Schedule, predicts: Literal["eps", "x0"], x: Tensor) -> None:
        self.schedule, self.predicts, self.x = schedule, predicts, x
        self.data = predicts == "x0"

    def half(self, t: Tensor) -> Tensor:
        return self.schedule.log_snr(t) / 2

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        return self.schedule.time_at(2 * half_log_snr).to(self.x.dtype)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction's own scale, and the other one."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return (alpha, sigma) if self.data else (sigma, alpha)

    def wide(self, values: Tensor) -> Tensor:
        """[K] -> [K, 1, ...], to stand beside x."""
        return values.view(-1, *[1] * (self.x.ndim - 1)).to(self.x.device)

    def evaluate(self, denoise: Denoiser, x: Tensor, t: Tensor) -> Tensor:
        """The network's value, at one number for all where there is one."""
        at = t[0] if len(t) == 1 else t.to(x.device)
        return getattr(denoise(x, at), self.predicts)


def _two_orders(
    denoise: Denoiser, line: _Anywhere, x: Tensor, span: tuple[Tensor, Tensor], order: int
) -> tuple[Tensor, Tensor]:
    """One step from span[0] to span[1] by the method of order - 1, and by that of `order`."""
    time, ahead = span
    width = line.half(ahead) - line.half(time)
    step = width if line.data else -width
    other, own_end, other_end = line.scales(time)[1], *line.scales(ahead)
    first = line.evaluate(denoise, x, time)
    slopes: list[Tensor] = []
    for k in range(1, order):
        inner, part = line.time_at(line.half(time) + k / order * width), k / order * step
        own, other_inner = line.scales(inner)
        guess = line.wide(other_inner / other) * x - line.wide(own * torch.expm1(-part)) * first
        if k == 2:
            curve = 2 * own * (torch.expm1(-part) / part + 1)
            guess = guess + line.wide(curve) * slopes[0]
        slopes.append(line.evaluate(denoise, guess, inner) - first)
    whole = -torch.expm1(-step)
    plain = line.wide(other_end / other) * x + line.wide(own_end * whole) * first
    tried = plain if order == 2 else plain + line.wide(1.5 * whole * own_end) * slopes[0]
    curve = whole if order == 2 else 1.5 * (1 - whole / step)
    return tried, plain + line.wide(own_end * curve) * slopes[-1]
