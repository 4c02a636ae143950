"""The GPU's path where there is no GPU: tensors without numbers on `cuda:0`, which raise where two
devices meet or the host would wait for the device; and what torch.compile makes of every network.
"""

import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets, registry
from msmdiff.core.backbones.routes import compile_blocks
from msmdiff.core.model import Model
from msmdiff.core.samplers.times import visited

DIGITS = sorted(name for name in presets.names() if name.startswith("digits-"))
CUDA = "cuda:0"


class Generator(torch.Generator):
    """A generator that says it is on the GPU, which none without a GPU can be."""

    where = torch.device(CUDA)

    @property
    def device(self):
        return self.where


def draw(purpose, device=CUDA):
    made = Generator()
    made.where = torch.device(device)
    return made


def parts_of(name, **layer):
    chosen = configuration.build(presets.read(name), layer)
    chosen = road.resolve(chosen, data_classes=10)
    return chosen, road.build(chosen)


class RealOnTheCpu(TorchDispatchMode):
    """Inside a fake mode: what touches the CPU only is computed, since it may be read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if fake or device.type == "cuda":
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


@pytest.fixture
def on_the_gpu(monkeypatch):
    """Here new tensors on the GPU have no numbers, and memory is pinned without a driver."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), RealOnTheCpu(), torch.no_grad():
        yield


def without_numbers(module):
    """Put such tensors in place of a network's numbers."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype, device=CUDA)
                part._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=CUDA)


@pytest.mark.parametrize("name", DIGITS)
def test_the_objective_stays_on_the_device_and_never_waits(name, on_the_gpu):
    _, parts = parts_of(name)
    without_numbers(parts.backbone)
    parts.process.to(torch.device(CUDA))
    x0 = torch.empty(4, *parts.codec.shape, device=CUDA)
    y = parts.objective.condition.example(4, CUDA)
    terms = parts.objective(parts.backbone, x0, y, draw, 0.0)
    assert {str(value.device) for value in terms.values()} == {CUDA}
    with pytest.raises(DataDependentOutputException):
        terms["loss"].item()  # so that a wait would have been noticed


SAMPLERS = sorted(registry.entries("sampler"))


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *itertools.product(
            ["digits-dit", "digits-mdtv2", "digits-flow"],
            [sampler for sampler in SAMPLERS if sampler != "meanflow"],
        ),
        ("digits-meanflow", "meanflow"),
        ("digits-meanflow", "heun"),
    ],
)
def test_samplers_stay_on_the_device_and_never_wait(name, sampler, on_the_gpu):
    options = {"sampler": sampler, "steps": 6, "cfg_scale": 1.5, "times": None}
    config, parts = parts_of(name, sample=options)
    without_numbers(parts.backbone)
    model = Model(
        backbone=parts.backbone.eval(),
        process=parts.process,
        codec=parts.codec,
        condition=parts.objective.condition,
        config=config,
    )
    entry = registry.find("sampler", sampler, "sample.sampler")
    schedule = parts.process.schedule
    x = torch.empty(2, *parts.codec.shape, device=CUDA)
    y = torch.empty(2, dtype=torch.long, device=CUDA)
    made = entry.make(
        model.denoiser(y),
        schedule,
        x,
        visited(schedule, config.sample),
        lambda: torch.empty_like(x),
        **entry.takes(config.sample),
    )
    assert (made.shape, str(made.device)) == (x.shape, CUDA)


def drawn_at(step):
    """Draws that are other ones at every step."""

    def draw(purpose, device="cpu"):
        return torch.Generator(device).manual_seed(100 * step + len(purpose))

    return draw


@pytest.mark.parametrize("name", DIGITS)
def test_a_network_compiles_into_one_graph(name):
    """`fullgraph` refuses a graph break; the second of two passes is another graph."""
    layer = {"mask": {"spread": 0.0}} if name == "digits-mdtv2" else {}
    _, parts = parts_of(name, **layer)
    torch._dynamo.reset()
    counter = CompileCounter()
    network = torch.compile(parts.backbone, backend=counter, fullgraph=True, dynamic=False)
    x0 = torch.randn(2, *parts.codec.shape)
    y = parts.objective.condition.example(2, "cpu")
    for step in range(3):
        with torch.no_grad():
            parts.objective(network, x0, y, drawn_at(step), 0.0)
    assert counter.frame_count == len(parts.objective.passes)


@pytest.mark.parametrize(("name", "kinds"), [("digits-dit", 1), ("digits-uvit", 2)])
def test_alike_blocks_share_a_graph(name, kinds):
    """U-ViT's are of two kinds, without and with a long skip."""
    _, parts = parts_of(name)
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_blocks(parts.backbone, backend=counter, fullgraph=True)
    before = set(parts.backbone.state_dict())
    x, t = torch.randn(2, *parts.codec.shape), torch.rand(2)
    y = parts.objective.condition.example(2, "cpu")
    with torch.no_grad():
        parts.backbone(x, t, y)
        parts.backbone(x, t, y)
    assert counter.frame_count == kinds
    assert set(parts.backbone.state_dict()) == before


def test_two_ratios_are_two_compilations():
    """A mask that changes over the training, in 200 steps of which each draws other tokens."""
    schedule = {"schedule": "steps", "stages": [[0, 0.9], [0.5, 0.75]]}
    small = {"name": "tiny", "hidden_size": 16, "num_heads": 2, "depth": 3}
    _, parts = parts_of("digits-pretrain", mask=schedule, model=small)
    torch._dynamo.reset()
    counter = CompileCounter()
    network = torch.compile(parts.backbone, backend=counter, fullgraph=True, dynamic=False)
    x0 = torch.randn(2, *parts.codec.shape)
    y = parts.objective.condition.example(2, "cpu")
    for step in range(200):
        with torch.no_grad():
            parts.objective(network, x0, y, drawn_at(step), step / 200)
    assert counter.frame_count == 2
