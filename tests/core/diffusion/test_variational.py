"""Learned variances, the variational bound, and the processes of the latent U-ViTs."""

import pytest
import torch

from msmdiff.core.config import section
from msmdiff.core.diffusion import process, time_sampling, variational


def draw(noise, steps):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(len(steps), 2, 4, 4, generator=generator) * 2 - 1
    eps = torch.randn(x0.shape, generator=generator)
    return x0, eps, torch.tensor(steps) / noise.schedule.timesteps


def test_the_bound_is_zero_for_the_true_posterior_and_positive_otherwise():
    noise = process.build(section("process", schedule="linear"))
    x0, eps, t = draw(noise, [2, 40, 1000])
    exact = variational.terms(noise, torch.cat([eps, -torch.ones_like(eps)], 1), x0, eps, t)
    torch.testing.assert_close(exact["vb"], torch.zeros(3), atol=1e-5, rtol=0)
    assert (exact["mse"] == 0).all()
    assert (
        variational.terms(noise, torch.cat([eps, torch.ones_like(eps)], 1), x0, eps, t)["vb"][:2]
        > 1e-4
    ).all()


def test_the_bound_trains_the_variance_only():
    noise = process.build(section("process", schedule="linear"))
    x0, eps, t = draw(noise, [1, 500])
    output = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    variational.terms(noise, output, x0, eps, t)["vb"].sum().backward()
    assert output.grad[:, :2].abs().max() == 0
    assert (output.grad[:, 2:].flatten(1).abs().amax(1) > 0).all()


def test_visible_tokens_give_the_image_s_loss_when_all_are_visible():
    noise = process.build(section("process", schedule="linear", weighting="min_snr"))
    x0, eps, t = draw(noise, [1, 500])
    output = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    row = [
        z.permute(0, 2, 3, 1).reshape(2, 4, -1) for z in (output, x0, eps)
    ]  # any order of pixels does
    flat = variational.terms(noise, *(variational.channels_first(z, 2) for z in row), t)
    for name, value in variational.terms(noise, output, x0, eps, t).items():
        torch.testing.assert_close(flat[name], value)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_split_reads_the_variance_off_the_second_half(prediction):
    noise = process.build(section("process", schedule="linear", prediction=prediction))
    x0, eps, t = draw(noise, [1, 500])
    x_t = noise.add_noise(x0, t, eps)
    value = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand_as(x0)
    target = noise.target(x0, eps, t)
    plain, learned = noise.split(target, x_t, t), noise.split(torch.cat([target, value], 1), x_t, t)
    assert plain.log_variance is None
    torch.testing.assert_close(learned.x0, plain.x0)
    low, high = noise.schedule.log_variance_bounds(t)
    torch.testing.assert_close(learned.log_variance[0], low[0].float().expand(2, 4, 4))
    torch.testing.assert_close(learned.log_variance[1], high[1].float().expand(2, 4, 4))


def test_the_network_is_fed_what_it_was_trained_with():
    t = torch.tensor([0.001, 0.5, 1.0])
    for schedule, expected in (
        ("linear", [0, 499, 999]),
        ("scaled_linear", [1, 500, 1000]),
        ("vp_sde", [0.999, 499.5, 999]),
    ):
        torch.testing.assert_close(
            process.build(section("process", schedule=schedule)).schedule.clock(t),
            torch.tensor(expected).float(),
        )


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_the_continuous_process_is_variance_preserving(sampling):
    noise = process.build(section("process", schedule="vp_sde", time_sampling=sampling))
    times = time_sampling.build(section("process", time_sampling=sampling), noise.schedule)
    t = times.draw(1000, lambda *_: torch.Generator().manual_seed(0))[0].double()
    assert 0 <= t.min() < 0.01
    assert 0.99 < t.max() < 1
    alpha, sigma = noise.schedule.alpha_sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    torch.testing.assert_close(noise.schedule.log_snr(t), 2 * (alpha / sigma).log())
    torch.testing.assert_close(
        noise.schedule.alpha_sigma(torch.ones(1))[0],
        torch.tensor([0.0065715]),
        atol=1e-5,
        rtol=1e-3,
    )
