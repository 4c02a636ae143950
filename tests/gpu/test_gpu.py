"""What only a CUDA device can show; `make gpu` runs it there, in a few minutes."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets, registry
from msmdiff.core.bench.training import Training
from msmdiff.core.metrics.inception import InceptionFeatures
from msmdiff.core.model import Model
from msmdiff.core.samplers.times import visited
from msmdiff.core.seeding import SeedNoise, stream
from msmdiff.core.training import checkpoint, memory
from msmdiff.core.training.meter import peak_memory
from msmdiff.core.training.run import Run
from msmdiff.core.training.trainer import train

pytestmark = pytest.mark.gpu

DIGITS = sorted(name for name in presets.names() if name.startswith("digits-"))
FAMILIES = [f"digits-{name}" for name in ("uvit", "dit", "jit", "mdt", "mdtv2", "edt", "maskdwt")]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _ordinary_products():
    """Whole float32 products, and no training's determinism left behind."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)


def resolved(name, *layers):
    chosen = configuration.build(presets.read(name), *layers)
    return road.resolve(chosen, data_classes=10)


def parts_of(config):
    """Parts whose network has no zeros left where it started with them."""
    torch.manual_seed(0)
    parts = road.build(config)
    for p in parts.backbone.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    return parts


def moved(value, device):
    """A route, with what it holds on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: moved(v, device) for k, v in fields.items()})
    return value


def gradients(parts, device, dtype=None):
    """Loss and gradients of each pass, for numbers that are the same on every device."""
    backbone = parts.backbone.to(device)
    backbone.zero_grad(set_to_none=True)
    parts.process.to(device)
    batch = 8 * parts.objective.copies
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(batch, *parts.codec.shape, generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    y = torch.randint(0, 10, (batch,), generator=generator).to(device)

    def draw(purpose, device="cpu"):
        return stream("cpu", 0, purpose)

    t, _ = parts.objective.times.draw(batch, draw)
    loss = torch.zeros((), device=device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        for route_of in parts.objective.passes.values():
            route = moved(route_of(batch, draw), device)
            given = (x0.to(device), eps.to(device), t.to(device))
            loss = loss + parts.objective.terms(backbone, *given, y, route)["loss"].mean()
    loss.backward()
    found = [p.grad.flatten() for p in backbone.parameters() if p.grad is not None]
    return loss.item(), torch.cat(found).double().cpu()


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 2e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", DIGITS)
def test_a_step_is_the_cpus(name, dtype, tolerance):
    parts = parts_of(resolved(name))
    loss, expected = gradients(parts, torch.device("cpu"))
    got_loss, got = gradients(parts, CUDA, dtype)
    assert got_loss == pytest.approx(loss, rel=tolerance)
    assert (got - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_fused(name):
    """Flash attention where no bias is added, the memory-efficient kernel where one is."""
    biased = name in ("digits-mdt", "digits-mdtv2", "digits-edt")
    backend = SDPBackend.EFFICIENT_ATTENTION if biased else SDPBackend.FLASH_ATTENTION
    parts = parts_of(resolved(name))
    with sdpa_kernel(backend):  # any other kernel raises
        _, got = gradients(parts, CUDA, torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = gradients(parts, CUDA, torch.bfloat16)
    assert (got - expected).norm() / expected.norm() < 5e-2


# Muon is not fused, so that its steps read the norm of their gradients.
@pytest.mark.parametrize("name", [name for name in DIGITS if name != "digits-muon"])
def test_a_step_never_waits_for_the_device(name):
    training = Training(resolved(name, {"train": {"batch_size": 8, "precision": "bf16"}}))
    for _ in range(2):
        training()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            training()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    training.step.settle()


def test_the_device_leaves_out_a_bad_update():
    training = Training(resolved("digits-uvit", {"train": {"batch_size": 8, "precision": "bf16"}}))
    assert training.step.defers
    training()
    before = [p.detach().clone() for p in training.step.model.parameters()]
    clip = training.step.accelerator.clip_grad_norm_

    def poisoned(parameters, limit):
        parameters = list(parameters)
        parameters[0].grad.fill_(float("nan"))
        return clip(parameters, limit)

    training.step.accelerator.clip_grad_norm_ = poisoned
    training()
    with pytest.raises(Exception, match="stopped before the update"):
        training.step.settle()
    after = training.step.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def digits(name, **train):
    common = {"batch_size": 16, "preview_every": 0, "log_every": 1, "checkpoint_every": 3}
    return configuration.build(presets.read(name), {"train": {**common, **train}})


def final(run):
    state, networks = checkpoint.load(checkpoint.newest(run))
    flat = {f"{stem}/{k}": v for stem, tensors in networks.items() for k, v in tensors.items()}
    for i, values in state["optimizer"]["state"].items():
        flat |= {f"optimizer/{i}/{k}": v for k, v in values.items() if torch.is_tensor(v)}
    return flat


@pytest.mark.parametrize("name", [*FAMILIES, "digits-pretrain", "digits-tread", "digits-sprint"])
def test_resuming_is_exact_with_deterministic_kernels(name, tmp_path, quiet):
    train(digits(name, steps=8, deterministic=True), tmp_path / "straight", quiet)
    train(digits(name, steps=5, deterministic=True), tmp_path / "resumed", quiet)
    train(digits(name, steps=8, deterministic=True), tmp_path / "resumed", quiet)
    straight, resumed = final(tmp_path / "straight"), final(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    assert [k for k, v in straight.items() if not torch.equal(v, resumed[k])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_learns(precision, tmp_path, quiet):
    train(digits("digits-pretrain", precision=precision, steps=60), tmp_path, quiet)
    losses = [line["loss"] for line in Run(tmp_path, writes=False).metrics()]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("name", ["digits-pretrain", "digits-mdtv2"])
def test_compiled_training_is_training(name, tmp_path, quiet):
    for compiles in (False, True):
        config = digits(name, steps=6, precision="fp32", compile=compiles)
        train(config, tmp_path / str(compiles), quiet)
    plain, compiled = (load_file(tmp_path / f"{c}" / "weights.safetensors") for c in (False, True))
    assert plain.keys() == compiled.keys()
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sampler", sorted(registry.entries("sampler")))
def test_samples_are_the_cpus(sampler):
    options = {"sampler": sampler, "steps": 6, "cfg_scale": 1.5, "times": None}
    name = "digits-meanflow" if sampler == "meanflow" else "digits-dit"
    config = resolved(name, {"sample": options})
    parts = parts_of(config)
    found = []
    for device in (torch.device("cpu"), CUDA):
        model = Model(
            backbone=parts.backbone.to(device).eval(),
            process=parts.process,
            codec=parts.codec,
            condition=parts.objective.condition,
            config=config,
        )
        schedule = parts.process.to(device).schedule
        noise = SeedNoise([0, 1], parts.codec.shape, device)
        y = torch.tensor([3, 5], device=device)
        entry = registry.find("sampler", sampler, "sample.sampler")
        with torch.no_grad():
            x = noise()
            times = visited(schedule, config.sample)
            options = entry.takes(config.sample)
            x0 = entry.make(model.denoiser(y), schedule, x, times, noise, **options)
        found.append(x0.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=2e-3)


def test_inception_is_the_cpus(random_inception):
    pictures = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    images = pictures.to(torch.uint8)
    expected, _ = InceptionFeatures(random_inception)(images)
    got, _ = InceptionFeatures(random_inception, device=CUDA)(images.to(CUDA))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_is_what_was_estimated(checkpointing):
    train_layer = {"batch_size": 32, "precision": "bf16", "gradient_checkpointing": checkpointing}
    config = resolved("dit-s", {"train": train_layer})
    estimated = memory.estimate(config, device="cuda").total
    training = Training(config)
    for _ in range(3):
        training()
    assert peak_memory(CUDA) == pytest.approx(estimated, rel=0.2)


SHARDED = """
import sys
from pathlib import Path
from msmdiff.core import config as configuration, presets
from msmdiff.core.training.trainer import train
class Silent:
    def note(self, text): print(text)
    def progress(self, *_): pass
for name in sys.argv[2:]:
    options = dict(steps=2, batch_size=16, precision="fp32", preview_every=0)
    config = configuration.build(presets.read(name), {"train": options})
    train(config, Path(sys.argv[1]) / name, Silent())
"""


def launched(folder, processes, **environment):
    """Two steps of every family in so many processes, under a launcher."""
    program = folder / "program.py"
    program.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, str(program), str(folder), *FAMILIES],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.mark.parametrize("processes", [1, 2])
def test_sharded_and_shared_steps_are_one_process_steps(processes, tmp_path, quiet):
    """FSDP 2, and with two GPUs also DDP through NCCL."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    ways: dict[str, dict[str, str]] = {"sharded": {"ACCELERATE_USE_FSDP": "true"}}
    ways["sharded"]["FSDP_VERSION"] = "2"
    if processes > 1:
        ways["shared"] = {}
    for way, environment in ways.items():
        (tmp_path / way).mkdir()
        launched(tmp_path / way, processes, **environment)
    for name in FAMILIES:
        options = {"steps": 2, "precision": "fp32", "micro_batch_size": 16 // processes}
        train(digits(name, **options), tmp_path / "alone" / name, quiet)
        expected = load_file(tmp_path / "alone" / name / "weights.safetensors")
        for way in ways:
            got = load_file(tmp_path / way / name / "weights.safetensors")
            for key, value in expected.items():
                torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4)


def test_the_commands_run_on_the_device(cli, tmp_path):
    small = ["--set", "train.batch_size=32", "--set", "train.preview_every=0"]
    done = cli("pretrain", "--steps", "3", "--run", "primer", *small)
    assert "on cuda" in done.stdout + done.stderr
    cli("finetune", "--ckpt", "primer", "--conditional", "--steps", "3", "--run", "tuned", *small)
    options = ["--set", "sample.steps=5", "--set", "sample.compile=true", "--precision", "bf16"]
    cli("sample", "tuned", "--n", "20", "--cfg", "1.5", *options)
    cli("fid", "samples/tuned", "digits:test", "--features", "pixel", "--json", "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())
    assert len(list((tmp_path / "samples" / "tuned").rglob("*.png"))) == 20
