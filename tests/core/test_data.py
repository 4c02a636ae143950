import io
import multiprocessing
import os
import time
import zipfile
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image

from msmdiff.core.config import section
from msmdiff.core.data import images, loader, sources
from msmdiff.core.data.order import Chunks, images_at
from msmdiff.core.errors import MsmdiffError, UsageError


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    buffer.seek(0)
    return buffer


def test_digits_are_the_real_ones():
    whole, train, test = (sources.open_source(f"digits{part}") for part in ("", ":train", ":test"))
    assert (len(whole), len(train), len(test), whole.num_classes) == (1797, 1437, 360, 10)
    assert whole.labels[:10].tolist() == list(range(10))
    assert np.array_equal(np.asarray(test.read(1)), np.asarray(whole.read(5)))
    assert np.asarray(whole.read(0)).max() == 239  # 15 of 16 grey levels
    with pytest.raises(UsageError, match="digits:train and digits:test"):
        sources.open_source("digits:dev")


def test_folder_classes_come_from_sub_folders(photos):
    source = sources.open_source(str(photos))
    assert len(source) == 12
    assert source.class_names == ["cat", "dog"]
    assert source.labels.tolist() == [0] * 6 + [1] * 6
    assert sources.open_source(str(photos), "none").labels is None


def test_zip_reads_the_same_as_the_folder(photos, tmp_path):
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(photos.rglob("*.png")):
            file.write(path, path.relative_to(photos))
        file.writestr("__MACOSX/cat/._0.png", b"junk")
        file.writestr("notes.txt", b"junk")
    a, b = sources.open_source(str(photos)), sources.open_source(str(archive))
    assert a.names == b.names
    assert a.class_names == b.class_names
    assert all(np.array_equal(np.asarray(a.read(i)), np.asarray(b.read(i))) for i in range(12))


def test_a_zip_of_one_folder_keeps_its_classes(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        for path in photos.rglob("*.png"):
            file.write(path, path.relative_to(tmp_path))
    source = sources.open_source(str(tmp_path / "p.zip"))
    assert source.names[0].startswith("photos/cat/")
    assert source.class_names == ["cat", "dog"]


def test_a_link_that_leads_back_is_not_followed_for_ever(photos):
    (photos / "cat" / "again").symlink_to(photos)
    assert len(sources.open_source(str(photos))) == 12


def test_adm_file_names(tmp_path):
    for name in ("n02_1.png", "n01_7.JPG", "n02_x_y.png", "n01_2.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    source = sources.open_source(str(tmp_path))
    assert source.class_names == ["n01", "n02"]
    assert dict(zip(source.names, source.labels.tolist(), strict=True))["n02_x_y.png"] == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert sources.open_source(str(tmp_path)).labels is None
    with pytest.raises(
        UsageError, match=r"plain.png, which is not of the form ClassID_anything.jpg"
    ):
        sources.open_source(str(tmp_path), "adm")


def test_npz_in_adm_layout(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "s.npz", pixels, np.array([0, 1, 2, 1, 0]))
    source = sources.open_source(str(tmp_path / "s.npz"))
    assert np.array_equal(np.asarray(source.read(3)), pixels[3])
    assert source.labels.tolist() == [0, 1, 2, 1, 0]
    np.savez(tmp_path / "float.npz", pixels / 255)
    with pytest.raises(UsageError, match=r"float64 \[5, 8, 8, 3\], not uint8"):
        sources.open_source(str(tmp_path / "float.npz"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "does not exist"),
        (lambda p: p, "holds no images"),
        (lambda p: (p / "a.txt", (p / "a.txt").write_text("x"))[0], "no known kind"),
        (lambda p: (p / "a.zip", (p / "a.zip").write_text("x"))[0], "cannot be opened as a zip"),
    ],
)
def test_bad_sources_are_named(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(MsmdiffError, match=message) as caught:
        sources.open_source(str(path))
    assert str(path) in str(caught.value)


def test_odd_modes_become_rgb():
    grey16 = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert np.asarray(images.read_rgb(encoded(grey16)))[0, :, 0].tolist() == [0, 100, 255]
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert np.asarray(images.read_rgb(encoded(clear)))[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert np.asarray(images.read_rgb(encoded(palette, "PNG", transparency=0)))[0, 0].tolist() == [
        255,
        255,
        255,
    ]
    assert np.asarray(images.read_rgb(encoded(palette)))[0, 0].tolist() == [10, 20, 30]
    cmyk = images.read_rgb(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert cmyk.mode == "RGB"
    assert np.asarray(cmyk)[0, 0, 0] > 200
    for mode in ("1", "L", "LA"):
        assert images.read_rgb(encoded(Image.new(mode, (2, 2)))).mode == "RGB"


def test_exif_rotation_is_applied():
    wide = Image.new("RGB", (6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert images.read_rgb(encoded(wide, "JPEG", exif=exif)).size == (2, 6)


def test_center_crop_takes_the_middle_and_enlarges_small_images():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (images.center_crop(Image.fromarray(pixels), 10) == 200).all()
    big = np.zeros((100, 300, 3), np.uint8)
    big[:, 100:200] = 200
    crop = images.center_crop(Image.fromarray(big), 10)
    assert crop.shape == (10, 10, 3)
    assert (crop[:, 1:-1] > 190).all()
    assert images.center_crop(Image.new("RGB", (3, 5)), 16).shape == (16, 16, 3)


@pytest.mark.parametrize("size", [(40, 40), (41, 90), (200, 33)])
def test_random_crop_has_the_size_and_depends_on_the_stream(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))
    crops = [images.random_crop(image, 32, np.random.default_rng(i)) for i in (0, 0, 1)]
    assert crops[0].shape == (32, 32, 3)
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_batches_are_a_function_of_the_position(photos, workers, crop):
    config = section("data", source=str(photos), image_size=16, workers=workers, crop=crop)
    dataset = loader.TrainingImages(sources.open_source(str(photos)), config, seed=3)
    straight = loader.batches(dataset, Chunks(0, 8, 4), pin_memory=False)
    seen = [next(straight) for _ in range(8)]
    resumed = next(loader.batches(dataset, Chunks(24, 8, 4), pin_memory=False))
    assert resumed.position == 24
    assert torch.equal(resumed.images, seen[6].images)
    assert torch.equal(resumed.y, seen[6].y)
    assert seen[0].images.shape == (4, 3, 16, 16)
    assert seen[0].images.dtype == torch.uint8


def test_a_batch_goes_to_another_process_whole_and_not_through_shared_memory():
    batch = loader.Batch(3, torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4), torch.tensor([5]))
    sent = bytes(ForkingPickler.dumps(batch))
    assert bytes(range(48)) in sent  # the numbers themselves, not the name of a segment
    arrived = ForkingPickler.loads(sent)
    assert (arrived.position, arrived.y.tolist()) == (3, [5])
    assert torch.equal(arrived.images, batch.images)


class Stuck(sources.Digits):
    """The image that is asked for first cannot be read, and the one after it never comes."""

    def read(self, index):
        if index == self.first:
            raise OSError("gone")
        time.sleep(3600)


def test_a_worker_that_is_stuck_does_not_outlive_an_error():
    source = Stuck("digits")
    source.first = images_at(0, len(source), [0])[0]
    dataset = loader.TrainingImages(
        source, section("data", image_size=8, workers=2, crop="random"), seed=0
    )
    before = set(multiprocessing.active_children())
    with pytest.raises(MsmdiffError, match="cannot be read: gone"):
        next(loader.batches(dataset, Chunks(0, 1, 1), pin_memory=False))
    workers = set(multiprocessing.active_children()) - before
    for worker in workers:
        worker.join(30)
    assert not [worker for worker in workers if worker.is_alive()]


def test_a_worker_that_makes_nothing_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(loader, "PATIENCE", 1)
    source = Stuck("digits")
    source.first = None
    dataset = loader.TrainingImages(
        source, section("data", image_size=8, workers=1, crop="random"), seed=0
    )
    with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds"):
        next(loader.batches(dataset, Chunks(0, 1, 1), pin_memory=False))


def test_unreadable_images_stop_or_are_left_out(photos, quiet):
    (photos / "cat" / "1.png").write_bytes((photos / "cat" / "1.png").read_bytes()[:100])
    (photos / "dog" / "empty.png").write_bytes(b"")
    config = section("data", source=str(photos), image_size=16)
    for _ in range(2):  # the second time from the remembered verdict
        with pytest.raises(MsmdiffError, match=r"2 of 13 images .*cat/1.png .*dog/empty.png"):
            loader.open_training(config, quiet.note)
    source = loader.open_training(config.model_copy(update={"skip_unreadable": True}), quiet.note)
    assert len(source) == 11
    assert len(source.labels) == 11
    assert "left out: 2 of 13" in quiet.notes[-1]


def test_grid_puts_images_in_rows():
    tiles = np.stack([np.full((4, 4, 3), 10 * i, np.uint8) for i in range(6)])
    picture = np.asarray(images.grid(tiles, columns=3, tile=4))
    assert picture.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    assert picture[2, 2, 0] == 0
    assert picture[2, 8, 0] == 10
    assert picture[8, 2, 0] == 30


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_images_stay_on_the_disk_unless_compressed(tmp_path, write):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 9, 3), np.uint8)
    for order in (pixels, np.asfortranarray(pixels)):
        write(tmp_path / "images.npz", order, np.arange(5))
        source = sources.open_source(str(tmp_path / "images.npz"))
        assert isinstance(source._pixels, np.memmap) == (write is np.savez)
        assert np.array_equal([np.asarray(source.read(i)) for i in range(5)], pixels)
        assert source.labels.tolist() == [0, 1, 2, 3, 4]


def test_float_images_of_0_to_1_are_not_black(tmp_path):
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "f.tiff")
    Image.fromarray(values * 255).save(tmp_path / "g.tiff")
    expected = (values * 255).round()
    for name in ("f.tiff", "g.tiff"):
        assert np.array_equal(np.asarray(images.read_rgb(tmp_path / name))[..., 0], expected)


def test_a_folder_that_may_not_be_read_is_not_called_empty(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(MsmdiffError, match=f"{tmp_path} cannot be read: Permission denied"):
        sources.open_source(str(tmp_path))
