"""Training times whose noise follows a law, on every schedule, and shifted sampling times."""

import math

import pytest
import torch

from msmdiff.core import config as configuration
from msmdiff.core.diffusion import process, time_sampling
from msmdiff.core.samplers import times
from msmdiff.core.seeding import stream

SCHEDULES = ["flow", "ve", "edm", "vp_cosine", "cosine", "linear"]


def drawn(schedule, kind, n=20_000, **options):
    """Times of a schedule, and the schedule."""
    wish = {"schedule": schedule, "time_sampling": kind, **options}
    section = configuration.build({"process": wish}).process
    noise = process.build(section).schedule
    sampling = time_sampling.build(section, noise)
    t, weight = sampling.draw(n, lambda *_: stream("cpu", 0, "time"))
    assert t.dtype == torch.float32
    assert weight == 1
    return t.double(), noise


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_normal_noise_has_its_mean_and_deviation(schedule):
    t, noise = drawn(schedule, "log_normal", sigma_mean=-0.4, sigma_std=0.8)
    log_sigma = -noise.log_snr(t) / 2
    assert log_sigma.mean().item() == pytest.approx(-0.4, abs=0.03)
    assert log_sigma.std().item() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("kind", ["uniform", "stratified"])
@pytest.mark.parametrize("schedule", ["flow", "ve", "edm", "vp_cosine", "vp_sde"])
def test_no_time_is_free_of_noise(schedule, kind, monkeypatch):
    """A uniform number may be 0, where no noise would be told apart."""
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.zeros(n))
    t, noise = drawn(schedule, kind, n=4)
    assert t.min().float() == torch.tensor(noise.earliest, dtype=torch.float32)
    for prediction in ("edm", "x0", "eps"):
        section = {"schedule": schedule, "prediction": prediction}
        made = process.build(configuration.build({"process": section}).process)
        x = torch.randn(4, 3, 2, 2)
        assert made.target(x, x.flip(0), t.float()).isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logit_normal_times_are_the_flows_with_the_same_noise(schedule):
    t, noise = drawn(schedule, "logit_normal", time_mean=-0.5, time_std=0.7, time_shift=2.0)
    logit = -noise.log_snr(t) / 2
    assert logit.mean().item() == pytest.approx(-0.5 + math.log(2), abs=0.03)
    assert logit.std().item() == pytest.approx(0.7, abs=0.03)


def test_the_shift_of_a_flow_is_s_t_over_1_plus_s_minus_1_t():
    plain, _ = drawn("flow", "logit_normal")
    shifted, _ = drawn("flow", "logit_normal", time_shift=3.0)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), atol=1e-6, rtol=1e-5)


def test_a_share_of_the_times_may_be_uniform():
    t, _ = drawn("flow", "logit_normal", time_mean=5.0, time_std=0.1, time_uniform=0.25)
    assert (t < 0.9).double().mean().item() == pytest.approx(0.25 * 0.9, abs=0.02)


def test_sampling_times_shift_alike():
    wish = {"process": {"schedule": "flow", "prediction": "velocity"}}
    wish["sample"] = {"sampler": "euler", "steps": 10, "times": "shifted", "shift": 3.0}
    config = configuration.build(wish)
    schedule = process.build(config.process).schedule
    got = times.visited(schedule, config.sample)
    config.sample = configuration.build({"sample": {**wish["sample"], "shift": 1.0}}).sample
    even = times.visited(schedule, config.sample)
    torch.testing.assert_close(got[1:-2], (3 * even / (1 + 2 * even))[1:-2])
    assert got[0] == schedule.latest
    assert (got.diff() < 0).all()
