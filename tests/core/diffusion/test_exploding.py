"""EDM and VE: closed forms, and that they are a variance-preserving process seen otherwise."""

import itertools
import math

import pytest
import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets
from msmdiff.core.backbones.layers import patchify
from msmdiff.core.backbones.routes import Route
from msmdiff.core.config import section
from msmdiff.core.diffusion import process as processes
from msmdiff.core.diffusion.predictions import Estimate
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import find

F64 = torch.float64


def process_of(schedule, prediction="eps", **options):
    return processes.build(section("process", schedule=schedule, prediction=prediction, **options))


def lay(name, schedule, intervals, start, end, **options):
    return find("times", name, "times").make(schedule, intervals, start, end, **options)


def draw(name, process, denoise, x, times, noise=None, **options):
    entry = find("sampler", name, "sampler")
    given = entry.options(**options).model_dump()
    return entry.make(denoise, process.schedule, x, times, noise, **given)


def mixture_denoiser(process):
    """The exact posterior mean of x0 for points at -1 and 0.5, twice as often there, each with a
    deviation of 0.2: a target with a bent flow.
    """
    places, shares = torch.tensor([-1.0, 0.5], dtype=F64), torch.tensor([1 / 3, 2 / 3], dtype=F64)

    def denoise(x, t):
        alpha, sigma = (v.to(x) for v in process.schedule.alpha_sigma(t.double()))
        variance = 0.04 * alpha**2 + sigma**2
        off = x[..., None] - alpha * places
        share = (shares.log() - off**2 / (2 * variance)).softmax(-1)
        x0 = (share * (places + 0.04 * alpha / variance * off)).sum(-1)
        return Estimate(x0, (x - alpha * x0) / sigma)

    return denoise


# ------------------------------------------------------------------ closed forms


def test_edms_times_are_its_rho_grid():
    """Eq. 5; of its 18 steps the first two and the last two, from a pocket calculator."""
    schedule = process_of("edm").schedule
    times = lay("karras", schedule, 17, 1.0, 1e-12, rho=7.0)
    sigma = schedule.sigma(times)
    exact = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    torch.testing.assert_close(sigma, torch.tensor(exact, dtype=F64), rtol=1e-9, atol=0)
    assert sigma[[0, 1, 16, 17]].tolist() == pytest.approx([80, 57.586, 0.00753, 0.002], rel=1e-3)
    torch.testing.assert_close(times, lay("uniform", schedule, 17, 1.0, 0.0))


@pytest.mark.parametrize("schedule", ["ve", "flow", "vp_sde", "linear"])
def test_the_rho_grid_is_even_in_a_power_of_the_noise_of_any_schedule(schedule):
    noise = process_of(schedule).schedule
    times = lay("karras", noise, 20, noise.latest, noise.earliest, rho=3.0)
    roots = (-noise.log_snr(times) / 6).exp()
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(20), rtol=1e-6, atol=0)
    assert times[[0, -1]].tolist() == [noise.latest, noise.earliest]


def test_ves_sigma_is_geometric():
    schedule = process_of("ve", sigma_min=0.01, sigma_max=50.0).schedule
    t = torch.tensor([0.0, 1e-9, 0.25, 0.5, 1.0], dtype=F64)
    alpha, sigma = schedule.alpha_sigma(t)
    assert alpha.tolist() == [1] * 5
    assert sigma.tolist() == pytest.approx([0, 0.01, 0.0840896, 0.7071068, 50], rel=1e-6)
    # Song et al. 2021, eq. 30: dx = sigma sqrt(2 ln(sigma_max / sigma_min)) dw.
    expected = sigma[1:] ** 2 * 2 * math.log(5000)
    torch.testing.assert_close(schedule.diffusion(t[1:]), expected)


def test_noise_that_falls_is_refused():
    with pytest.raises(UsageError, match=r"sigma_min 9 must be less than process.sigma_max 1"):
        process_of("ve", sigma_min=9.0, sigma_max=1.0)


# ------------------------------------------------------------------ one process, seen in two ways


PAIRS = [("edm", "vp_sde"), ("edm", "flow"), ("ve", "vp_cosine"), ("edm", "ve")]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_network_says_the_same_of_x0_under_both(one, other):
    """x / alpha at equal log-SNR: EDM's preconditioning feeds the network the same, and the same
    output means the same clean image, target and loss.
    """
    a, b = (process_of(name, "edm", sigma_data=0.6) for name in (one, other))
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 40, 3, 2, 2, generator=generator, dtype=F64)
    x0, log_snr = 0.6 * x0, torch.linspace(-6, 6, 40, dtype=F64)
    found = []
    for process in (a, b):
        t = process.schedule.time_at(log_snr)
        x_t = process.add_noise(x0, t, eps)
        fed, clock = process.prediction.inputs(x_t, t)
        estimate = process.split(torch.sin(3 * fed) + clock.view(-1, 1, 1, 1), x_t, t)
        found.append((fed, clock, process.target(x0, eps, t), estimate.x0, estimate.eps))
        assert fed.square().mean().item() == pytest.approx(1, abs=0.35)  # whatever the noise
    for mine, yours in zip(*found, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_same_noise_makes_the_same_samples_of_a_mixture(one, other):
    """Two processes, two solvers, the same start x / alpha: a fine grid brings both to one place;
    the flow of the wrong process would not.
    """
    arrived = []
    for name, sampler, steps in ((one, "edm", 160), (other, "dpm_solver++", 400)):
        process = process_of(name)
        ends = process.schedule.time_at(-2 * torch.tensor([20.0, 0.05], dtype=F64).log())
        alpha = process.schedule.alpha_sigma(ends)[0]
        times = lay("logsnr", process.schedule, steps, *ends.tolist())
        start = alpha[0] * 20 * torch.linspace(-2, 2, 41, dtype=F64).view(-1, 1)
        own = {"order": 3, "method": "singlestep", "taylor": True} if "dpm" in sampler else {}
        if own:
            times = lay("logsnr", process.schedule, 3 * (steps // 3), *ends.tolist())
        x = draw(sampler, process, mixture_denoiser(process), start, times, **own)
        arrived.append(x / alpha[1])
    gap = (arrived[0] - arrived[1]).abs().max().item()
    assert gap < 2e-3, gap
    assert arrived[0].std() > 0.6  # both places are reached


# ------------------------------------------------------------------ masked score matching


@pytest.mark.parametrize(
    ("preset", "prediction"), [("digits-edm", "edm"), ("digits-ve", "edm"), ("digits-ve", "eps")]
)
def test_the_masked_loss_is_the_papers_weight_times_the_error_of_visible_patches(
    preset, prediction
):
    """EDM: (sigma^2 + sd^2) / (sigma sd)^2 |D - x0|^2 (eq. 6 and table 1); VE: |D - x0|^2 /
    sigma^2 (Song et al. 2021, eq. 7 with their lambda), both of the kept patches only.
    """
    own = {"mask": {"ratio": 0.75}, "process": {"prediction": prediction}}
    config = configuration.build(presets.read(preset), own)
    config = road.resolve(config, data_classes=10)
    assert config.objective.name == "msm"
    parts = road.build(config)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 3, 16, 16, generator=generator)
    keep = parts.mask.draw(6, generator)
    sigma = torch.tensor([0.01, 0.1, 0.5, 1.0, 5.0, 40.0])
    t = parts.process.schedule.time_at(-2 * sigma.double().log()).float()
    output = torch.randn(6, keep.shape[1], 12, generator=generator)
    got = parts.objective.terms(lambda *_: output, x0, eps, t, None, Route(keep))["loss"]

    seen = patchify(x0, 2).gather(1, keep[..., None].expand(-1, -1, 12))
    noise = patchify(eps, 2).gather(1, keep[..., None].expand(-1, -1, 12))
    s = sigma.view(-1, 1, 1)
    if prediction == "edm":
        data = 0.7
        skip, out = data**2 / (s**2 + data**2), s * data / (s**2 + data**2).sqrt()
        error = skip * (seen + s * noise) + out * output - seen
        expected = (s**2 + data**2) / (s * data) ** 2 * error**2
    else:
        error = seen + s * noise - s * output - seen
        expected = error**2 / s**2
    torch.testing.assert_close(got, expected.mean((1, 2)), rtol=2e-3, atol=1e-5)


# ------------------------------------------------------------------ Heun and its churn


def by_hand(denoise, levels, x):
    """Algorithm 1 of Karras et al. with sigma = t, written out."""
    for now, after in itertools.pairwise(levels):
        slope = (x - denoise(x, now)) / now
        ahead = x + (after - now) * slope
        if after > 0:
            slope = (slope + (ahead - denoise(ahead, after)) / after) / 2
            ahead = x + (after - now) * slope
        x = ahead
    return x


def test_without_churn_it_is_heun_as_published():
    process = process_of("edm")
    times = torch.cat([lay("karras", process.schedule, 17, 1.0, 1e-6, rho=7.0), torch.zeros(1)])
    levels = process.schedule.alpha_sigma(times)[1].tolist()
    x = 80 * torch.randn(50, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    denoise = mixture_denoiser(process)
    at = dict(zip(levels, times, strict=True))
    expected = by_hand(lambda x, s: denoise(x, at[s]).x0, levels, x)
    got = draw("edm", process, denoise, x, times)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    # Churn outside its levels is no churn: the same bits, and no noise is asked for.
    outside = draw("edm", process, denoise, x, times, s_churn=40.0, s_tmin=90.0)
    assert torch.equal(outside, got)
    below = draw("edm", process, denoise, x, times, s_churn=40.0, s_tmax=1e-4)
    assert torch.equal(below, got)


def test_in_linear_time_heun_is_the_same():
    """Where sigma is linear in t, steps in time are steps in sigma."""
    process = process_of("edm", rho=1.0)
    times = lay("uniform", process.schedule, 30, 1.0, 0.001)
    x, denoise = torch.linspace(-160, 160, 9, dtype=F64).view(-1, 1), mixture_denoiser(process)
    got = draw("edm", process, denoise, x, times)
    torch.testing.assert_close(got, draw("heun", process, denoise, x, times), rtol=1e-9, atol=1e-9)


def gaussian(process, variance):
    """The exact posterior mean of x0 for data N(0, variance)."""

    def denoise(x, t):
        alpha, sigma = (v.to(x) for v in process.schedule.alpha_sigma(t.double()))
        x0 = alpha * variance / (alpha**2 * variance + sigma**2) * x
        return Estimate(x0, (x - alpha * x0) / sigma)

    return denoise


@pytest.mark.parametrize("schedule", ["edm", "ve", "vp_sde", "linear"])
@pytest.mark.parametrize("churn", [0.0, 10.0, 40.0])
def test_churned_samples_of_a_gaussian_have_its_variance(schedule, churn):
    """Of Gaussian data the sampler is linear: the variance follows from what becomes of a start of
    1 (row 0), and of each noise alone (row i), without drawing any. Its error falls with the square
    of the step, churned or not: new noise is exact.
    """
    process, variance = process_of(schedule), 0.25
    noise = process.schedule

    def error(steps):
        times = lay("karras", noise, steps, noise.latest, noise.earliest, rho=7.0)
        alone = iter(torch.eye(steps + 1, dtype=F64)[1:, :, None])
        x = torch.eye(steps + 1, dtype=F64)[0, :, None]
        denoise = gaussian(process, variance)
        x = draw("edm", process, denoise, x, times, lambda: next(alone), s_churn=churn)
        assert (x[1:].abs().sum().item() > 0) == (churn > 0)
        alpha, sigma = noise.alpha_sigma(times[[0, -1]])
        began, ends = (alpha**2 * variance + sigma**2).tolist()
        return (began * x[0] ** 2 + x[1:].square().sum()).item() / ends - 1

    errors = [error(steps) for steps in (100, 200, 400)]
    assert abs(errors[-1]) < 2e-3, errors
    for coarse, fine in itertools.pairwise(errors):
        assert 2**1.7 < coarse / fine < 2**2.3, errors


def test_churn_stays_between_its_levels_and_below_the_start():
    process = process_of("edm")
    times = lay("karras", process.schedule, 10, 1.0, 1e-6, rho=7.0)
    met = []

    def denoise(x, t):
        met.append(process.schedule.sigma(t).item())
        return Estimate(0 * x, x)

    x = torch.ones(1, 1, dtype=F64)
    draw(
        "edm", process, denoise, x, times, lambda: torch.zeros(1, 1, dtype=F64),
        s_churn=100.0, s_tmin=0.05, s_tmax=50.0,
    )  # fmt: skip
    levels, firsts = process.schedule.sigma(times[:-1]).tolist(), met[::2]
    for level, first in zip(levels, firsts, strict=True):
        factor = 2**0.5 if 0.05 <= level <= 50 else 1.0
        assert first == pytest.approx(level * factor, rel=1e-9)
    met.clear()
    draw("edm", process, denoise, x, times, lambda: 0 * x, s_churn=100.0)
    assert max(met) == pytest.approx(80)  # no network was trained beyond


# ------------------------------------------------------------------ the predictor-corrector


@pytest.mark.parametrize(("schedule", "snr"), [("ve", 0.16), ("vp_sde", 0.16), ("ve", 0.25)])
def test_correctors_keep_the_variance_but_for_their_known_bias(schedule, snr):
    """Many corrections at one level end at v / (1 - snr^2), the Langevin chain's own variance."""
    process, variance = process_of(schedule), 0.3
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(32, 2000, generator=generator, dtype=F64)

    t = process.schedule.time_at(torch.zeros(1, dtype=F64)).item()  # sigma = alpha
    times = torch.tensor([t, t - 1e-9], dtype=F64)
    alpha, sigma = (v.item() for v in process.schedule.alpha_sigma(times[1]))
    spread = alpha**2 * variance + sigma**2
    x = draw(
        "pc", process, gaussian(process, variance), 1.3 * spread**0.5 * noise(), times, noise,
        corrections=round(6 / snr**2), snr=snr,
    )  # fmt: skip
    assert x.var().item() == pytest.approx(spread / (1 - snr**2), rel=0.012)


def test_a_corrector_of_an_untrained_network_stays_finite():
    process = process_of("ve")
    times = torch.cat([lay("logsnr", process.schedule, 20, 1.0, 1e-5), torch.zeros(1)])
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(2, 3, 8, 8, generator=generator)

    x = draw("pc", process, lambda x, t: Estimate(x, 0 * x), 50 * noise(), times, noise)
    assert x.isfinite().all()
