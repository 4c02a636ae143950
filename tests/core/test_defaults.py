"""Which settings suit which data, in closed form."""

import pytest
from PIL import Image

from msmdiff.core import config as configuration
from msmdiff.core.data import sources
from msmdiff.core.training import defaults
from msmdiff.core.training.defaults import Facts


def chosen(facts, **given):
    return defaults.choose(given, facts).layer


@pytest.mark.parametrize(
    ("facts", "side", "name", "steps"),
    [
        # 60 visits of 1,911 images in batches of 32 are 3,583.1 steps.
        (Facts(1911, 64, "cpu"), 32, "U-ViT-XXS/4", 3584),
        (Facts(1911, 64, "cuda"), 64, "U-ViT-XS/4", 5000),
        (Facts(5000, 28, "cpu"), 28, "U-ViT-XXS/4", 6000),
        (Facts(5000, 28, "cuda"), 28, "U-ViT-XS/2", 5000),
        (Facts(50, 500, "cpu"), 32, "U-ViT-XXS/4", 1500),
        (Facts(30_000, 1024, "cuda"), 64, "U-ViT-S/4", 23_438),
        (Facts(100, 17, "cpu"), 16, "U-ViT-XXS/2", 1500),
        (Facts(100, 3, "cpu"), 8, "U-ViT-XXS/1", 1500),
        (Facts(100, None, "cpu"), 32, "U-ViT-XXS/4", 1500),
    ],
)
def test_size_patch_and_length_by_the_data(facts, side, name, steps):
    layer = chosen(facts)
    assert (layer["data"]["image_size"], layer["model"]["name"]) == (side, name)
    assert layer["train"]["steps"] == steps


def test_the_patch_leaves_as_many_tokens_as_the_machine_takes():
    sides = (8, 16, 28, 32, 64, 128, 256)
    assert [defaults.patch_size(s, "cpu") for s in sides] == [1, 2, 4, 4, 8, 16, 16]
    assert [defaults.patch_size(s, "cuda") for s in sides] == [1, 1, 2, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("model", "prediction"),
    [
        ({"name": "U-ViT-XXS/4"}, "x0"),
        ({"name": "MaskDM-S/4"}, "eps"),  # 48 numbers a patch, 512 channels
        ({"name": "MaskDM-S/4", "patch_size": 8}, "x0"),  # 192 numbers
        ({"name": "tiny"}, "x0"),
    ],
)
def test_a_narrow_network_predicts_the_image(model, prediction):
    assert chosen(Facts(100, 64, "cpu"), model=model)["process"]["prediction"] == prediction
    assert chosen(Facts(100, 64, "cpu"), model=model)["model"] == {}


def test_what_is_given_wins():
    facts = Facts(1911, 64, "cpu")
    given = {
        "data": {"image_size": 64},
        "model": {"patch_size": 16, "hidden_size": 64},
        "process": {"prediction": "eps"},
        "train": {"batch_size": 64, "steps": 7},
    }
    made = configuration.build(chosen(facts, **given), given)
    assert (made.data.image_size, made.train.steps, made.train.batch_size) == (64, 7, 64)
    assert (made.process.prediction, made.model.name) == ("eps", "U-ViT-XXS/16")
    assert made.model.model_dump()["hidden_size"] == 64
    assert chosen(facts, process={"schedule": "flow"})["process"] == {}
    # Wavelets halve the grid, an autoencoder makes an eighth of it.
    halved = chosen(facts, data={"image_size": 64}, codec={"name": "dwt"})
    assert halved["model"]["name"] == "U-ViT-XXS/4"
    eighth = chosen(Facts(9, 256, "cuda"), data={"image_size": 256}, codec={"name": "vae"})
    assert eighth["model"]["name"] == "U-ViT-XS/2"


def test_the_line_says_why():
    reason = defaults.choose({}, Facts(1911, 64, "cpu")).reason
    assert reason == (
        "chosen for 1,911 images of about 64 px on a CPU: images of 32 px; U-ViT-XXS/4 with 64 "
        "patches of 4x4; flow matching with prediction x0, since a narrow network cannot learn "
        "eps; batch 32, 3,584 steps (flags and --set override)"
    )


def test_facts_are_the_images_that_can_be_read(tmp_path):
    for i, side in enumerate((20, 24, 100)):
        Image.new("RGB", (side + i, side)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"none")
    facts = defaults.facts_of(sources.open_source(str(tmp_path)))
    assert (facts.images, facts.side) == (4, 24)


def test_encoded_images_bring_their_codec():
    facts = Facts(100, 256, "cuda", {"name": "vae", "channels": 16, "factor": 8})
    layer = chosen(facts)
    assert layer["codec"] == {"name": "vae", "channels": 16, "factor": 8}
    assert (layer["data"]["image_size"], layer["model"]["name"]) == (256, "U-ViT-XS/2")
    assert chosen(facts, codec={"name": "pixel"})["codec"] == {}
