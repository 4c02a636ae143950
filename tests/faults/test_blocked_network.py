"""Without a network, whole commands that miss weights say so in one sentence, and write nothing."""

import pytest
import torch
from children import require_calm
from scenarios import make_inputs, numbers

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import weights

TINY = {"name": "tiny", "hidden_size": 16, "num_heads": 2, "depth": 3, "num_classes": 0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What commands read, and weights of a network of latents."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    torch.manual_seed(0)
    layer = {"model": {**TINY, "patch_size": 1}, "codec": {"name": "vae"}}
    config = road.resolve(configuration.build(layer, {"data": {"image_size": 16}}))
    network = road.build(config).backbone
    weights.save(folder / "latents.safetensors", network.state_dict(), config)
    return folder


ENCODE = "data encode photos -o packed --image-size 8 --codec"
SAMPLE = "--n 2 --steps 2 --out out"
MISSING = {
    "fid stats photos -o stats.npz": "Inception",
    f"sample w.safetensors {SAMPLE} --stats stats.npz": "Inception",
    f"{ENCODE} pixel --captions txt --text nobody/text": "text encoder nobody/text",
}
"""Command -> what its sentence names."""

SLOWLY_MISSING = {  # their libraries take seconds to import
    "fid photos photos --metrics is,kid --json scores.json": "Inception",
    "fid photos photos --metrics fd_dinov2": "DINOv2",
    f"{ENCODE} vae --vae nobody/nothing": "codec.vae nobody/nothing",
    f"sample latents.safetensors {SAMPLE} --npz s.npz --set codec.vae=nobody/nothing": (
        "codec.vae nobody/nothing"
    ),
    "pretrain --data photos --image-size 16 --set model.patch_size=1 --codec vae --run r "
    "--set codec.vae=nobody/nothing": "codec.vae nobody/nothing",
}


def check(children, folder, words, named):
    before = numbers(folder)
    end = children.command(folder, *words.split(), seconds=60)
    tried, end.seen = end.seen, []
    require_calm(end, 1)
    assert tried
    assert all(each.startswith("socket.") for each in tried), tried
    assert named in end.err
    left = numbers(folder).keys() - before.keys()
    assert not [name for name in left if not name.startswith("runs")]  # of a run its settings


@pytest.mark.parametrize(("words", "named"), MISSING.items())
def test_missing_weights_are_one_sentence(children, inputs, words, named):
    check(children, inputs, words, named)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "named"), SLOWLY_MISSING.items())
def test_missing_weights_of_slow_libraries_are_one_sentence(children, inputs, words, named):
    check(children, inputs, words, named)
