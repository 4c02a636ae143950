"""The packages emoji-datasource-*, as a small one of the same layout."""

import json

import numpy as np
import pytest
from PIL import Image

from msmdiff.core.data import sources
from msmdiff.core.data.loader import TrainingImages
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.sections import DataConfig


@pytest.fixture
def package(tmp_path):
    """Seven emoji of two categories, the first of which has two skin tones; each of its own red."""
    folder = tmp_path / "package"
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    entries = []
    for i in range(7):
        name = f"1f44{i}"
        entry = {"unified": name.upper(), "image": f"{name}.png"}
        entry["category"] = "People & Body" if i < 6 else "Flags"
        if i == 0:
            tones = [f"{name}-1f3f{tone}" for tone in "bc"]
            entry["skin_variations"] = {
                tone: {"unified": tone.upper(), "image": f"{tone}.png"} for tone in tones
            }
        entries.insert(0, entry)  # in no order
        variants = [v["image"] for v in entry.get("skin_variations", {}).values()]
        for red, image in enumerate([entry["image"], *variants], start=10 * i):
            pixels = np.zeros((64, 64, 4), np.uint8)
            pixels[8:56, 8:56] = (red, 0, 0, 255)  # the rest is transparent
            Image.fromarray(pixels).save(pictures / image)
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder


def reds(source):
    return [source.read(i).getpixel((32, 32))[0] for i in range(len(source))]


def test_pictures_lie_on_white_with_their_category_as_class(package):
    source = sources.open_source(str(package))
    assert len(source) == 9
    assert source.class_names == ["Flags", "People & Body"]
    assert source.labels.tolist() == [0] + [1] * 8
    assert source.read(3).getpixel((0, 0)) == (255, 255, 255)
    assert len({source.describe(i) for i in range(9)}) == 9


def test_every_fifth_emoji_of_a_category_is_held_out_with_its_skin_tones(package):
    train, test = (sources.open_source(f"{package}:{part}") for part in ("train", "test"))
    assert reds(test) == [60, 0, 1, 2, 50]
    assert reds(train) == [10, 20, 30, 40]
    assert test.class_names == train.class_names  # though no flag is among the latter


def test_training_reads_it_as_any_other_source(package):
    data = DataConfig(source=str(package), image_size=16)
    batch = TrainingImages(sources.open_configured(data), data, seed=0).__getitems__([0, 1, 2])
    assert batch.images.shape == (3, 3, 16, 16)


def test_a_package_that_cannot_be_read_is_one_sentence(package):
    (package / "emoji.json").write_text('[{"unified": "1F44B"}]')
    with pytest.raises(MsmdiffError, match=r"emoji.json is not a list of emoji that can be read"):
        sources.open_source(str(package))
    (package / "img" / "google" / "64").rename(package / "img" / "google" / "32")
    with pytest.raises(UsageError, match=r"holds 0 folders \*/64 of pictures: unpack one of"):
        sources.open_source(str(package))
