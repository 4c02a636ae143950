"""Exponential integrators: DPM-Solver, DPM-Solver++ (Lu et al. 2022) and UniPC (Zhao et al. 2023).

With the half log-SNR l = log(alpha / sigma), the probability-flow ODE from s to t has the exact
solution

    x_t = sigma_t / sigma_s x_s + alpha_t  int_0^h e^(u - h) x0(l_s + u) du      (DPM-Solver++,
    UniPC) x_t = alpha_t / alpha_s x_s - sigma_t  int_0^h e^(h - u) eps(l_s + u) du     (DPM-Solver)

where h = l_t - l_s. The second is the first with l, alpha, sigma and x0 replaced by -l, sigma,
alpha and eps, so that one code serves both. A method of order p puts a polynomial through p values
of the network; its integral is a weighted sum of them, with weights that depend on times only and
are computed before the first step.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from msmdiff.core.config import SampleConfig
from msmdiff.core.diffusion.process import Denoiser, Noise, Process
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.samplers.times import solver_orders


class _Line:
    """The coordinates of one prediction: l, and the two scales, on a sequence of times."""

    def __init__(self, process: Process, times: Tensor, predicts: str) -> None:
        alpha, sigma = process.alpha_sigma(times)
        half = process.log_snr(times) / 2
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
    """The published second-order rule: the slope counts half of the whole integral."""
    (whole,) = interpolate(h, [0.0])
    return [whole - whole / (2 * places[1]), whole / (2 * places[1])]


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


def sample(
    denoise: Denoiser,
    process: Process,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    options: SampleConfig,
) -> Tensor:
    """x [B, C, H, W] at times[0] -> x at times[-1], of which a last zero is reached by one plain
    prediction of x0.

    A singlestep method's times include the inner ones of its steps, see `times.visited`. Raises
    UsageError where there are fewer steps than the order has.
    """
    predicts = "eps" if options.sampler == "dpm_solver" else "x0"
    to_zero = bool(times[-1] == 0)
    visited = times[:-1] if to_zero else times
    if len(visited) > 1:
        line = _Line(process, visited, predicts)

        def evaluate(x: Tensor, at: int) -> Tensor:
            return getattr(denoise(x, visited[at]), predicts)

        if options.method == "adaptive" and options.sampler != "unipc":
            x = _adaptive(denoise, process, x, visited[0], visited[-1], predicts, options)
        elif options.method == "multistep" or options.sampler == "unipc":
            x = _multistep(evaluate, line, x, len(visited) - 1, options)
        else:
            x = _singlestep(evaluate, line, x, len(visited) - 1, options)
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
    options: SampleConfig,
) -> Tensor:
    if options.method == "singlestep" and evaluations % options.order:
        raise UsageError(
            f"sample.method singlestep of order {options.order} cannot cut {evaluations} given "
            "steps into threes or "
            f"twos of its own: choose a multiple of {options.order}, method fast, or "
            "sample.grid logsnr"
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


def _multistep(
    evaluate: Callable[[Tensor, int], Tensor],
    line: _Line,
    x: Tensor,
    steps: int,
    options: SampleConfig,
) -> Tensor:
    if steps < options.order:
        raise UsageError(f"sample.steps {steps} are fewer than sample.order {options.order}")
    unipc, plan, corrections = options.sampler == "unipc", [], [[0.0]]
    rule = interpolate if unipc else partial(_multi, taylor=options.taylor)
    for i in range(steps):
        order = min(
            options.order, i + 1, steps - i if options.lower_order_final and steps < 10 else 3
        )
        past = list(range(i, i - order, -1))
        plan.append(line.step(i, i + 1, past, rule))
        corrections.append(line.step(i, i + 1, [i + 1, *past], interpolate))
    values: list[Tensor] = []
    before = x
    for i, factors in enumerate(plan):
        values.insert(0, evaluate(x, i))
        if i and unipc:  # UniC: the step that led here once more, with the value at its end
            x = _combine(corrections[i], before, values[: len(corrections[i]) - 1])
        before, x = x, _combine(factors, x, values[: len(factors) - 1])
        del values[options.order :]
    return x


def _adaptive(
    denoise: Denoiser,
    process: Process,
    x: Tensor,
    start: Tensor,
    end: Tensor,
    predicts: str,
    options: SampleConfig,
) -> Tensor:
    """DPM-Solver-12 and -23 (Lu et al. 2022, appendix C): the difference of two orders sets the
    step.

    Reading that difference makes the host wait at every step, and couples the images of a batch.
    """
    if options.order == 1:
        raise UsageError("sample.method adaptive compares two orders: set sample.order to 2 or 3")
    order, data, lower = options.order, predicts == "x0", x
    absolute, relative, safety = 0.0078, 0.05, 0.9
    time, end = start.to(x.dtype), end.to(x.dtype)
    h = torch.tensor(0.05, dtype=x.dtype)

    def half(t: Tensor) -> Tensor:
        return process.log_snr(t) / 2

    def time_at(half_log_snr: Tensor) -> Tensor:
        return process.time_at(2 * half_log_snr).to(x.dtype)

    def scales(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.alpha_sigma(t)
        return (alpha, sigma) if data else (sigma, alpha)

    while abs((time - end).item()) > 1e-5:
        ahead = time_at(half(time) + h)
        span = half(ahead) - half(time)
        step = span if data else -span
        other, own_end, other_end = scales(time)[1], *scales(ahead)
        first = getattr(denoise(x, time), predicts)
        slopes: list[Tensor] = []
        for k in range(1, order):
            inner, part = time_at(half(time) + k / order * span), k / order * step
            own, other_inner = scales(inner)
            guess = other_inner / other * x - own * torch.expm1(-part) * first
            if k == 2:
                guess = guess + 2 * own * (torch.expm1(-part) / part + 1) * slopes[0]
            slopes.append(getattr(denoise(guess, inner), predicts) - first)
        whole = -torch.expm1(-step)
        plain = other_end / other * x + own_end * whole * first
        tried = plain if order == 2 else plain + 1.5 * whole * own_end * slopes[0]
        curve = whole if order == 2 else 1.5 * (1 - whole / step)
        better = plain + own_end * curve * slopes[-1]
        size = (relative * torch.maximum(tried.abs(), lower.abs())).clamp(min=absolute)
        error = ((better - tried) / size).flatten(1).square().mean(1).sqrt().max().cpu()
        if not error.isfinite():
            raise MsmdiffError(
                "sampling gave numbers that are not finite: try a method of fixed steps, or fp32"
            )
        if error <= 1:
            x, lower, time = better, tried, ahead
        h = torch.minimum(
            safety * h * error.clamp(min=1e-30) ** (-1 / order), half(end) - half(time)
        )
    return x
