"""Alignment: what learns and what is followed, which tokens are compared, and that a training with
it is one that stops, resumes and counts.
"""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.backbones.layers import gather_tokens
from msmdiff.core.backbones.routes import Hidden, Route
from msmdiff.core.diffusion.alignment import Seen, cosine_distance, paired
from msmdiff.core.diffusion.codecs.vae import VaeCodec
from msmdiff.core.diffusion.repa import Convolution
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.seeding import stream
from msmdiff.core.training import checkpoint, cost, memory
from msmdiff.core.training.run import Run
from msmdiff.core.training.step import Step
from msmdiff.core.training.trainer import Trainer, train
from msmdiff.core.training.warmstart import next_stage

DIT = {
    "model": {
        "name": None,
        "family": "dit",
        "patch_size": 4,
        "hidden_size": 16,
        "depth": 4,
        "num_heads": 2,
    }
}
UVIT = {"model": {**DIT["model"], "family": "uvit", "depth": 5}}
MSM = {"objective": {"name": "msm"}, "mask": {"ratio": 0.5}}
ENCODER = "test_vit"  # timm's smallest: patches of 16, 64 wide


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def aligned(name, **options):
    return {"objective": {"alignment": name, **options}}


def parts_of(*layers):
    config = road.resolve(configuration.build(DIT, *layers))
    return config, road.build(config)


def learnt(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def draw(purpose, device="cpu"):
    return stream(device, 0, purpose, 0)


def started(*layers, average=None):
    """An objective with its alignment, and the network it looks at."""
    config, parts = parts_of(*layers)
    learnt(parts.backbone)
    alignment = parts.alignment(config)
    averages = {"0.9": average(parts) if average else parts.backbone}
    alignment.start(torch.device("cpu"), averages, nullcontext)
    parts.objective.alignment = alignment
    return parts, alignment


def seen(parts, hidden=None, route=None):
    x0, eps = torch.randn(2, 3, *parts.codec.shape)
    t = torch.tensor([0.9, 0.5, 0.3])
    return Seen(x0, eps, t, None, route, hidden or {}, draw)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The file of a small encoder with random weights, and the network."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model(ENCODER, num_classes=0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_file(network.state_dict(), path)
    return path, network.eval()


# ------------------------------------------------------------------ what is compared


def test_equal_features_are_at_no_distance():
    tokens = torch.randn(3, 5, 8)
    assert cosine_distance(tokens, 2 * tokens).abs().max() < 1e-6
    assert cosine_distance(tokens, -tokens).tolist() == pytest.approx([2.0] * 3)
    parts, layersync = started(aligned("layersync", align_block=1, align_to=3))
    hidden = Hidden(tokens, None)
    assert layersync.distance(seen(parts, {1: hidden, 3: hidden})).abs().max() < 1e-6
    parts, sra = started(aligned("sra", align_block=2, align_to=2, align_earlier=0.0))
    sra.projector = nn.Identity()
    batch = seen(parts)
    with sra.watching() as student:
        x_t = parts.process.add_noise(batch.x0, batch.t, batch.eps)
        parts.process.feed(parts.backbone, x_t, batch.t)
    batch.hidden = student
    assert sra.distance(batch).abs().max() < 1e-9
    parts, sra = started(aligned("sra", align_block=2, align_to=3, align_earlier=0.0))
    sra.projector, batch.hidden = nn.Identity(), student
    assert sra.distance(batch).min() > 0.01


def test_tokens_are_compared_where_both_are():
    a, b = torch.randn(2, 3, 6, 4)
    keep = torch.tensor([[0, 3], [5, 1], [2, 4]])
    some = gather_tokens(b, keep)
    for one, two in (
        (Hidden(a, None), Hidden(some, keep)),
        (Hidden(gather_tokens(a, keep), keep), Hidden(b, None)),
    ):
        left, right = paired(one, two)
        assert torch.equal(left, gather_tokens(a, keep))
        assert torch.equal(right, some)


CLASS_TOKENS = {"class_tokens": 2, "class_tokens_at": 1, "num_classes": 3}


@pytest.mark.parametrize(
    "family", [DIT, UVIT, {"model": CLASS_TOKENS}], ids=["dit", "uvit", "class-tokens"]
)
def test_what_is_watched_are_the_patches_behind_a_block(family):
    _, parts = parts_of(family)
    network, trunk = learnt(parts.backbone), parts.backbone.trunk
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    found = []
    block = network.trunk_blocks()[1]
    handle = block.register_forward_hook(lambda module, given, made: found.append(made))
    keep = torch.tensor([[1, 2, 9], [0, 15, 4]])
    with trunk.watching((2, trunk.depth)) as hidden:
        network(x, t)
        assert hidden[2].keep is None
        assert torch.equal(hidden[2].tokens, found[0][:, trunk.extras :])
        network(x, t, None, Route(keep))
        assert torch.equal(hidden[2].keep, keep)
        assert torch.equal(hidden[2].tokens, found[1][:, trunk.extras :])
        assert hidden[trunk.depth].tokens.shape == (2, 3, 16)
    handle.remove()
    network(x, t)
    assert not trunk._hidden


def test_the_average_can_see_all_tokens_of_a_masked_image():
    keep = torch.tensor([[1, 2, 9], [0, 15, 4], [3, 5, 7]])
    parts, sra = started(MSM, aligned("sra", align_sees="all", align_earlier=0.0))
    everything = sra.features(seen(parts, route=Route(keep)))
    assert everything.keep is None
    torch.manual_seed(0)
    batch = seen(parts, route=Route(keep))
    x_t = parts.process.add_noise(batch.x0, batch.t, batch.eps)
    with parts.backbone.trunk.watching((sra.late,)) as hidden, torch.no_grad():
        parts.process.feed(parts.backbone, x_t, batch.t)
    all_tokens = sra.features(batch).tokens
    torch.testing.assert_close(all_tokens, hidden[sra.late].tokens)
    parts, sra = started(MSM, aligned("sra", align_earlier=0.0))
    kept = sra.features(batch)
    assert torch.equal(kept.keep, keep)
    assert kept.tokens.shape == (3, 3, 16)


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_the_average_sees_less_noise(schedule):
    prediction = "velocity" if schedule == "flow" else "x0"
    process = {"process": {"schedule": schedule, "prediction": prediction}}
    parts, sra = started(process, aligned("sra", align_earlier=0.4))
    times = []
    sra.teacher.register_forward_pre_hook(lambda module, given: times.append(given[1]))
    batch = seen(parts)
    sra.features(batch)
    lower = torch.rand(3, generator=draw("alignment"))
    expected = (batch.t - 0.4 * lower).clamp(min=1e-3)
    clock = parts.process.schedule.clock(sra._time(expected))
    torch.testing.assert_close(times[0], clock)
    assert (times[0] < parts.process.schedule.clock(batch.t)).all()


# ------------------------------------------------------------------ what learns


def test_only_the_student_has_a_gradient():
    parts, _ = started(MSM, aligned("layersync", align_block=1, align_to=3))
    network = parts.backbone
    x0 = torch.randn(4, 3, 16, 16)
    objective = parts.objective
    objective.alignment.weight = 1.0
    terms = objective(network, x0, None, draw)
    total = (terms["mse"] + terms["alignment"]).item()
    assert terms["loss"].item() == pytest.approx(total, rel=1e-5)
    terms["alignment"].backward()
    for number, block in enumerate(network.blocks):
        touched = block.attn.qkv.weight.grad is not None
        assert touched == (number < 1), number


def test_the_average_has_no_gradient_and_the_projector_has():
    other = {}

    def average(parts):
        other["net"] = learnt(road.build(other["config"]).backbone, seed=1)
        return other["net"]

    other["config"], _ = parts_of(MSM, aligned("sra"))
    parts, sra = started(MSM, aligned("sra"), average=average)
    parts.objective(parts.backbone, torch.randn(4, 3, 16, 16), None, draw)["loss"].backward()
    assert all(p.grad is None for p in other["net"].parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sra.parameters())
    assert len(sra.parameters()) == 6


def test_the_rest_of_the_loss_stays_as_it_was():
    _, plain = parts_of(MSM)
    parts, _ = started(MSM, aligned("sra"))
    learnt(plain.backbone)
    x0 = torch.randn(4, 3, 16, 16)
    without = plain.objective(plain.backbone, x0, None, draw)["loss"]
    assert torch.equal(parts.objective(parts.backbone, x0, None, draw)["mse"], without)


def test_times_are_drawn_by_the_loss_without_it():
    times = {"process": {"time_sampling": "loss_second_moment"}}
    _, plain = parts_of(times)
    parts, _ = started(times, aligned("layersync", align_weight=100))
    learnt(plain.backbone)
    x0 = torch.randn(4, 3, 16, 16)
    loss = plain.objective(plain.backbone, x0, None, draw)["loss"]
    assert parts.objective(parts.backbone, x0, None, draw)["loss"] > 2 * loss
    wanted, got = (each.objective.history.losses for each in (plain, parts))
    assert (wanted > 0).any()
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_it_is_off_after_its_share():
    parts, _ = started(MSM, aligned("sra", align_until=0.5))
    x0 = torch.randn(2, 3, 16, 16)
    assert "alignment" in parts.objective(parts.backbone, x0, None, draw, 0.49)
    assert "alignment" not in parts.objective(parts.backbone, x0, None, draw, 0.5)


# ------------------------------------------------------------------ an encoder


def repa(name, path, **options):
    given = {"encoder": ENCODER, "encoder_weights": str(path), **options}
    return aligned(name, **given)


def test_the_encoder_sees_the_clean_image_patch_by_patch(encoder):
    path, network = encoder
    big = {"data": {"image_size": 160}, "model": {"patch_size": 16}}
    parts, alignment = started(big, repa("repa", path, align_block=1))
    batch = seen(parts)
    got = alignment.features(batch)
    images = parts.codec.decode(batch.x0).float() / 255
    with torch.no_grad():  # of its own size, and (0.5, 0.5) is its mean and deviation
        expected = network.forward_features(images * 2 - 1)[:, 1:]
    assert got.shape == (3, 100, 64)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_dense_and_masked_targets_are_the_same_features(encoder):
    path, _ = encoder
    keep = torch.tensor([[1, 2, 9], [0, 15, 4], [3, 5, 7]])
    parts, alignment = started(MSM, repa("repa", path))
    batch = seen(parts, route=Route(keep))
    features = alignment.features(batch)
    assert features.shape == (3, 16, 64)
    projector = alignment.projector
    alignment.projector = nn.Identity()
    target = gather_tokens(features, keep)
    batch.hidden = {alignment.student: Hidden(target, keep)}
    assert alignment.distance(batch).abs().max() < 1e-5
    batch.hidden = {alignment.student: Hidden(target.roll(1, dims=1), keep)}
    assert alignment.distance(batch).min() > 1e-4
    alignment.projector = projector
    parts.objective(parts.backbone, batch.x0, None, draw)["loss"].backward()
    assert all(p.grad is not None for p in alignment.parameters())
    assert all(p.grad is None for p in alignment.encoder.network.parameters())


def test_irepa_compares_what_differs_over_the_image(encoder):
    path, _ = encoder
    parts, alignment = started(repa("irepa", path))
    features = alignment.features(seen(parts))
    assert features.mean(1).abs().max() < 1e-5
    assert features.std(1).min() > 0.99
    assert isinstance(alignment.projector, Convolution)


def test_the_convolution_sees_neighbours_that_are_there():
    convolution = Convolution(4, 6, (3, 3))
    tokens = torch.randn(2, 9, 4)
    everyone = torch.arange(9).flip(0).expand(2, -1)
    whole = convolution(tokens)
    image = convolution.conv(tokens.mT.reshape(2, 4, 3, 3))
    torch.testing.assert_close(whole, image.flatten(2).mT)
    torch.testing.assert_close(convolution(tokens.flip(1), everyone), whole.flip(1))
    corner = torch.tensor([[0], [0]])
    alone = convolution(tokens[:, :1], corner)
    hidden = tokens.clone()
    hidden[:, 1:] = 0
    torch.testing.assert_close(alone, convolution(hidden)[:, :1])


def test_a_missing_or_wrong_encoder_is_said_so(encoder, tmp_path):
    with pytest.raises(UsageError, match=r"encoder_weights .*/none.pt: give the file of test_vit"):
        started(repa("repa", tmp_path / "none.pt"))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(MsmdiffError, match="does not hold the weights of test_vit"):
        started(repa("repa", tmp_path / "other.safetensors"))
    with pytest.raises(UsageError, match=r"objective.encoder vit_no is no network of timm's"):
        parts_of(aligned("repa", encoder="vit_no"))
    with pytest.raises(UsageError, match=r"objective.encoder resnet18 is no vision transformer"):
        parts_of(aligned("repa", encoder="resnet18"))


class Operations(TorchDispatchMode):
    """The names of the operations inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("latent", [False, True])
def test_features_do_not_wait_for_the_device(encoder, vae, latent):
    """Nothing reads a number of a tensor, or makes a tensor of numbers."""
    given = {"data": {"image_size": 64}, "model": {"patch_size": 2 if latent else 16}}
    if latent:
        given["codec"] = {"name": "vae", "vae": str(vae)}
    parts, alignment = started(repa("repa", encoder[0]), given)
    batch = seen(parts)
    expected = alignment.encoder(parts.codec.decode(batch.x0))
    with Operations() as operations:
        features = alignment.features(batch)
    assert torch.equal(features, expected)
    assert "convolution" in operations.names
    assert not operations.names & {"_local_scalar_dense", "lift_fresh"}


def test_an_encoder_is_read_from_where_timm_finds_it(encoder, tmp_path):
    path, network = encoder
    state, wrapped = network.state_dict(), tmp_path / "wrapped.pt"
    _, plain = started(repa("repa", path))
    for content in ({"state_dict": state, "epoch": 3}, {"model": state, "optimizer": {}}):
        torch.save(content, wrapped)
        _, alignment = started(repa("repa", wrapped))
        assert alignment.encoder.digest == plain.encoder.digest
        images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
        assert torch.equal(alignment.encoder(images), plain.encoder(images))
    wrong = {"list": list(state.values()), "int": {**state, "epoch": 3}, "dict": {}}
    for kind, content in wrong.items():
        torch.save(content, wrapped)
        with pytest.raises(MsmdiffError, match=rf"wrapped.pt holds .* a {kind}.*state dict"):
            started(repa("repa", wrapped))


# ------------------------------------------------------------------ in a training

RUN = {
    "train": {
        "batch_size": 8,
        "steps": 6,
        "log_every": 1,
        "preview_every": 0,
        "checkpoint_every": 3,
    },
    "ema": {"decays": [0.9], "update_after_step": 1},
}


def numbers(run):
    state, networks = checkpoint.load(checkpoint.newest(run))
    flat = {f"{stem}/{k}": v for stem, tensors in networks.items() for k, v in tensors.items()}
    for i, values in state["optimizer"]["state"].items():
        flat |= {f"optimizer/{i}/{k}": v for k, v in values.items() if torch.is_tensor(v)}
    projector = state.get("alignment", {}).get("projector", {})
    return flat | {f"projector/{k}": v for k, v in projector.items()}


@pytest.mark.parametrize("name", ["layersync", "sra", "irepa"])
def test_a_run_resumes_bit_for_bit(tmp_path, quiet, monkeypatch, name, encoder):
    layer = repa(name, encoder[0]) if "repa" in name else aligned(name, align_until=0.7)
    layers = (DIT, MSM, RUN, layer)
    train(configuration.build(*layers), tmp_path / "straight", quiet)
    # The share of the training counts: the first start is planned as long as the whole.
    step = Trainer._take_step

    def killed(self, batches):
        if self.images_seen == 4 * 8:
            raise RuntimeError("killed")
        step(self, batches)

    monkeypatch.setattr(Trainer, "_take_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(configuration.build(*layers), tmp_path / "resumed", quiet)
    monkeypatch.setattr(Trainer, "_take_step", step)
    train(configuration.build(*layers), tmp_path / "resumed", quiet)
    one, two = numbers(tmp_path / "straight"), numbers(tmp_path / "resumed")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(key.startswith("projector/") for key in one) == (name != "layersync")
    lines = Run(tmp_path / "straight", writes=False).metrics()
    aligned_lines = ["alignment" in line for line in lines]
    assert aligned_lines == ([True] * 6 if "repa" in name else [True] * 5 + [False])
    published = checkpoint.load(checkpoint.newest(tmp_path / "straight"))[1]["model"]
    assert published.keys() == parts_of(*layers)[1].backbone.state_dict().keys()


def test_another_encoder_is_refused_on_resuming(tmp_path, quiet, encoder):
    path = tmp_path / "encoder.safetensors"
    state = encoder[1].state_dict()
    save_file(state, path)
    layers = (DIT, RUN, repa("repa", path))
    train(configuration.build(*layers, {"train": {"steps": 1}}), tmp_path / "run", quiet)
    save_file({key: value + 0.1 for key, value in state.items()}, path)
    with pytest.raises(UsageError, match="holds other numbers than the file that this run was"):
        train(configuration.build(*layers), tmp_path / "run", quiet)


def test_the_network_starts_as_without_it(tmp_path, quiet):
    starts = []
    for layer in ({}, aligned("sra")):
        trainer = Trainer(configuration.build(DIT, RUN, layer), tmp_path / str(len(starts)), quiet,
                          False, "")  # fmt: skip
        starts.append({k: v.clone() for k, v in trainer.parts.backbone.state_dict().items()})
        trainer.close()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_the_projector_is_clipped_and_moved_with_the_network(tmp_path, quiet):
    config = configuration.build(DIT, MSM, RUN, aligned("sra"))
    trainer = Trainer(config, tmp_path / "run", quiet, False, "")
    step: Step = trainer.step
    before = [p.clone() for p in step.alignment.parameters()]
    assert len(step._trained()) == len(list(trainer.parts.backbone.parameters())) + 6
    trainer.fit()
    assert all((p != b).any() for p, b in zip(step.alignment.parameters(), before, strict=True))
    trainer.close()


def test_what_it_costs_is_counted(encoder):
    def counted(*layers):
        config = road.resolve(configuration.build(DIT, *layers))
        return cost.measure(config), memory.estimate(config, device="cpu")

    plain, small = counted(MSM)
    layersync, _ = counted(MSM, aligned("layersync"))
    assert layersync.step_flops == plain.step_flops
    sra, larger = counted(MSM, aligned("sra", align_until=0.5))
    projector = 2 * 8 * (16 * 64 + 64 * 64 + 64 * 16)  # of the 8 visible tokens
    assert sra.alignment_flops == round(0.5 * (plain.masked_flops + 3 * projector))
    numbers = 16 * 64 + 64 * 64 + 64 * 16 + 64 + 64 + 16
    assert larger.weights - small.weights == 4 * numbers
    assert larger.averages == small.averages
    assert larger.activations > small.activations
    whole, _ = counted(MSM, aligned("sra", align_sees="all"))
    assert whole.alignment_flops == plain.forward_flops + 3 * projector
    followed, largest = counted(repa("repa", encoder[0]))
    images = 2 * 17 * 64 * 64 * 12 * 6  # 6 blocks of the encoder, by their matrices alone
    assert followed.alignment_flops > images
    assert largest.weights > small.weights + 4 * 280_000


def test_the_decoder_that_repa_runs_is_counted(encoder, vae):
    latent = {
        "data": {"image_size": 64},
        "model": {"patch_size": 2},
        "codec": {"name": "vae", "vae": str(vae)},
        "train": {"batch_size": 8},
    }
    layers = (latent, repa("repa", encoder[0]))
    config, parts = parts_of(*layers)
    alignment = parts.alignment(config)
    alignment.encoder.load(str(encoder[0]), torch.device("cpu"))
    plain = sdpa_kernel(SDPBackend.MATH)  # the CPU's fused one is not counted
    with plain, FlopCounterMode(display=False) as counter:
        images = parts.codec.decode(torch.zeros(1, *parts.codec.shape))
        decoding = counter.get_total_flops()
        alignment.encoder(images)
    assert 0 < decoding < counter.get_total_flops()
    assert alignment.passes(0, 0) == counter.get_total_flops()
    found = memory.estimate(config, device="cpu")
    numbers = sum(p.numel() for p in parts.codec.network.parameters())
    numbers += sum(p.numel() for p in alignment.encoder.network.parameters())
    own = sum(p.numel() for p in parts.backbone.parameters())
    projector = sum(p.numel() for p in alignment.parameters())
    assert found.weights == 4 * (own + projector + numbers)
    without = memory.estimate(parts_of(latent)[0], device="cpu")
    assert found.activations > without.activations + 4 * 8 * 8 * 64 * 64  # 8 maps of the last level
    usual = VaeCodec(256).sketch()  # Stable Diffusion's
    with FlopCounterMode(display=False) as counter:
        usual.unrounded(torch.empty(1, *usual.shape, device="meta"))
    assert counter.get_total_flops() == pytest.approx(622e9, rel=0.01)


def test_a_mask_that_ends_keeps_its_alignment_for_its_share():
    layer = {"mask": {"ratio": 0.5, "tail": 0.25}}
    config = road.resolve(configuration.build(DIT, MSM, layer, aligned("sra")))
    pieces = list(cost.pieces(config))
    assert [share for share, _ in pieces] == [0.75, 0.25]
    assert {piece.objective.alignment for _, piece in pieces} == {"sra"}
    config = road.resolve(configuration.build(DIT, MSM, layer, aligned("sra", align_until=0.6)))
    (_, masked), (_, tail) = cost.pieces(config)
    assert masked.objective.align_until == pytest.approx(0.8)
    assert masked.objective.name == "msm"
    assert tail.objective.alignment == "none"
    plain = cost.measure(road.resolve(configuration.build(DIT, MSM, layer)))
    beside = cost.measure(config).alignment_flops / 0.6
    expected = 0.75 * 3 * plain.masked_flops + 0.25 * 3 * plain.forward_flops + 0.6 * beside
    assert cost.flops_per_image(config) == pytest.approx(expected)


def test_the_next_stage_does_not_inherit_it():
    config = road.resolve(configuration.build(DIT, MSM, aligned("sra", align_weight=0.3)))
    layer = next_stage(config)
    assert not [key for key in layer["objective"] if key.startswith("align")]
    assert configuration.build(layer).objective.alignment == "none"


MDT = {"family": "mdtv2", "decode_layers": 2, "num_classes": 3}
EDT = {"family": "edt", "stage_widths": [16] * 5, "stage_depths": [1] * 5, "stage_heads": [2] * 5}


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([{"model": MDT}, aligned("layersync")], "goes beside the one pass .* not beside mdt"),
        (
            [
                {"model": {**EDT, "depth": None, "num_heads": None}},
                {"objective": {"name": "dsm", "alignment": "layersync"}},
            ],
            "this one shows none: use model.family uvit or dit",
        ),
        ([aligned("layersync", align_block=9)], "align_block 9: this network has blocks 1 to 4"),
        (
            [aligned("layersync", align_block=3, align_to=2)],
            "align_to 2 must lie behind objective.align_block 3",
        ),
        (
            [aligned("sra"), {"ema": {"decays": []}}],
            "learns from a moving average: give ema.decays",
        ),
        ([aligned("sync")], "objective.alignment 'sync' is none of the alignments"),
        ([aligned("none", align_weight=0.1)], "align_weight 0.1 has no effect on the alignment"),
    ],
)
def test_what_does_not_go_together_is_refused(layers, words):
    with pytest.raises(UsageError, match=words):
        parts_of(*layers)


def test_from_the_command_line(cli, tmp_path):
    small = ["train.steps=2", "train.batch_size=8", "train.preview_every=0", "model.depth=6"]
    sets = [word for pair in small for word in ("--set", pair)]
    cli("train", "--config", "digits-sra", "--run", "primer", *sets)
    line = json.loads((tmp_path / "runs/primer/metrics.jsonl").read_text().splitlines()[-1])
    assert line["alignment"] > 0
    assert line["loss"] == pytest.approx(line["mse"] + line["alignment"], rel=1e-4)
