"""The estimate of a training's memory: what it follows, and how it moves with the configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets
from msmdiff.core.errors import UsageError
from msmdiff.core.training import memory, meter


def estimated(*sets: str, preset: str = "digits-finetune", **how):
    layers = presets.read(preset), configuration.parse_sets(["train.precision=fp32", *sets])
    return memory.estimate(road.resolve(configuration.build(*layers), 10), **how)


def test_what_is_alive_is_followed_and_views_are_not_counted_twice():
    with memory._Alive(torch.nn.Identity()) as alive:
        a = torch.zeros(1000)
        view = a.view(10, 100)
        b = view + 1
        del a, view
        assert alive.now == 4000
        c = b * 2
        del b, c
    assert (alive.now, alive.peak) == (0, 8000)


def test_numbers_of_the_network_and_their_gradients_are_not_its_activations():
    network = torch.nn.Linear(100, 100, bias=False)
    x = torch.zeros(1, 100)
    alive = memory._Alive(network)
    with alive:
        network(x).sum().backward()
    assert network.weight.grad is not None
    assert alive.now < 1000
    assert alive.peak < 2 * 4 * network.weight.numel()


def test_the_numbers_of_a_network_are_counted_exactly():
    found = estimated("ema.decays=[0.9, 0.99]")
    parts = road.build(road.resolve(configuration.build(presets.read("digits-finetune")), 10))
    numbers = sum(p.numel() for p in parts.backbone.parameters())
    assert found.weights == found.gradients == 4 * numbers
    assert found.averages == found.optimiser == 8 * numbers
    assert found.total == sum(v for k, v in found.as_dict().items() if k != "total")


def test_activations_follow_the_batch_the_mask_and_checkpoints():
    whole = estimated().activations
    assert estimated("train.batch_size=64").activations == pytest.approx(whole / 2, rel=0.05)
    masked = ("objective.name=msm", "mask.ratio=0.5")
    assert estimated(*masked).activations == pytest.approx(whole / 2, rel=0.15)
    every, second = (
        estimated(f"train.gradient_checkpointing={n}").activations for n in ("true", 2)
    )
    assert every < whole / 3 < second < 0.75 * whole
    assert estimated(processes=2).activations == pytest.approx(whole / 2, rel=0.05)
    assert estimated("train.micro_batch_size=32").activations == pytest.approx(whole / 4, rel=0.05)


def test_both_passes_and_all_copies_are_held_at_once():
    plain = estimated("objective.name=dsm", preset="digits-edt").activations
    assert estimated(preset="digits-edt").activations > 1.8 * plain
    one = estimated(preset="digits-pretrain").activations
    assert estimated("mask.route=separate", preset="digits-pretrain").activations > 2 * one


def test_shards_divide_the_states_and_copies_exchange_gradients():
    alone, two = estimated(), estimated(processes=2)
    shards = estimated(processes=2, sharded=True)
    assert two.buckets == alone.gradients
    assert shards.buckets == 0
    assert shards.optimiser == alone.optimiser // 2
    with pytest.raises(UsageError, match="does not divide by 3 processes"):
        estimated(processes=3)


def test_a_gpu_counts_tensors_alone():
    found = estimated("train.precision=bf16", device="cuda")
    assert (found.process, found.allocator) == (0, 0)
    # The CPU's bf16 attention keeps scores, a GPU's fused one none.
    assert found.activations < estimated("train.precision=bf16", device="cpu").activations


def test_the_peak_can_be_forgotten():
    device = torch.device("cpu")
    large = bytearray(200 * 2**20)
    held = meter.peak_memory(device)
    del large
    meter.forget_peak(device)
    if meter._of_process("VmHWM"):
        assert meter.peak_memory(device) < held - 100 * 2**20
    assert meter.resident_memory() > 2**20


def test_what_a_training_takes_is_estimated_within_a_fifth():
    wanted = ["digits-finetune=256", "digits-mdtv2=160", "digits-edt=160"]
    child = Path(__file__).with_name("memory_child.py")
    done = subprocess.run(
        [sys.executable, child, *wanted],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3, done.stderr
    for each in found:
        assert each["peak"] == pytest.approx(each["estimate"], rel=0.2), each
        # Not by the interpreter alone, of which nothing has to be estimated.
        assert each["activations"] > 0.25 * each["estimate"], each
