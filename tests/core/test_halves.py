"""Two halves of any source, by a hash of the names; and what transparent images are laid on."""

import shutil

import numpy as np
import pytest
from PIL import Image

from msmdiff.core import config as configuration
from msmdiff.core.data import halves, inspection, sources
from msmdiff.core.errors import UsageError
from msmdiff.core.training import validation


@pytest.fixture
def many(tmp_path):
    for i in range(60):
        (tmp_path / "many" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "many" / "ab"[i % 2] / f"{i}.png")
    return tmp_path / "many"


def test_an_image_stays_in_its_half(many, tmp_path):
    def names(spec):
        source = sources.open_source(spec)
        return {source.name(i): int(np.asarray(source.image(i))[0, 0, 0]) for i in
                range(len(source))}  # fmt: skip

    train, test = names(f"{many}:train"), names(f"{many}:test")
    assert len(train) + len(test) == 60
    assert not set(train) & set(test)
    # Wherever it lies, and whatever else is there.
    shutil.move(many, tmp_path / "elsewhere")
    for name in list(train)[:20]:
        (tmp_path / "elsewhere" / name).unlink()
    assert names(f"{tmp_path / 'elsewhere'}:test") == test
    held = sum(halves.held_out(str(i)) for i in range(10_000))
    assert held == pytest.approx(1000, abs=120)  # four deviations of a binomial


def test_labels_go_with_the_halves_and_small_sets_are_refused(many, photos):
    source = sources.open_source(f"{many}:train")
    assert source.class_names == ["a", "b"]
    for i in range(len(source)):
        assert source.class_names[source.labels[i]] == source.name(i)[0]
    with pytest.raises(UsageError, match="too few for two halves"):
        halves.split(sources.open_source(str(photos)), share=1e-6)
    with pytest.raises(UsageError, match=r"'nowhere:test' does not exist"):
        sources.open_source("nowhere:test")


def test_the_other_half_is_held_out_by_default(many):
    def held(source, **more):
        return validation.source_of(
            configuration.build({"data": {"source": str(source)}, "eval": more})
        )

    assert held(f"{many}:train") == f"{many}:test"
    assert held(many) is None
    assert held(f"{many}:test", heldout=f"{many}:train") == f"{many}:train"
    with pytest.raises(UsageError, match="sees these images"):
        held(f"{many}:train", heldout=str(many))
    with pytest.raises(UsageError, match="sees these images"):
        held(many, heldout=f"{many}:test")


@pytest.mark.parametrize(
    ("background", "corner"),
    [
        ("white", [255, 255, 255]),
        ("black", [0, 0, 0]),
        ("20Ff40", [32, 255, 64]),
        ("checker", [204, 204, 204]),
    ],
)
def test_transparency_is_laid_on_what_is_asked_for(tmp_path, background, corner):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[8:, 8:] = [10, 20, 30, 255]
    (tmp_path / "p").mkdir()
    Image.fromarray(pixels).save(tmp_path / "p" / "a.png")
    data = configuration.section("data", source=str(tmp_path / "p"), background=background)
    source = sources.open_configured(data)
    image = np.asarray(source.image(0))
    assert image[0, 0].tolist() == corner
    assert image[15, 15].tolist() == [10, 20, 30]
    assert image[0, 2].tolist() == ([153] * 3 if background == "checker" else corner)
    report = inspection.report(source)
    assert report["transparent"] == f"about 100%, laid on {background} (data.background)"
    with pytest.raises(UsageError, match=r"data\.background"):
        configuration.section("data", background="pink")


@pytest.mark.parametrize(
    ("one", "two", "shared"),
    [
        ("photos:test", "photos:train", False),
        ("photos:test", "./photos/:train", False),
        ("photos:test", "photos:test", True),
        ("photos:test", "photos/", True),
        ("./photos", "photos:train", True),
        ("{here}/photos", "photos", True),
        ("photos/cat", "photos:train", True),
        ("photos", "others", False),
        ("digits:test", "digits", True),
    ],
)
def test_sources_that_share_images_are_known_however_they_are_written(
    photos, tmp_path, monkeypatch, one, two, shared
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "others").mkdir()
    for a, b in ((one, two), (two, one)):
        assert halves.overlap(a.format(here=tmp_path), b.format(here=tmp_path)) is shared
