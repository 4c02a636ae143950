"""Runs the golden calls of schedules, samplers and solvers: processes and samplers on analytic
networks.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden import Case
from torch import Tensor, nn

from msmdiff.core import registry
from msmdiff.core.config import section
from msmdiff.core.diffusion.predictions import Estimate
from msmdiff.core.diffusion.process import Process, build
from msmdiff.core.diffusion.schedules import Table, VpCosine, linear
from msmdiff.core.samplers import ddpm, dpm_solver, times
from msmdiff.core.training.ema import Averages

Outputs = dict[str, Tensor]
Runner = Callable[[Case, dict[str, Any]], Outputs]

SCALARS = {
    "steps",
    "timestep_respacing",
    "clip_denoised",
    "eta",
    "step_noises",
    "schedule",
    "method",
    "order",
}
SCALARS |= {
    "skip_type",
    "eps",
    "T",
    "predict_x0",
    "solver_type",
    "patched",
    "source",
    "algorithm_type",
}
SCALARS |= {
    "rescale_learned_sigmas",
    "predict_xstart",
    "use_kl",
    "learn_sigma",
    "lower_order_final",
    "timesteps",
    "sampling_timesteps",
    "sample_steps",
}


def process_of(case: Case, schedule: str | None = None) -> Process:
    """The case's process: its own schedule unless another is named."""
    steps = case.hyper.get("diffusion_steps", case.hyper.get("timesteps", 1000))
    return build(
        section("process", schedule=schedule or case.hyper.get("noise_schedule"), timesteps=steps)
    )


def analytic(
    process: Process,
    mean: Any,
    std: Any,
    clip: bool = False,
    raw: bool = False,
    learned: bool = False,
):
    """The exact prediction for data N(mean, std^2): eps = sigma (x - alpha mean) / (alpha^2 std^2 +
    sigma^2).
    """

    def denoise(x: Tensor, t: Tensor) -> Estimate:
        alpha, sigma = process.schedule.alpha_sigma(t)
        eps = sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        output = torch.cat([eps, 0.3 * torch.tanh(x)], dim=1) if learned else eps
        return clipped(process, process.split(output, x, t), x, t, clip, raw)

    return denoise


def clipped(
    process: Process, prediction: Estimate, x: Tensor, t: Tensor, clip: bool, raw: bool
) -> Estimate:
    if clip:
        prediction.x0 = prediction.x0.clamp(-1, 1)
        if not raw:
            prediction.eps = process.eps_from_x0(prediction.x0, x, t)
    return prediction


def sampled(options: Any, process: Process, denoise: Any, start: tuple[Tensor, Tensor, Any]) -> Any:
    """Run a `sample` section's sampler from (x, times, noise)."""
    entry = registry.find("sampler", options.sampler, "sample.sampler")
    x, visited, noise = start
    return entry.make(denoise, process.schedule, x, visited, noise, **entry.takes(options))


def noises(values: Tensor | None) -> Callable[[], Tensor]:
    """The stored noises in order; none: zeros."""
    remaining = iter(values) if values is not None else None
    return lambda: torch.zeros(()) if remaining is None else next(remaining)


# ------------------------------------------------------------------ ADM's diffusion (DiT, MDT, EDT)


def run_schedule(case: Case, call: dict[str, Any]) -> Outputs:
    process = process_of(case)
    assert process.schedule.timesteps == call["scalars"]["steps"]
    exact = dict(rtol=1e-9, atol=1e-12)
    for name, expected in case.tensors.items():  # results that no call lists
        if spacing := re.fullmatch(r"spaced/(.+)/betas", name):
            grid = times.adm(process.schedule.timesteps, spacing[1])
            torch.testing.assert_close(
                ddpm.posterior(process.schedule, grid)[3].flip(0).exp(), expected, **exact
            )
        elif name == "schedule/squaredcos_cap_v2_betas":
            torch.testing.assert_close(
                arrays(process_of(case, "cosine"))["betas"], expected, **exact
            )
        elif name.startswith("fixed_"):
            low, high = process.schedule.log_variance_bounds(
                (case.tensors["t"].double() + 1) / process.schedule.timesteps
            )
            # The first step is given the second one's posterior.
            large = torch.where(case.tensors["t"] > 0, high, low)
            torch.testing.assert_close(
                (large if "large" in name else low).float(), expected, rtol=1e-5, atol=0
            )
    return arrays(process) | {"alphas_cumprod": process.schedule.alpha_bar[1:]}


def arrays(process: Process) -> Outputs:
    """ADM's tables, from the steps of the whole training grid."""
    from_x0, from_x, low, high = (
        v.flip(0)
        for v in ddpm.posterior(
            process.schedule, times.even(process.schedule.timesteps, process.schedule.timesteps)
        )
    )
    variance = low.exp()
    variance[0] = 0
    return {
        "betas": high.exp(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": low,
        "posterior_mean_coef1": from_x0,
        "posterior_mean_coef2": from_x,
    }


def run_q_sample(case: Case, call: dict[str, Any]) -> Outputs:
    inputs, process = case.inputs(call, {"x_start", "t", "noise"}), process_of(case)
    return {
        "x_t": process.add_noise(
            inputs["x_start"], (inputs["t"] + 1) / process.schedule.timesteps, inputs["noise"]
        )
    }


def one_step(case: Case, call: dict[str, Any], sampler: str) -> Outputs:
    """One step of a sampler with a fixed network output, each image at a time of its own."""
    scalars, process = call["scalars"], process_of(case)
    inputs = case.inputs(call, {"x_t", "t", "model_output", "step_noise"})
    grid = times.adm(
        process.schedule.timesteps, scalars.get("timestep_respacing") or process.schedule.timesteps
    )
    _, _, low, high = ddpm.posterior(process.schedule, grid)
    rows: list[Outputs] = []
    for i, index in enumerate(inputs["t"].tolist()):
        x, output = inputs["x_t"][i : i + 1], inputs["model_output"][i : i + 1]
        at = len(grid) - 2 - index
        if "reverse" in call["name"]:
            at, pair = at, grid[[at, at - 1]]
        else:
            pair = grid[at : at + 2]
        prediction = clipped(
            process, process.split(output, x, pair[0]), x, pair[0], scalars["clip_denoised"], False
        )
        own = {"eta": scalars.get("eta", 0.0)} if sampler == "ddim" else {}
        options = section("sample", sampler=sampler, **own)

        def take(
            noise: Tensor | None, x=x, pair=pair, prediction=prediction, options=options
        ) -> Tensor:
            return sampled(options, process, lambda *_: prediction, (x, pair, noises(noise)))

        noise = inputs["step_noise"][i : i + 1][None] if "step_noise" in inputs else None
        log_variance = low[at] + (high[at] - low[at]) * prediction.variance
        rows.append(
            {
                "sample": take(noise),
                "mean": take(None),
                "log_variance": log_variance,
                "pred_xstart": prediction.x0,
            }
        )
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def run_loop(case: Case, call: dict[str, Any]) -> Outputs:
    scalars, process, toy = call["scalars"], process_of(case), case.data["toy_network"]
    inputs = case.inputs(call, {"z", "step_noises"})
    assert scalars.get("step_noises", "all zero") == "all zero"
    sampler = "ddim" if "eta" in scalars else "ddpm"
    own = {"eta": scalars["eta"]} if sampler == "ddim" else {}
    options = section(
        "sample", sampler=sampler, steps=scalars["timestep_respacing"], times="adm", **own
    )
    denoise = analytic(process, toy["mu"], toy["s"], scalars["clip_denoised"], learned=True)
    grid = times.visited(process.schedule, options)
    return {
        "sample": sampled(
            options, process, denoise, (inputs["z"], grid, noises(inputs.get("step_noises")))
        )
    }


# ------------------------------------------------------------------ MaskDM


def run_maskdm_schedule(case: Case, call: dict[str, Any]) -> Outputs:
    process = process_of(case, call["name"].removeprefix("schedule_"))
    assert process.schedule.timesteps == call["scalars"]["timesteps"]
    alpha, sigma = process.schedule.alpha_sigma(
        torch.arange(1, process.schedule.timesteps + 1, dtype=torch.float64)
        / process.schedule.timesteps
    )
    tables = arrays(process)
    tables["betas64"] = tables.pop("betas")
    clipped_variance = tables["posterior_variance"].clamp(min=1e-20).log()
    return tables | {
        "alphas_cumprod": alpha**2,
        "sqrt_recipm1_alphas_cumprod": sigma / alpha,
        "posterior_log_variance_clipped": clipped_variance,
    }


def run_maskdm_ddim(case: Case, call: dict[str, Any]) -> Outputs:
    scalars, toy = call["scalars"], case.data["toy_network"]
    inputs, process = (
        case.inputs(call, {"z", "step_noises"}),
        process_of(case, scalars["beta_schedule"]),
    )
    denoise = analytic(process, toy["mu"], toy["s"], scalars["clip_denoised"], raw=True)
    options = section(
        "sample", eta=scalars["eta"], times="maskdm", steps=scalars["sampling_timesteps"]
    )
    grid = times.visited(process.schedule, options)
    x = sampled(options, process, denoise, (inputs["z"], grid, noises(inputs.get("step_noises"))))
    return {"sample": (x + 1) / 2}


def run_maskdm_q(case: Case, call: dict[str, Any]) -> Outputs:
    inputs = case.inputs(call, {"img", "noise", "t"})
    schedule = call["scalars"]["beta_schedule"]
    process, x0, eps = process_of(case, schedule), 2 * inputs["img"] - 1, inputs["noise"]
    t = (inputs["t"] + 1) / process.schedule.timesteps
    x_t = process.add_noise(x0, t, eps)
    log_variance = arrays(process)["posterior_variance"].clamp(min=1e-20).log()[inputs["t"]]
    count = len(case.tensors[call["outputs"]["x_from_eps"]])
    return {
        "x_t": x_t,
        "posterior_mean": process.schedule.posterior_mean(x0, x_t, t),
        "posterior_log_variance": log_variance,
        "v_target": build(
            section(
                "process", schedule=schedule, timesteps=process.schedule.timesteps, prediction="v"
            )
        ).target(x0, eps, t),
        "x_from_eps": process.split(eps, x_t, t).x0[:count],
    }


def run_ema(case: Case, call: dict[str, Any]) -> Outputs:
    values, got = case.inputs(call, {"values"})["values"], {}
    for name in call["outputs"]:
        module = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(module.weight)
        decay = case.data["ema_decay"]["beta"]
        averages = Averages(
            module, section("ema", decays=[decay], update_every=int(name.removeprefix("every")))
        )
        trajectory = []
        for value in values:
            module.weight.data.fill_(value)
            averages.update()
            trajectory.append(averages.networks[f"{decay:g}"].weight.item())
        got[name] = torch.tensor(trajectory)
    return got


# ------------------------------------------------------------------ U-ViT


def run_vpsde(case: Case, call: dict[str, Any]) -> Outputs:
    process = build(
        section("process", schedule={"vpsde": "vp_sde", "vpsde_cosine": "vp_cosine"}[call["name"]])
    )
    inputs = case.inputs(call, {"t", "s"})
    t = inputs["t"].double()
    alpha, sigma = process.schedule.alpha_sigma(t)
    earlier, _ = process.schedule.alpha_sigma(inputs.get("s", inputs["t"]).double())
    skipped = (alpha / earlier) ** 2
    ratio = process.schedule.log_snr(t).exp()
    if call["name"] == "vpsde_cosine":
        # The published ratio takes 1 - alpha^2 in float32, whose last digit is within its tolerance
        # of nothing near 0.
        angle = [
            (u + VpCosine.SHIFT) / (1 + VpCosine.SHIFT) * math.pi / 2 for u in (inputs["t"], 0.0)
        ]
        single = torch.cos(angle[0]) ** 2 / math.cos(angle[1]) ** 2
        assert ((ratio * (1 - single) / single - 1).abs() <= 3e-7 / (1 - single) + 2e-5).all()
        ratio = (single / (1 - single)).double()
    return {
        "cum_alpha": alpha**2,
        "cum_beta": sigma**2,
        "squared_diffusion": process.schedule.beta(t),
        "diffusion": process.schedule.beta(t).sqrt(),
        "snr": ratio,
        "nsr": 1 / ratio,
        "skip_alpha": skipped,
        "skip_beta": 1 - skipped,
    }


def run_euler(case: Case, call: dict[str, Any]) -> Outputs:
    toy, inputs = case.data["toy_network"], case.inputs(call, {"z", "noises"})
    process = build(section("process", schedule="vp_sde"))
    sampler = {"euler_ode": "euler", "euler_sde": "euler_maruyama"}[call["name"]]
    options = section(
        "sample", sampler=sampler, steps=call["scalars"]["sample_steps"], times="uniform"
    )
    denoise, grid = analytic(process, toy["mu"], toy["s"]), times.visited(process.schedule, options)
    return {
        "sample": sampled(
            options, process, denoise, (inputs["z"], grid, noises(inputs.get("noises")))
        )
    }


def run_discrete_schedule(case: Case, call: dict[str, Any]) -> Outputs:
    process = build(section("process", schedule="scaled_linear"))
    return {
        "betas": arrays(process)["betas"],
        "cum_alphas": process.schedule.alpha_bar,
        "cum_betas": 1 - process.schedule.alpha_bar,
    }


# ------------------------------------------------------------------ DPM-Solver

SCHEDULES = {"discrete": "scaled_linear", "linear": "vp_sde"}
SKIPS = {
    "time_uniform": "uniform",
    "logSNR": "logsnr",
    "t2": "quadratic",
    "time_quadratic": "quadratic",
}


def single_precision(process: Process) -> Process:
    """The schedule computed as the published float32 code does it.

    Near t = 0 its 1 - alpha^2 has few digits left, and the first error estimates of an adaptive
    solver are mostly rounding, which decides how it steps from there.
    """
    one = torch.ones((), dtype=torch.float32)
    discrete = isinstance(process.schedule, Table)
    table_ = process.schedule if discrete else linear(1000)
    betas = (1 - table_.alpha_bar[1:] / table_.alpha_bar[:-1]).float()
    table, nodes = (
        0.5 * torch.log(1 - betas).cumsum(0),
        torch.linspace(0, 1, process.schedule.timesteps + 1)[1:],
    )

    def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
        k = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
        return ys[k - 1] + (x - xs[k - 1]) * (ys[k] - ys[k - 1]) / (xs[k] - xs[k - 1])

    def log_alpha(t: Tensor) -> Tensor:
        t = t.float()
        return interpolate(t, nodes, table) if discrete else -0.25 * t**2 * 19.9 - 0.5 * t * 0.1

    def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
        return log_alpha(t).exp(), (1 - (2 * log_alpha(t)).exp()).sqrt()

    def time_at(log_snr: Tensor) -> Tensor:
        y = torch.logaddexp(-log_snr.float(), 0 * one)
        if discrete:
            return interpolate(-0.5 * y, table.flip(0), nodes.flip(0)).double()
        return (2 * 19.9 * y / ((0.1**2 + 2 * 19.9 * y).sqrt() + 0.1) / 19.9).double()

    process.schedule.alpha_sigma, process.schedule.time_at = alpha_sigma, time_at  # type: ignore[method-assign]
    process.schedule.log_snr = lambda t: 2 * (log_alpha(t) - alpha_sigma(t)[1].log())  # type: ignore[method-assign]
    return process


def run_noise_schedule(case: Case, call: dict[str, Any]) -> Outputs:
    process = build(section("process", schedule=SCHEDULES[call["name"].removeprefix("schedule_")]))
    t = case.inputs(call, {"t"})["t"]
    alpha, sigma = process.schedule.alpha_sigma(t.double())
    half = process.schedule.log_snr(t.double())
    return {
        "log_alpha": alpha.log(),
        "sigma": sigma,
        "lambda": half / 2,
        "inverse_lambda": process.schedule.time_at(half),
    }


def run_solver(case: Case, call: dict[str, Any]) -> Outputs:
    scalars, inputs = call["scalars"], case.inputs(call, {"z", "mu", "s"})
    process = build(section("process", schedule=SCHEDULES[scalars["schedule"]]))
    assert scalars["T"] == process.schedule.latest
    reference = "source" in scalars
    predicts_x0 = scalars["algorithm_type"] == "dpmsolver++" if reference else scalars["predict_x0"]
    # The reference repository's singlestep uses every evaluation, which is U-ViT's `fast`.
    method = "fast" if reference and scalars["method"] == "singlestep" else scalars["method"]
    options = section(
        "sample",
        sampler="dpm_solver++" if predicts_x0 else "dpm_solver",
        method=method,
        order=scalars["order"],
        steps=scalars.get("steps", 1),
        grid=SKIPS[scalars.get("skip_type", "time_uniform")],
        end=scalars["eps"],
        taylor={"dpm_solver": False, "taylor": True}[scalars.get("solver_type", "dpm_solver")],
        lower_order_final=scalars.get("lower_order_final", False),
    )
    grid = times.visited(process.schedule, options)
    if method == "fast" and call["name"].startswith("pp"):
        # dpm_solver_pp.py takes fine grids of any spacing here, dpm_solver_pytorch.py cuts equal
        # steps.
        lay = registry.find("times", options.times, "times").make
        grid = lay(process.schedule, options.steps, scalars["T"], scalars["eps"])
    if method == "adaptive":
        process = single_precision(process)
    denoise = analytic(process, inputs["mu"], inputs["s"])
    return {"sample": sampled(options, process, denoise, (inputs["z"], grid, noises(None)))}


RUNNERS: dict[str, dict[str, Runner]] = {
    "diffusion_math": {
        "schedule": run_schedule,
        "q_sample": run_q_sample,
        "p_sample": lambda case, call: one_step(case, call, "ddpm"),
        "ddim": lambda case, call: one_step(case, call, "ddim"),
        "loop": run_loop,
    },
    "maskdm_math": {
        "schedule": run_maskdm_schedule,
        "ddim": run_maskdm_ddim,
        "q": run_maskdm_q,
        "ema": run_ema,
    },
    "uvit_math": {
        "vpsde": run_vpsde,
        "euler": run_euler,
        "discrete_schedule": run_discrete_schedule,
    },
    "dpm_solver": {
        "schedule": run_noise_schedule,
        "pp": run_solver,
        "pt": run_solver,
        "ref": run_solver,
    },
}


# ------------------------------------------------------------------ tables


def check_space_timesteps(case: Case, table: Any) -> None:
    for name, kept in table["kept"].items():
        total, spacing = table["original_steps"], name
        if other := re.fullmatch(r"(\d+) steps, '(.*)'", name):
            total, spacing = int(other[1]), other[2]
        grid = times.adm(total, spacing)
        assert ((grid * total).round().int() - 1).tolist() == [*kept[::-1], -1], name


def check_time_grids(case: Case, table: Any) -> None:
    for name, expected in table["grids"].items():
        schedule, skip, *numbers = re.fullmatch(
            r"(\w+) (\w+) N=(\d+) T=([\d.]+) eps=([\d.e-]+)", name
        ).groups()
        process = single_precision(build(section("process", schedule=SCHEDULES[schedule])))
        lay = registry.find("times", SKIPS[skip], "times").make
        grid = lay(process.schedule, int(numbers[0]), float(numbers[1]), float(numbers[2]))
        torch.testing.assert_close(
            grid, torch.tensor(expected, dtype=torch.float64), **table["tolerance"]
        )


def check_fast_orders(case: Case, table: Any) -> None:
    for steps, orders in table.items():
        assert dpm_solver.solver_orders("fast", int(steps), 3) == orders, steps


def check_ddim_times(case: Case, table: Any) -> None:
    total = case.hyper["timesteps"]
    for steps, indices in table["times_by_sampling_steps"].items():
        assert ((times.maskdm(total, int(steps)) * total).round().int() - 1).tolist() == indices


def check_ema_decay(case: Case, table: Any) -> None:
    averages = Averages(nn.Linear(1, 1), section("ema", decays=[table["beta"]]))
    (ema,) = averages._emas.values()
    for step, decay in table["by_step"].items():
        ema.step.fill_(int(step))
        assert float(ema.get_current_decay()) == pytest.approx(decay, abs=1e-6), step


def check_discrete_samples(case: Case, rows: Any) -> None:
    process = build(section("process", schedule="scaled_linear"))
    for row in rows:
        pair = torch.tensor([row["t"], row["s"]], dtype=torch.float64) / process.schedule.timesteps
        _, _, low, high = ddpm.posterior(process.schedule, pair)
        assert high.exp().item() == pytest.approx(row["skip_beta"], rel=1e-9)
        assert 1 - high.exp().item() == pytest.approx(row["skip_alpha"], rel=1e-9)
        assert (low.exp().item() if row["s"] else 0.0) == pytest.approx(row["tilde_beta"], rel=1e-9)


TABLES: dict[str, Callable[[Case, Any], None]] = {
    "space_timesteps": check_space_timesteps,
    "time_grids": check_time_grids,
    "fast_orders": check_fast_orders,
    "ddim_times": check_ddim_times,
    "ema_decay": check_ema_decay,
    "discrete_samples": check_discrete_samples,
}
