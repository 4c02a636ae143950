import itertools

import numpy as np
import pytest
import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import registry
from msmdiff.core.condition import Classes, Text
from msmdiff.core.config import section
from msmdiff.core.diffusion.codecs import to_uint8
from msmdiff.core.diffusion.codecs.pixel import PixelCodec
from msmdiff.core.diffusion.predictions import Estimate
from msmdiff.core.diffusion.process import build
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.model import Model, dynamic_threshold
from msmdiff.core.samplers.editing import Trajectory, inpainting, slerp
from msmdiff.core.samplers.guidance import Guided
from msmdiff.core.samplers.times import subdivide, visited

# That of average velocities is in diffusion/test_meanflow.py.
SAMPLERS = [name for name in registry.entries("sampler") if name != "meanflow"]
INDEX_TIMES = ["even", "maskdm", "adm"]


def lay(name, *given):
    """Times of a kind."""
    return registry.find("times", name, "times").make(*given)


def run(options, process, denoise, x, times, noise=None):
    """The sampler of a `sample` section, with its own options."""
    entry = registry.find("sampler", options.sampler, "sampler")
    return entry.make(denoise, process.schedule, x, times, noise, **entry.takes(options))


def model_of(parts, options, backbone=None, condition=None, guide=None):
    """A model that samples as a `sample` section says."""
    config = configuration.build({}).model_copy(update={"sample": options})
    network = backbone or parts.backbone
    told = condition or parts.objective.condition
    made = Model(network, parts.process, parts.codec, told, config, guide=guide)
    return made


def gaussian_denoiser(process, mean, variance):
    """The exact posterior mean of x0 for data N(mean, variance)."""

    def denoise(x, t):
        alpha, sigma = (v.view(-1, 1).to(x) for v in process.schedule.alpha_sigma(t.double()))
        x0 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        return Estimate(x0, (x - alpha * x0) / sigma)

    return denoise


SAMPLINGS = {
    "ddim": dict(sampler="ddim"),
    "ddim eta 1": dict(sampler="ddim", eta=1.0),
    "ddpm small": dict(sampler="ddpm", variance="small"),
    "ddpm large": dict(sampler="ddpm", variance="large"),
    "euler": dict(sampler="euler"),
    "heun": dict(sampler="heun"),
    "edm": dict(sampler="edm"),
    "edm churned": dict(sampler="edm", s_churn=40.0),
    "euler_maruyama": dict(sampler="euler_maruyama"),
    "unipc": dict(sampler="unipc", order=3, denoise_to_zero=True),
    **{
        f"{name} {method} {order}": dict(
            sampler=name, method=method, order=order, denoise_to_zero=True
        )
        for name in ("dpm_solver", "dpm_solver++")
        for method in (
            "multistep",
            "singlestep",
            "fast",
            *(["adaptive"] if name == "dpm_solver" else []),
        )
        for order in ((2, 3) if method == "adaptive" else (1, 2, 3))
    },
}


EXPLODING = ("ve", "edm")
RECOVERED = [
    (schedule, name)
    for schedule in ("linear", "cosine", "vp_sde", "vp_cosine", "flow", *EXPLODING)
    for name in SAMPLINGS
    # The adaptive tolerances are meant for x of about unit variance; these reach 50 and 80.
    if not (schedule in EXPLODING and "adaptive" in name)
]


@pytest.mark.parametrize(("schedule", "name"), RECOVERED)
def test_an_analytic_gaussian_is_recovered(schedule, name):
    process = build(section("process", schedule=schedule))
    mean, variance = (
        torch.tensor([0.5, -1.0], dtype=torch.float64),
        torch.tensor([0.3, 1.5], dtype=torch.float64),
    )
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(20_000, 2, generator=generator, dtype=torch.float64)

    # EDM's own grid; Euler's large steps in log-SNR are too coarse for so much noise.
    own = {"times": "karras"} if schedule in EXPLODING and name == "euler" else {}
    steps = 1600 if own else 400
    options = section("sample", steps=steps, **SAMPLINGS[name], **own)
    start = noise() * process.schedule.start_std
    times = visited(process.schedule, options)
    x = run(options, process, gaussian_denoiser(process, mean, variance), start, times, noise)
    assert torch.allclose(x.mean(0), mean, atol=0.03)
    # The adaptive solver is as exact as its published tolerance of 5 % lets it (and with x0 often
    # less).
    assert torch.allclose(x.var(0), variance, rtol=0.1 if "adaptive" in name else 0.05)
    assert abs(torch.corrcoef(x.T)[0, 1]) < 0.03


ORDERS = [
    (dict(sampler="ddim", times="uniform"), 1),
    (dict(sampler="euler", times="uniform"), 1),
    (dict(sampler="heun", times="uniform"), 2),
    (dict(sampler="edm", times="uniform"), 2),
    *[
        (dict(sampler=s, method=m, order=o), o)
        for s in ("dpm_solver", "dpm_solver++")
        for m in ("singlestep", "multistep")
        for o in (1, 2, 3)
        if (m, o) != ("multistep", 3)
    ],
    *[(dict(sampler=s, method="multistep", order=3), 2) for s in ("dpm_solver", "dpm_solver++")],
    (dict(sampler="dpm_solver++", method="singlestep", order=3, taylor=True), 3),
    (dict(sampler="dpm_solver++", method="multistep", order=2, taylor=True), 2),
    *[(dict(sampler="unipc", order=o), o + 1) for o in (1, 2, 3)],
]


@pytest.mark.parametrize("schedule", ["vp_sde", "flow", "ve", "edm"])
@pytest.mark.parametrize(
    ("given", "order"),
    ORDERS,
    ids=lambda v: " ".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_the_error_falls_as_a_power_of_the_step(given, order, schedule):
    """From much noise to little, against the exact flow of a Gaussian: errors of N and 2N
    steps differ 2^p.

    The published third-order multistep rule is of second order (see dpm_solver); UniPC's corrector
    adds one.
    """
    spread = 0.1 if given.get("order") == 3 and given["sampler"] == "unipc" else 0.04
    process = build(section("process", schedule=schedule))
    mean = torch.tensor([0.3], dtype=torch.float64)
    variance = torch.tensor([spread], dtype=torch.float64)
    # The same signal-to-noise ratios for all: there the solvers have the same problem to solve.
    reference = build(section("process", schedule="vp_sde")).schedule
    ends = torch.tensor([0.9, 0.15], dtype=torch.float64)
    scale = 1 / reference.alpha_sigma(ends)[0][0]
    ends = process.schedule.time_at(reference.log_snr(ends))
    scale = scale * process.schedule.alpha_sigma(ends)[0][0]
    start = torch.tensor([[1.3]], dtype=torch.float64) * scale
    alpha, sigma = process.schedule.alpha_sigma(ends)
    std = (alpha**2 * variance + sigma**2).sqrt()
    exact = alpha[1] * mean + std[1] / std[0] * (start - alpha[0] * mean)
    # Where the leading term of the error happens to change sign, no order shows: not at these
    # variances.
    multistep = "dpm" in given["sampler"] or given["sampler"] == "unipc"
    own = {"lower_order_final": False} if multistep else {}
    options = section("sample", **own, **given)
    inner = options.order if getattr(options, "method", "") == "singlestep" else 1

    def error(intervals):
        grid = lay(options.times or "logsnr", process.schedule, intervals, *ends.tolist())
        times = subdivide(process.schedule, grid, [inner] * intervals) if inner > 1 else grid
        x = run(options, process, gaussian_denoiser(process, mean, variance), start, times)
        return (x - exact).abs().item()

    errors = [error(n) for n in (48, 96, 192)]
    for coarse, fine in itertools.pairwise(errors):
        assert 2 ** (order - 0.3) < coarse / fine < 2 ** (order + 0.3), errors


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sampler": "heun", "eta": 0.5}, "sample.eta 0.5 has no effect on the sampler heun"),
        ({"variance": "large"}, "variance large has no effect on the sampler ddim, only on ddpm"),
        ({"sampler": "unipc", "taylor": True}, r"only on dpm_solver, dpm_solver\+\+"),
        ({"cfg_schedule": "linear", "cfg_power": 4.0}, "guidance linear, only on power_cosine"),
        ({"times": "even", "end": 0.5}, "end 0.5 has no effect on the times even"),
        ({"sampler": "dimm"}, "sample.sampler 'dimm' is none of the samplers; did you mean 'ddim'"),
        ({"ordre": 2}, "unknown configuration key 'sample.ordre'; did you mean 'order'"),
        ({"sampler": "unipc", "order": 4}, "sample.order = 4"),
    ],
)
def test_a_key_of_another_choice_is_refused_by_itself(given, words):
    with pytest.raises(UsageError, match=words):
        section("sample", **given)


def test_an_end_on_training_steps_means_nothing():
    process = build(section("process"))
    with pytest.raises(UsageError, match=r"end 0.5 has no effect on the times even"):
        visited(process.schedule, section("sample", end=0.5))


def test_the_reverse_sde_converges_in_distribution():
    """Euler-Maruyama is linear in x for a Gaussian: its variance follows a recursion, whose error
    halves with h.
    """
    process = build(section("process", schedule="vp_sde"))
    variance = torch.tensor([0.25], dtype=torch.float64)

    def error(steps):
        times = lay("uniform", process.schedule, steps, 1.0, 0.05)
        denoise, options = (
            gaussian_denoiser(process, 0 * variance, variance),
            section("sample", sampler="euler_maruyama"),
        )
        spread = torch.ones(1, dtype=torch.float64)
        for pair in itertools.pairwise(times):
            factor, scale = (
                run(
                    options,
                    process,
                    denoise,
                    torch.full((1, 1), x, dtype=torch.float64),
                    torch.stack(pair),
                    lambda z=z: torch.full((1, 1), z),
                ).item()
                for x, z in ((1.0, 0.0), (0.0, 1.0))
            )
            spread = factor**2 * spread + scale**2
        alpha, sigma = process.schedule.alpha_sigma(times[-1])
        return abs(spread.item() - (alpha**2 * variance + sigma**2).item())

    errors = [error(n) for n in (100, 200, 400)]
    assert 1.6 < errors[0] / errors[1] < 2.6
    assert 1.6 < errors[1] / errors[2] < 2.6


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "scaled_linear", "vp_sde", "vp_cosine", "flow", "ve", "edm"]
)
def test_time_is_the_inverse_of_log_snr(schedule):
    process = build(section("process", schedule=schedule))
    t = torch.linspace(0.002, process.schedule.latest, 777, dtype=torch.float64)
    assert torch.allclose(process.schedule.time_at(process.schedule.log_snr(t)), t, atol=1e-7)
    h = 1e-6
    middle = (torch.arange(2, 990, dtype=torch.float64) + 0.5) / 1000
    before, after = (process.schedule.alpha_sigma(middle + step) for step in (-h, h))
    for rate, low, high in zip(process.schedule.rates(middle), before, after, strict=True):
        torch.testing.assert_close(rate, (high - low) / (2 * h), rtol=1e-4, atol=1e-6)


def test_free_times_say_how_many_evaluations_they_take():
    process = build(section("process", schedule="scaled_linear"))
    for method, order in (("multistep", 2), ("fast", 3), ("singlestep", 3)):
        for to_zero in (False, True):
            calls = []

            def denoise(x, t, calls=calls):
                calls.append(t.item())
                return process.split(x, x, t)

            options = section(
                "sample",
                sampler="dpm_solver++",
                steps=12,
                method=method,
                order=order,
                denoise_to_zero=to_zero,
            )
            run(options, process, denoise, torch.ones(1, 1), visited(process.schedule, options))
            assert len(calls) == 12 + to_zero
            assert calls == sorted(calls, reverse=True)
    with pytest.raises(UsageError, match="is a spacing of the adm times"):
        visited(process.schedule, section("sample", steps="10,20", times="even"))
    assert len(visited(process.schedule, section("sample", steps="10,20"))) == 31
    for bad in ("0", "ddim", "5x", True):
        with pytest.raises(UsageError, match="give"):
            section("sample", steps=bad)


@pytest.mark.parametrize("grid", INDEX_TIMES)
@pytest.mark.parametrize("steps", [1, 7, 250, 1000])
def test_time_grids_fall_from_noise_to_the_image(grid, steps):
    times = lay(grid, 1000, steps)
    assert len(times) == steps + 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    assert steps == 1 or times[0] == 1
    with pytest.raises(UsageError, match=r"sample.steps 1001 must lie between 1 and .* 1000"):
        lay(grid, 1000, 1001)


def tiny(num_classes=0, **layers):
    torch.manual_seed(1)
    config = road.resolve(configuration.build({"model": {"num_classes": num_classes}}, layers))
    parts = road.build(config)
    for p in parts.backbone.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return parts


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
@pytest.mark.parametrize(
    "own",
    [
        {"sampler": "ddim", "eta": 1.0},
        {"sampler": "edm", "s_churn": 5.0},
        *[{"sampler": name} for name in ("ddpm", "dpm_solver++", "heun", "pc", "euler_maruyama")],
        *[
            {"sampler": name, "method": "adaptive", "order": order, "clip": False}
            for name in ("dpm_solver", "dpm_solver++")
            for order in (2, 3)
        ],
    ],
    ids=lambda own: " ".join(map(str, own.values())),
)
def test_a_seed_is_the_same_image_at_any_batch_size(own, cfg_scale):
    parts, options = tiny(10), section("sample", steps=5, cfg_scale=cfg_scale, **own)
    model = model_of(parts, options)
    sets = [model.draw(range(3, 11), batch_size=size).int() for size in (1, 3, 8)]
    assert (sets[0] - sets[1]).abs().max() <= 1
    assert (sets[0] - sets[2]).abs().max() <= 1
    assert len(sets[0].flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize("codec", [{}, {"codec": {"name": "dwt"}}])
def test_samples_are_images(codec):
    model = model_of(tiny(**codec), section("sample", steps=3))
    (batch,) = model.batches([0, 5])
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.seeds == [0, 5]


def test_classes_are_one_for_all_one_each_or_dealt_by_the_seeds():
    model = model_of(tiny(10), section("sample", steps=2))
    three = model.draw(range(4), classes=3)
    assert torch.equal(three, model.draw(range(4), classes=[3, 3, 3, 3]))
    dealt = model.draw(range(2, 6))
    assert torch.equal(dealt, model.draw(range(2, 6), classes=[2, 3, 4, 5]))
    assert not torch.equal(three, model.draw(range(4), classes=4))


def test_guidance_is_linear_in_the_scale():
    def network(x, t, y):
        return torch.where(y[:, None] == 9, torch.zeros(len(y), 1), y[:, None].float())

    x, t, y = torch.zeros(3, 1), torch.zeros(3), torch.tensor([1, 2, 3])
    for scale in (0.0, 1.0, 1.4, 4.0):
        got = Guided(network, Classes(9), scale)(x, t, y)
        assert torch.allclose(got, scale * y[:, None].float())


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [([0, 1], {}, "unconditional"), (None, {"cfg_scale": 2.0}, "unconditional")],
)
def test_an_unconditional_network_refuses_classes(labels, options, message):
    model = model_of(tiny(), section("sample", **options))
    with pytest.raises(UsageError, match=message):
        model.draw([0, 1], labels)


def test_labels_out_of_range_are_refused():
    with pytest.raises(UsageError, match=r"0\.\.9"):
        model_of(tiny(10), section("sample")).draw([0], [10])


def test_clipping_keeps_x0_in_range_and_eps_consistent():
    parts = tiny()
    x, t = torch.randn(2, 3, 16, 16) * 3, torch.tensor([0.5, 0.9])
    for rule in ("derived", "raw"):
        options = section("sample", eps_after_clip=rule)
        p = model_of(parts, options).denoiser(None)(x, t)
        assert p.x0.abs().max() <= 1
        again = parts.process.add_noise(p.x0, t, p.eps)
        assert torch.allclose(again, x, atol=1e-4) == (rule == "derived")
    assert np.isfinite(p.eps.detach().numpy()).all()


class Counting:
    """A network that answers its label, and remembers how many images it was shown when."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, t, y=None):
        self.seen.append((t[0].item(), len(x)))
        return torch.zeros_like(x) if y is None else y.view(-1, 1, 1, 1).float().expand_as(x)


def guided(process, options, t, guide=None, y=3):
    network = Counting()
    config = configuration.build({}).model_copy(update={"sample": options})
    model = Model(network, process, PixelCodec(4), Classes(9), config, guide=guide)
    x, time = torch.zeros(1, 3, 4, 4), torch.tensor(t, dtype=torch.float64)
    return model.denoiser(torch.tensor([y]))(x, time).eps.mean().item(), network.seen


def test_guidance_follows_its_schedule_and_skips_the_second_pass():
    process = build(section("process", schedule="linear"))
    for t in (0.1, 0.5, 0.9):
        time = 1000 * t - 1
        for schedule, scale in (
            ("constant", 4.0),
            ("linear", 1 + 3 * (1 - time / 1000)),
            ("power_cosine", 1 + 3 * (1 - np.cos(np.pi * (1 - time / 1000) ** 2)) / 2),
        ):
            own = {"cfg_power": 2.0} if schedule == "power_cosine" else {}
            options = section("sample", cfg_scale=4.0, cfg_schedule=schedule, clip=False, **own)
            got, seen = guided(process, options, t)
            assert got == pytest.approx(9 + scale * (3 - 9), rel=1e-5)
            assert seen == [(pytest.approx(time), 2)]
    # sigma / alpha is 0.33 at t = 0.1 and 157 at t = 1: only the middle lies inside.
    options = section("sample", cfg_scale=4.0, cfg_interval=[1.0, 10.0], clip=False)
    assert [guided(process, options, t)[1][0][1] for t in (0.1, 0.5, 1.0)] == [1, 2, 1]
    assert guided(process, section("sample", cfg_scale=1.0, clip=False), 0.5)[1][0][1] == 1
    assert guided(process, section("sample", cfg_scale=0.0, clip=False), 0.5) == (9.0, [(499.0, 1)])
    with pytest.raises(UsageError, match="two rising noise levels"):
        guided(process, section("sample", cfg_interval=[3, 1]), 0.5)
    with pytest.raises(UsageError, match=r"needs sample\.cfg_power"):
        guided(process, section("sample", cfg_schedule="power_cosine"), 0.5)
    # As files of before said it.
    assert section("sample", cfg_power=4.0).cfg_schedule == "power_cosine"


def test_a_guide_takes_the_unconditional_networks_place():
    process = build(section("process", schedule="linear"))
    options = section("sample", cfg_scale=2.0, clip=False)
    got, seen = guided(process, options, 0.5, guide=lambda x, t, y: torch.full_like(x, 1.0))
    assert got == 1 + 2 * (3 - 1)
    assert seen == [(499.0, 1)]
    with pytest.raises(UsageError, match="the guide gives 6 channels"):
        guided(process, options, 0.5, guide=lambda x, t, y: torch.cat([x, x], dim=1))


def test_text_features_are_guided_against_the_empty_text():
    parts, seen = tiny(), []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t, y):
            seen.append(y)
            return x * y.mean((1, 2)).view(-1, 1, 1, 1)

    words, empty = torch.rand(3, 7, 5), torch.rand(7, 5)
    options = section("sample", steps=2, cfg_scale=1.5)
    model = model_of(parts, options, Network(), Text(7, 5, empty))
    batches = list(model.batches(range(3), words, batch_size=2))
    assert [len(b.seeds) for b in batches] == [2, 1]
    assert torch.equal(seen[0], torch.cat([words[:2], empty.expand(2, -1, -1)]))
    model.condition = Text(7, 5)
    with pytest.raises(UsageError, match="features of the empty text"):
        model.draw(range(3), words)


def test_inpainting_keeps_what_is_known_for_every_sampler():
    process = build(section("process", schedule="vp_sde"))
    known, keep = torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4) > 0.5
    for name in SAMPLERS:
        options = section("sample", sampler=name, steps=6)
        inner = gaussian_image_denoiser(process)
        denoise, start = inpainting(process, known, keep)(inner, noise := torch.randn(2, 3, 4, 4))
        times = visited(process.schedule, options)
        x = run(options, process, denoise, start, times, lambda: torch.randn(2, 3, 4, 4))
        final = denoise(x, torch.tensor(0.001, dtype=torch.float64)).x0
        assert torch.equal(
            torch.where(keep, final, 0), torch.where(keep, known, 0).expand_as(final)
        ), name
        if name in (
            "ddim",
            "dpm_solver",
            "dpm_solver++",
            "unipc",
        ):  # exact along the known part's own path
            t = visited(process.schedule, options)[-1]
            expected = process.add_noise(known, t, noise) if t > 0 else known.expand_as(x)
            torch.testing.assert_close(
                torch.where(keep, x, 0), torch.where(keep, expected, 0), atol=1e-3, rtol=0
            )


def gaussian_image_denoiser(process):
    def denoise(x, t):
        alpha, sigma = process.schedule.alpha_sigma(t)
        return process.split(sigma * x / (alpha**2 * 0.25 + sigma**2), x, t)

    return denoise


def test_slerp_keeps_the_norm_and_meets_its_ends():
    a, b = torch.randn(2, 3, 8, 8)
    path = slerp(a, b / b.norm() * a.norm(), 5)
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path.flatten(1).norm(dim=1), a.norm().expand(5))
    torch.testing.assert_close(slerp(a, a, 3), a.expand(3, -1, -1, -1))


def test_trajectories_pick_the_first_and_the_last():
    watch = Trajectory()
    denoise, _ = watch.wrap(lambda x, t: Estimate(x + t, x), None)
    for i in range(20):
        denoise(torch.zeros(1), torch.tensor(float(i)))
    assert [x.item() for x in watch.pick(3)] == [0.0, 10.0, 19.0]


def test_rounding_rules_by_name():
    exact = torch.tensor([0.0, 1.9, 1.2, 127.5, 254.7, 300.0, -9.0]) / 127.5 - 1
    assert to_uint8(exact, "half_even").tolist() == [0, 2, 1, 128, 255, 255, 0]
    assert to_uint8(exact, "half_up").tolist() == [0, 2, 1, 128, 255, 255, 0]
    assert to_uint8(exact, "truncate").tolist() == [0, 1, 1, 127, 254, 255, 0]
    # The two ways of rounding part where a value lies halfway, which float32 seldom meets: 0.5 and
    # 2.5 of 255.
    halves = (torch.arange(255) + 0.5) / 127.5 - 1
    exactly = halves.float().add(1).mul(127.5) % 1 == 0.5
    gap = to_uint8(halves, "half_up").int() - to_uint8(halves)
    assert set(gap[exactly].tolist()) == {0, 1}


def test_dynamic_thresholds_clip_at_the_quantile_and_rescale():
    x0 = torch.linspace(-4, 4, 201).view(1, 1, 1, -1)
    got = dynamic_threshold(x0, 0.5)
    assert got.abs().max() == 1
    torch.testing.assert_close(got[0, 0, 0, 120], torch.tensor(0.8 / 2), atol=0.02, rtol=0)
    small = torch.rand(2, 1, 3, 3)
    assert torch.equal(dynamic_threshold(small, 0.9), small)


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_steps_are_each_images_own(order):
    """Easy and hard images in one batch: each takes times of its own, and stops at the end."""
    process = build(section("process", schedule="vp_sde"))
    options = section("sample", sampler="dpm_solver++", method="adaptive", order=order, end=1e-3)
    times = visited(process.schedule, options)
    spreads = torch.tensor([1.0, 0.02, 0.3]).view(-1, 1, 1, 1)
    x = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    taken = []

    def drawn(rows):
        met = []

        def denoise(x, t):
            met.append(t.clone())
            t = t.double().expand(len(x))
            alpha, sigma = (v.view(-1, 1, 1, 1).float() for v in process.schedule.alpha_sigma(t))
            x0 = alpha * spreads[rows] / (alpha**2 * spreads[rows] + sigma**2) * x
            return Estimate(x0, (x - alpha * x0) / sigma)

        out = run(options, process, denoise, x[rows], times)
        taken.append(len(met))
        return out

    together = drawn([0, 1, 2])
    alone = torch.cat([drawn([i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert taken[0] == max(taken[1:])
    assert len(set(taken[1:])) > 1


def test_numbers_that_are_not_finite_are_refused():
    parts = tiny()
    for parameter in parts.backbone.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with pytest.raises(MsmdiffError, match="not finite"):
        model_of(parts, section("sample", steps=2)).draw([0])


def test_a_learned_variance_is_not_guided():
    def network(x, time, y):
        out = torch.cat([x, x, torch.full_like(x, 0.5)], dim=1)[:, : 2 * x.shape[1]]
        return out * (1.0 + y.view(-1, 1, 1, 1))

    x, time, y = torch.ones(2, 2, 1, 1), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    plain, guided = network(x, time, y), Guided(network, Classes(1), 3.0)(x, time, y)
    assert torch.equal(guided[:, 2:], plain[:, 2:])
    assert torch.equal(guided[:, :2], 2 * plain[:, :2] + 3.0 * (plain[:, :2] - 2 * plain[:, :2]))
