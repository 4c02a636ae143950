import pytest
import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.backbones.layers import patchify
from msmdiff.core.backbones.routes import Route
from msmdiff.core.diffusion.coverage import is_primer
from msmdiff.core.errors import UsageError
from msmdiff.core.seeding import stream


def parts_of(*layers):
    return road.build(road.resolve(configuration.build(*layers)))


def draw(purpose, device="cpu"):
    return stream(device, 0, purpose, 0)


MASKED = {"objective": {"name": "msm"}, "mask": {"ratio": 0.75}}


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_masked_loss_is_the_mean_over_visible_tokens(loss):
    parts = parts_of(
        MASKED,
        {"objective": {"loss": loss}, "process": {"prediction": "v", "weighting": "min_snr"}},
    )
    x0, eps = torch.randn(2, 5, 3, 16, 16)
    t, _ = parts.objective.times.draw(5, draw)
    keep = parts.mask.draw(5, draw("mask"))

    def network(x_t, time, y, route):
        assert torch.equal(route.keep, keep)
        assert torch.equal(time, (t * 1000).round() - 1)
        return torch.full((5, parts.mask.kept, 12), 0.3)

    got = parts.objective.terms(network, x0, eps, t, None, Route(keep))["loss"].mean()
    target = patchify(parts.process.target(x0, eps, t), 2)
    per_image = []
    for i in range(5):
        error = 0.3 - target[i, keep[i]]
        per_image.append(
            (error.abs() if loss == "l1" else error**2).mean() * parts.process.weight(t)[i]
        )
    assert got == pytest.approx(sum(per_image).item() / 5, rel=1e-5)


def test_a_perfect_network_has_no_loss():
    parts = parts_of({"process": {"prediction": "x0"}})
    x0 = torch.randn(4, 3, 16, 16)
    assert parts.objective(lambda *_: x0, x0, None, draw)["loss"] == 0


@pytest.mark.parametrize("codec", [{}, {"codec": {"name": "dwt"}}])
def test_hidden_pixels_have_no_gradient(codec):
    parts = parts_of(MASKED, codec)
    x0 = torch.randn(3, *parts.codec.shape, requires_grad=True)
    parts.objective(parts.backbone, x0, None, draw)["loss"].backward()
    keep = parts.mask.draw(3, draw("mask"))
    touched = patchify(x0.grad, 2).abs().sum(-1) > 0
    assert torch.equal(
        touched, torch.zeros(3, parts.mask.tokens, dtype=torch.bool).scatter(1, keep, True)
    )


def test_masked_scores_of_the_full_grid_equal_denoising_score_matching():
    full = parts_of({"model": {"num_classes": 10}})
    none_hidden = parts_of(
        {"model": {"num_classes": 10}, "objective": {"name": "msm"}, "mask": {"ratio": 0.001}}
    )
    none_hidden.backbone.load_state_dict(full.backbone.state_dict())
    x0, y = torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 3])
    losses = [p.objective(p.backbone, x0, y, draw)["loss"].item() for p in (full, none_hidden)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("rate", "low", "high"), [(0.0, 0, 0), (0.25, 200, 300), (1.0, 1000, 1000)]
)
def test_labels_are_dropped_at_their_rate(rate, low, high):
    parts = parts_of({"model": {"num_classes": 10}, "objective": {"label_dropout": rate}})
    seen = []

    def network(x_t, time, y):
        seen.append(y)
        return torch.zeros_like(x_t)

    labels = torch.arange(1000) % 10
    parts.objective(network, torch.zeros(1000, 3, 16, 16), labels, draw)
    dropped = seen[0] == 10
    assert low <= dropped.sum() <= high
    assert torch.equal(seen[0][~dropped], labels[~dropped])


def test_an_unconditional_network_gets_no_labels():
    parts = parts_of({})

    def network(x_t, time, y):
        assert y is None
        return torch.zeros_like(x_t)

    parts.objective(network, torch.zeros(2, 3, 16, 16), torch.tensor([1, 2]), draw)


MDT = {
    "model": {
        "name": None,
        "family": "mdtv2",
        "patch_size": 2,
        "hidden_size": 16,
        "depth": 4,
        "num_heads": 2,
    }
    | {"decode_layers": 2, "learn_sigma": True, "num_classes": 3},
    "process": {"schedule": "linear", "weighting": "min_snr"},
}
EDT = {
    "model": {
        "name": None,
        "family": "edt",
        "patch_size": 2,
        "hidden_size": 16,
        "stage_widths": [16] * 5,
    }
    | {"stage_depths": [1] * 5, "stage_heads": [2] * 5, "learn_sigma": True, "num_classes": 3},
    "process": {"schedule": "linear", "weighting": "min_snr"},
}


def seen_by(objective, codec_shape, batch=6):
    """What each call of the network received."""
    calls = []

    def network(x_t, time, y, route=None):
        calls.append((x_t, time, y, route))
        return torch.zeros(len(x_t), 2 * x_t.shape[1], *x_t.shape[2:])

    x0 = torch.randn(batch, *codec_shape)
    return calls, objective(network, x0, torch.arange(batch) % 3, draw)


@pytest.mark.parametrize("layer", [MDT, EDT])
def test_two_passes_share_images_and_times_and_nothing_else(layer):
    parts = parts_of(layer, {"objective": {"label_dropout": 0.5}})
    calls, terms = seen_by(parts.objective, parts.codec.shape)
    (x, t, y, route), (x2, t2, y2, route2) = calls
    assert route is None
    assert route2 is not None
    assert torch.equal(t, t2)
    assert not torch.equal(x, x2)
    assert not torch.equal(y, y2)
    expected = {"loss"} | {f"{p}_{k}" for p in ("plain", "masked") for k in ("loss", "mse", "vb")}
    if layer is MDT:  # what was drawn, not the configured share that it starts from
        assert terms["mask_ratio"] == 1 - route2.keep.shape[1] / 64
        expected |= {"mask_ratio"}
    assert set(terms) == expected
    for name in ("plain", "masked"):
        assert terms[f"{name}_loss"] == pytest.approx(
            (terms[f"{name}_mse"] + terms[f"{name}_vb"]).item(), rel=1e-5
        )
    assert terms["loss"] == pytest.approx(
        (terms["plain_loss"] + terms["masked_loss"]).item(), rel=1e-5
    )


def test_mdtv2_hides_another_share_in_every_step_and_version_one_the_same():
    objective = parts_of(MDT).objective
    routes = objective.passes["masked"]
    kept = {
        routes(2, lambda purpose, device="cpu", i=i: stream(device, 0, purpose, i)).keep.shape[1]
        for i in range(200)
    }
    assert min(kept) in (32, 33)  # int(64 * (1 - 0.3 - 0.2 u)) for u close to 1
    assert max(kept) == 44  # int(64 * 0.7)
    assert len(kept) >= 10
    first = {**MDT, "model": {**MDT["model"], "family": "mdt"}}
    routes = parts_of(first).objective.passes["masked"]
    assert {
        routes(2, lambda p, device="cpu", i=i: stream(device, 0, p, i)).keep.shape[1]
        for i in range(20)
    } == {44}


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        (
            [MDT, {"objective": {"name": "msm"}, "mask": {"ratio": 0.5}}],
            r"'msm' does not suit model.family mdtv2: use 'mdt'",
        ),
        ([EDT, {"mask": {"ratio": 0.5}}], "draws masks of its own"),
        ([MDT, {"mask": {"ratio": 0.9}}], r"0\.9 plus mask.spread 0\.2 of the tokens"),
        ([{"objective": {"name": "edt"}}], "does not suit model.family uvit"),
        ([{"objective": {"channel_groups": [3, 9]}}], "must add up to the 3 channels"),
        ([{"model": {"num_classes": 3, "null_class": False}}], "needs a null class"),
        (
            [EDT, {"process": {"schedule": "vp_sde"}}],
            "model.learn_sigma needs a schedule of discrete steps",
        ),
        (
            [{"process": {"schedule": "vp_cosine", "time_sampling": "loss_second_moment"}}],
            "'loss_second_moment' needs a schedule of discrete steps",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(layers, complaint):
    with pytest.raises(UsageError, match=complaint):
        parts_of(*layers)


def test_channel_groups_are_averaged_apart():
    """MaskDM's wavelet loss: the mean error of the approximation plus that of the details."""
    parts = parts_of(MASKED, {"codec": {"name": "dwt"}, "objective": {"channel_groups": [3, 9]}})
    x0 = torch.randn(4, *parts.codec.shape)
    keep, t = parts.mask.draw(4, draw("mask")), torch.full((4,), 0.5)
    eps = torch.zeros_like(x0)
    error = torch.cat([torch.full((4, 3), 2.0), torch.full((4, 9), 1.0)], dim=1)[
        :, :, None, None
    ].expand_as(x0)
    out = parts.objective.terms(
        lambda *_: patchify(error.contiguous(), 2)[:, : keep.shape[1]],
        x0,
        eps,
        t,
        None,
        Route(keep),
    )
    assert out["loss"].tolist() == pytest.approx([5.0] * 4)


def test_times_with_large_losses_are_drawn_more_often_and_count_less():
    parts = parts_of(
        {
            "process": {
                "schedule": "linear",
                "timesteps": 25,
                "time_sampling": "loss_second_moment",
            },
            "sample": {"steps": 5},
        }
    )
    history = parts.objective.history
    for _ in range(10):
        history.update(torch.arange(1, 26) / 25, torch.where(torch.arange(25) < 5, 3.0, 1.0))
    t, importance = history.draw(20_000, lambda *_: torch.Generator().manual_seed(0))
    assert (t <= 0.2).float().mean() == pytest.approx(15 / 35, abs=0.02)
    assert importance.mean() == pytest.approx(1.0, abs=0.02)
    assert importance.unique().numel() == 2
    x0 = torch.ones(8, 3, 16, 16)
    before = history.losses.copy()
    history.update(torch.tensor([0.04]), torch.tensor([float("nan")]))  # of a step that is left out
    assert (history.losses == before).all()
    parts.objective(lambda x, *_: torch.zeros_like(x), x0, None, draw)
    assert (history.losses != before).any()


STEPS = {"schedule": "steps", "stages": [[0, 0.75], [0.5, 0.5]]}
PRIMERS = [
    ({"preset": "digits-pretrain"}, True),
    ({"preset": "digits-deferred"}, True),
    ({"preset": "digits-separate"}, True),
    ({"preset": "digits-tread"}, False),
    ({"preset": "digits-sprint"}, False),
    ({"preset": "digits-maskdit"}, False),
    ({"preset": "digits-mdt"}, False),
    ({"preset": "digits-flow"}, False),
    ({**MASKED, "mask": {"ratio": 0.75, "tail": 0.1}}, False),
    ({**MASKED, "mask": {"ratio": 0.75, **STEPS}}, True),
    ({**MASKED, "mask": {"ratio": 0.75, **STEPS, "stages": [[0, 0.75], [0.5, 0]]}}, False),
    ({**MASKED, "mask": {"ratio": 0.75, "schedule": "linear", "final_ratio": 0}}, False),
]


@pytest.mark.parametrize(("layer", "primer"), PRIMERS)
def test_a_primer_ends_without_a_whole_image_seen(layer, primer):
    preset = layer.get("preset")
    config = configuration.build(configuration.preset(preset) if preset else layer)
    assert is_primer(road.resolve(config, 10)) is primer
