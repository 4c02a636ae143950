"""The package from Python: train, draw, features, distance."""

import os
import signal

import pytest
import torch
from PIL import Image

import msmdiff
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.errors import UsageError
from msmdiff.core.model import Model
from msmdiff.core.training import simple

SMALL = {
    "model": {"hidden_size": 16, "num_heads": 2, "depth": 3, "patch_size": 8},
    "train.steps": 2,
    "train.batch_size": 4,
    "train": {"preview_every": 0},
    "sample.steps": 2,
}


def test_what_there_is():
    assert dir(msmdiff) == sorted(["__version__", "distance", "load", "train"])


def test_train_draw_and_compare(tmp_path, photos):
    told = []
    settings = {"data": {"source": photos}, "model.num_classes": "auto", **SMALL}
    model = msmdiff.train(settings, run=tmp_path / "r", tell=told.append)
    assert told[0].startswith("chosen for 12 images of about 24 px")
    assert model.config.data.image_size == 24
    again = msmdiff.train(run=tmp_path / "r", tell=told.append)  # its own settings
    assert any("is finished" in line for line in told)
    drawn = model.draw(3, classes="dog")
    assert torch.equal(drawn, again.draw([0, 1, 2], classes=1))
    pictures = model.pictures(2, classes="dog")
    assert isinstance(pictures[0], Image.Image)
    assert pictures[1].size == (24, 24)
    assert pictures[1].getpixel((5, 7)) == tuple(drawn[1, :, 7, 5].tolist())
    with pytest.raises(UsageError, match="no such class; did you mean 'dog'"):
        model.draw(1, classes="dogs")
    hidden = model.features(drawn, "cat")
    assert hidden.shape == (3, 9, 16)  # 3 x 3 patches, without label and time
    assert torch.equal(hidden, model.features(drawn, "cat"))
    assert not torch.equal(hidden, model.features(drawn, "cat", block=0))
    with pytest.raises(UsageError, match=r"blocks are 0\.\.2"):
        model.features(drawn, block=3)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_an_interrupted_training_is_not_given_for_a_finished_one(tmp_path, number, raised):
    told = []

    def tell(line):
        told.append(line)
        if line.startswith("loss:"):  # the last line but one before the first step
            os.kill(os.getpid(), number)

    longer = {**SMALL, "train.steps": 500, "train.log_every": 1}
    with pytest.raises(raised):
        msmdiff.train({"data.source": "digits:train", **longer}, run=tmp_path / "r", tell=tell)
    assert told[-1].startswith("interrupted at image ")


def test_settings_mean_what_flags_mean():
    def configured(**given):
        settings = {key.replace("__", "."): value for key, value in given.items()}
        return simple._configured(settings, None, simple.Path("none"), print)

    digits = configuration.build(configuration.preset("digits-finetune"))
    assert configured().optim.lr == digits.optim.lr
    assert configured().process == digits.process
    assert configured(optim__clip_grad_norm=None).optim.clip_grad_norm is None
    named = configured(model__name="U-ViT-XXS/2")  # the command line then takes no preset
    assert named == configuration.build({"model": {"name": "U-ViT-XXS/2"}})
    both = configured(train={"steps": 7}, train__seed=3, data={"source": simple.Path("digits")})
    assert (both.train.steps, both.train.seed, both.data.source) == (7, 3, "digits")
    with pytest.raises(UsageError, match="train was given 3: it cannot hold seed too"):
        configured(train=3, train__seed=3)
    with pytest.raises(UsageError, match="data must be a mapping of keys, not 'photos'"):
        configured(data="photos")


def test_distance_of_images_at_hand():
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    assert msmdiff.distance(images, images) == pytest.approx(0, abs=1e-3)
    darker = (images // 2).to(torch.uint8)
    assert msmdiff.distance(images, darker) > 1
    with pytest.raises(UsageError, match=r"b is torch.float32 .*: give images as uint8"):
        msmdiff.distance(images, images.float())


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ({"family": "mdt", "depth": 4, "decode_layers": 1}, 4),
        ({"family": "mdtv2", "depth": 5, "decode_layers": 1}, 5),
        ({"family": "uvit", "depth": 3, "sparse": "mixer", "sparse_depth": 2}, 3),
        ({"family": "dit", "depth": 3, "sparse": "decoder", "sparse_depth": 2}, 3),
        ({"family": "edt", "stage_widths": [16] * 5, "stage_depths": [1, 2, 1, 1, 1],
          "stage_heads": [2] * 5, "patch_size": 2}, 6),
    ],
)  # fmt: skip
def test_blocks_are_counted_as_a_pass_meets_them(model, count):
    """Without MDT's side block, which only a mask needs, and what is there for sparse training."""
    fields = {"name": None, "hidden_size": 16, "num_heads": 2, "patch_size": 4, **model}
    if model["family"] == "edt":
        del fields["num_heads"]
    config = road.resolve(configuration.build({"model": fields}), 0)
    parts = road.build(config)
    made = Model(
        parts.backbone.eval(), parts.process, parts.codec, parts.objective.condition, config
    )
    for parameter in parts.backbone.parameters():  # adaptive norms begin as zeros
        torch.nn.init.normal_(parameter, std=0.2)
    met = []
    for module in parts.backbone.modules():
        if hasattr(module, "attn"):
            module.register_forward_hook(lambda *done: met.append(done[2].float()))
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    for number in range(count):
        hidden = made.features(images, block=number)
        extra = len(met) - count  # the light blocks of a mixer come first, of a decoder last
        shift = extra if model.get("sparse") == "mixer" else 0
        behind = met[shift + number]  # special tokens are in front
        assert torch.equal(hidden, behind[:, behind.shape[1] - hidden.shape[1] :])
        met.clear()
    assert torch.equal(made.features(images), made.features(images, block=count // 2))
    with pytest.raises(UsageError, match=rf"blocks are 0\.\.{count - 1}"):
        made.features(images, block=count)


@pytest.mark.parametrize(
    "layers",
    [
        ["digits-uvit", {"model": {"value_residual": True}}],
        ["digits-dit", {"model": {"value_residual": True}}],
        ["digits-jit"],
        ["digits-edm"],
        ["digits-ve"],
        ["digits-flow"],
        ["digits-edt"],
    ],
    ids=str,
)
def test_features_are_of_patches_behind_every_block_and_at_time_0(layers):
    layers = [configuration.preset(layers[0]), *layers[1:]]
    config = road.resolve(configuration.build(*layers), 10)
    parts = road.build(config)
    model = Model(
        parts.backbone.eval(), parts.process, parts.codec, parts.objective.condition, config
    )
    side = config.data.image_size
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    grids = [grid for _, grid in getattr(model.backbone, "numbered_blocks", list)()]
    for block in range(len(model._blocks())):
        height, width = grids[block] if grids else model.backbone.grid
        hidden = model.features(images, time=0.0, block=block)
        assert hidden.shape[:2] == (2, height * width)
        assert hidden.isfinite().all()
        assert torch.equal(hidden, model.features(images, time=0.0, block=block))
