import math

import numpy as np
import pytest
import torch

from msmdiff.core.config import section
from msmdiff.core.diffusion import time_sampling
from msmdiff.core.diffusion.process import build
from msmdiff.core.diffusion.schedules import Table, cosine_betas, linear_betas
from msmdiff.core.seeding import stream


def processes():
    return [
        build(section("process", schedule=s, prediction=p))
        for s in ("linear", "cosine")
        for p in ("eps", "x0", "v")
    ]


def test_schedules_against_closed_forms():
    linear = Table(linear_betas(1000))
    assert linear.alpha_bar[1] == pytest.approx(1 - 1e-4, rel=1e-12)
    assert linear.alpha_bar[-1] == pytest.approx(
        np.prod(1 - np.linspace(1e-4, 0.02, 1000)), rel=1e-12
    )
    cosine = Table(cosine_betas(1000))

    def f(k):
        return math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert cosine.alpha_bar[500] == pytest.approx(f(500) / f(0), rel=1e-10)
    assert cosine_betas(1000).max() == 0.999


def test_shift_moves_the_log_snr():
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    plain, shifted = Table(cosine_betas(1000)), Table(cosine_betas(1000, 256))
    assert torch.allclose(
        shifted.log_snr(t) - plain.log_snr(t), torch.full_like(t, 2 * math.log(64 / 256)), atol=0.02
    )


@pytest.mark.parametrize("name", ["cosine", "linear", "cosine_shift_d256"])
def test_schedules_equal_the_published_ones(golden, name):
    from safetensors.numpy import load_file

    expected = load_file(golden / "maskdm_math" / "io.safetensors")
    betas = {
        "cosine": cosine_betas(1000),
        "linear": linear_betas(1000),
        "cosine_shift_d256": cosine_betas(1000, 256),
    }
    np.testing.assert_allclose(betas[name], expected[f"{name}/betas64"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("process", processes(), ids=lambda p: type(p.prediction).__name__)
def test_target_and_split_are_inverse(process):
    x0, eps = torch.randn(2, 64, 3, 4, 4, dtype=torch.float64)
    t = process.schedule.uniform_times(64, stream("cpu", 0, "t")).double() * 0.9 + 0.001
    x_t = process.add_noise(x0, t, eps)
    prediction = process.split(process.target(x0, eps, t), x_t, t)
    assert torch.allclose(prediction.x0, x0, atol=1e-6)
    assert torch.allclose(prediction.eps, eps, atol=1e-6)
    assert torch.allclose(process.eps_from_x0(x0, x_t, t), eps, atol=1e-6)


def test_noised_data_keep_unit_variance():
    process = build(section("process"))
    t = process.schedule.uniform_times(20_000, stream("cpu", 1, "t"))
    alpha, sigma = process.schedule.alpha_sigma(t.double())
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-12)


def test_network_time_is_the_published_index():
    process = build(section("process"))
    k = torch.arange(1, 1001)
    assert torch.equal(process.schedule.clock(k.float() / 1000), (k - 1).float())
    assert process.schedule.alpha_sigma(torch.zeros(1)) == (torch.ones(1), torch.zeros(1))


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
def test_training_times_cover_the_range(kind):
    wish = section("process", time_sampling=kind, timesteps=50)
    process = build(wish)
    times = time_sampling.build(wish, process.schedule)
    drawn = [times.draw(100, lambda *_, i=i: stream("cpu", 0, "t", i))[0] for i in range(50)]
    t = torch.cat(drawn)
    counts = torch.bincount(process.schedule.index(t), minlength=51)
    assert counts[0] == 0
    assert (counts[1:] - 100).abs().max() <= (50 if kind == "uniform" else 3)


def test_min_snr_weights_the_same_x0_error_for_every_prediction():
    """min(SNR, gamma) |x0 error|^2 is what each weighted loss must come to (Hang et al. 2023, eq.
    7).
    """
    x0, eps, wrong = torch.randn(3, 100, 1, 1, 1, dtype=torch.float64)
    for prediction in ("eps", "x0", "v"):
        process = build(section("process", prediction=prediction, weighting="min_snr"))
        t = process.schedule.uniform_times(100, stream("cpu", 0, "t")).double()
        x_t = process.add_noise(x0, t, eps)
        output = process.target(x0, eps, t) + wrong
        error = (process.split(output, x_t, t).x0 - x0).flatten().square()
        expected = process.schedule.log_snr(t).exp().clamp(max=5) * error
        got = process.weight(t) * wrong.flatten().square()
        assert torch.allclose(got, expected, rtol=1e-3)
