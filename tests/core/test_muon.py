"""Muon for the blocks' matrices, AdamW for the rest, as one optimiser."""

import pytest
import torch
from torch import nn

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.config import section
from msmdiff.core.errors import UsageError
from msmdiff.core.training import optim
from msmdiff.core.training.optim import Parameters

DIT = {"name": None, "family": "dit", "patch_size": 2, "hidden_size": 32, "depth": 2}
DIT |= {"num_heads": 2, "num_classes": 10}
OF_DIT = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
OF_DIT |= {"modulation.weight"}


def network_of(**model):
    torch.manual_seed(0)
    config = road.resolve(configuration.build({"model": model or DIT}))
    network = road.build(config).backbone
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def trained(network):
    """Names and parameters, without the fixed positions."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def made(network, **options):
    config = section("optim", **{"name": "muon", "lr": 0.01, "weight_decay": 0.0, **options})
    return optim.build(config, Parameters.of(network))


def with_gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(network).values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return {name: p.grad.clone() for name, p in trained(network).items()}


def values(network):
    return {name: p.detach().clone() for name, p in trained(network).items()}


def orthogonalised(g, steps):
    """The published quintic iteration, in float64."""
    x = g.double() / g.double().norm()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.T if tall else x


def matrices_of(network):
    chosen = {id(p) for p in Parameters.of(network).matrices}
    return {name for name, p in network.named_parameters() if id(p) in chosen}


def test_the_matrices_are_the_linear_weights_of_the_blocks():
    assert {name.partition(".")[2].partition(".")[2] for name in matrices_of(network_of())} == (
        OF_DIT
    )
    assert len(matrices_of(network_of())) == 2 * len(OF_DIT)
    uvit = matrices_of(network_of(name="tiny", hidden_size=16, num_heads=2, depth=3))
    ends = {name.split(".", 1)[1].split(".", 1)[-1] for name in uvit if "skip" in name}
    assert ends == {"skip_linear.weight"}
    embedding = [n for n, _ in network_of().named_parameters() if "embed" in n or "final" in n]
    assert embedding
    assert not set(embedding) & matrices_of(network_of())


@pytest.mark.parametrize("nesterov", [True, False])
def test_two_steps_against_newton_schulz_by_hand(nesterov):
    network = network_of()
    optimizer = made(network, nesterov=nesterov, weight_decay=0.1)
    expected = {name: p.double() for name, p in values(network).items()}
    momentum = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(2):
        for name, g in with_gradients(network, step).items():
            momentum[name] = 0.95 * momentum[name] + 0.05 * g.double()
            ahead = 0.05 * g.double() + 0.95 * momentum[name]
            update = orthogonalised(ahead if nesterov else momentum[name], 5) if g.ndim == 2 else 0
            scale = 0.2 * max(g.shape) ** 0.5
            expected[name] = (1 - 0.01 * 0.1) * expected[name] - 0.01 * scale * update
        optimizer.step()
    started = values(network_of())
    for name in matrices_of(network):
        moved = network.get_parameter(name).double() - started[name].double()
        wanted = expected[name] - started[name].double()
        assert ((moved - wanted).norm() / wanted.norm()).item() < 0.02, name  # in bf16


def test_the_rest_has_adamws_bits():
    network, other = network_of(), network_of()
    optimizer = made(network, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-6)
    rest = [p for name, p in trained(other).items() if name not in matrices_of(other)]
    plain = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1,
                              fused=True)  # fmt: skip
    for step in range(3):
        for each, stepping in ((network, optimizer), (other, plain)):
            with_gradients(each, step)
            stepping.step()
    untouched = set(values(network)) - matrices_of(network)
    assert len(untouched) == len(rest) > 10
    for name in untouched:
        assert torch.equal(network.get_parameter(name), other.get_parameter(name)), name


def test_an_update_has_the_root_mean_square_of_adamws():
    """0.2 times the rate for matrices of every shape, of whatever gradients."""
    network, before = network_of(), values(network_of())
    optimizer = made(network, lr=0.01)
    with_gradients(network, 0)
    for parameter in trained(network).values():
        parameter.grad *= 1e-3
    optimizer.step()
    shapes = set()
    for name in matrices_of(network):
        moved = network.get_parameter(name) - before[name]
        shapes.add(tuple(moved.shape))
        assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2), name
    assert shapes == {(96, 32), (32, 32), (128, 32), (32, 128), (192, 32)}


def test_decay_is_the_sections_for_both():
    network, before = network_of(), values(network_of())
    optimizer = made(network, lr=0.01, weight_decay=0.5)
    for parameter in trained(network).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, p in trained(network).items():
        torch.testing.assert_close(p, (1 - 0.01 * 0.5) * before[name])


def test_a_loaded_state_goes_on_with_the_same_bits_and_a_new_rate():
    straight, stopped = network_of(), network_of()
    through, first = made(straight), made(stopped)
    for step in range(2):
        for network, optimizer in ((straight, through), (stopped, first)):
            with_gradients(network, step)
            optimizer.step()
    second = made(stopped)
    second.load_state_dict(first.state_dict())
    for network, optimizer in ((straight, through), (stopped, second)):
        for group in optimizer.param_groups:
            group["lr"] = 0.003
        with_gradients(network, 2)
        optimizer.step()
    assert all(torch.equal(p, straight.get_parameter(n)) for n, p in trained(stopped).items())
    assert len(second.param_groups) == 2
    assert len(second.state) == len(trained(stopped))


@pytest.mark.parametrize("bad", [False, True])
def test_a_loss_scaler_unscales_and_leaves_out_what_is_not_finite(bad):
    network, plain, before = network_of(), network_of(), values(network_of())
    optimizer, unscaled = made(network), made(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # begins
    with_gradients(plain, 0)
    with_gradients(network, 0)
    for parameter in trained(network).values():
        parameter.grad *= 1024
    if bad:
        next(iter(trained(network).values())).grad[:] = torch.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    unscaled.step()
    after = before if bad else values(plain)
    assert all(torch.equal(p, after[name]) for name, p in trained(network).items())
    assert scaler.get_scale() == (512 if bad else 1024)


@pytest.mark.parametrize("name", ["muon", "adamw", "adan"])
def test_the_size_of_the_state_is_counted(name):
    network = network_of()
    config = section("optim", name=name, lr=0.01)
    optimizer = optim.build(config, Parameters.of(network))
    with_gradients(network, 0)
    optimizer.step()
    kept = sum(
        value.numel()
        for state in optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and key != "step"
    )
    assert optim.state_size(config, Parameters.of(network)) == kept


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UsageError, match=r"optim\.name muon needs the matrices .*: use adamw"):
        made(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
