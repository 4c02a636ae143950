import io
import tarfile
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from msmdiff.core.config import section
from msmdiff.core.data import checking, loader, sources
from msmdiff.core.data.lmdb import Pages
from msmdiff.core.data.order import Chunks
from msmdiff.core.errors import MsmdiffError, UsageError


@pytest.fixture
def lsun(tmp_path):
    """An LMDB of six WebP images, the fourth of them broken."""
    lmdb = pytest.importorskip("lmdb")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 20, 30, 3), np.uint8)
    with (
        lmdb.open(str(tmp_path / "church_train_lmdb"), map_size=2**20) as environment,
        environment.begin(write=True) as t,
    ):
        for i in (5, 0, 3, 1, 2, 4):
            buffer = io.BytesIO()
            Image.fromarray(pixels[i]).save(buffer, "WEBP", lossless=True)
            t.put(f"key{i}".encode(), b"broken" if i == 3 else buffer.getvalue())
    return tmp_path / "church_train_lmdb", pixels


def test_lsun(lsun, quiet):
    path, pixels = lsun
    source = sources.open_source(str(path))
    assert [source.name(i) for i in range(6)] == [f"key{i}" for i in range(6)]
    assert np.array_equal(np.asarray(source.read(4)), pixels[4])
    assert source.labels is None
    config = section("data", source=str(path), image_size=16, skip_unreadable=True, workers=2)
    usable = checking.open_training(config, quiet.note)
    assert "left out: 1 of 6 images" in quiet.notes[-1]
    assert "key3" in quiet.notes[-1]
    # In worker processes, each with its own environment.
    dataset = loader.TrainingImages(usable, config, seed=0)
    stream = loader.batches(dataset, Chunks(0, 5, 5), pin_memory=False)
    assert next(stream).images.shape == (5, 3, 16, 16)
    with pytest.raises(UsageError, match=r"data.labels 'folders' is for folders"):
        sources.open_source(str(path), "folders")


def test_lmdb_is_read_whatever_its_size_and_never_past_its_end(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    rng = np.random.default_rng(0)
    values = {f"{i:05d}".encode(): rng.bytes(int(rng.integers(1, 9000))) for i in range(700)}
    with lmdb.open(str(tmp_path), map_size=2**25) as environment:
        for chosen in (list(values), list(values)[::3]):  # the second time over the first
            with environment.begin(write=True) as t:
                for key in chosen:
                    t.put(key, values[key])
    pages = Pages(tmp_path / "data.mdb")
    entries = pages.entries()
    assert [entry.key for entry in entries] == list(values)
    assert all(pages.value(entry) == values[entry.key] for entry in entries)

    content = (tmp_path / "data.mdb").read_bytes()
    for i in range(60):
        damaged = bytearray(content[: len(content) // 2] if i % 2 else content)
        for place in rng.integers(0, len(damaged), 400):
            damaged[place] = rng.integers(256)
        pages.path.write_bytes(damaged)
        with suppress(MsmdiffError):
            for entry in pages.entries():
                with suppress(MsmdiffError):
                    pages.value(entry)


def test_a_broken_lmdb_is_named(tmp_path):
    (tmp_path / "data.mdb").write_bytes(b"torn")
    with pytest.raises(MsmdiffError, match="is not an LMDB of LSUN's kind that can be read"):
        sources.open_source(str(tmp_path))


@pytest.fixture
def cifar(tmp_path):
    """CIFAR-10's binary files with three records each."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        rows = rng.integers(0, 256, (3, 3073), np.uint8)
        rows[:, 0] = [i, 9, 0]
        (folder / name).write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text(
        "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"
    )
    return folder


def test_cifar_10(cifar, tmp_path):
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(cifar, cifar.name)
    for path in (cifar, tmp_path / "cifar-10-binary.tar.gz"):
        source = sources.open_source(str(path))
        assert source.labels.tolist() == [0, 9, 0, 1, 9, 0, 2, 9, 0, 3, 9, 0, 4, 9, 0]
        assert source.class_names[9] == "truck"
        row = np.frombuffer((cifar / "data_batch_2.bin").read_bytes(), np.uint8)[3073 : 2 * 3073]
        picture = np.asarray(source.read(4))
        assert picture[1, 2].tolist() == [
            row[1 + 32 + 2],
            row[1 + 1024 + 32 + 2],
            row[1 + 2048 + 32 + 2],
        ]
        assert len(sources.open_source(f"{path}:test")) == 3
    assert sources.open_source(str(cifar), "none").labels is None


def test_damaged_or_missing_cifar_files_are_named(cifar, tmp_path):
    (cifar / "data_batch_4.bin").unlink()
    with pytest.raises(UsageError, match=r"lacks data_batch_4.bin: give CIFAR-10's binary version"):
        sources.open_source(str(cifar))
    (cifar / "test_batch.bin").write_bytes(b"torn")
    with pytest.raises(MsmdiffError, match="is damaged: it is not made of records"):
        sources.open_source(f"{cifar}:test")
    (tmp_path / "c.tar.gz").write_bytes(b"torn")
    with pytest.raises(
        MsmdiffError, match=r"c.tar.gz is not CIFAR-10's binary version that can be read"
    ):
        sources.open_source(str(tmp_path / "c.tar.gz"))
    (tmp_path / "batches.meta").write_bytes(b"")
    with pytest.raises(
        UsageError, match=r"Python version, which are pickles: give cifar-10-binary"
    ):
        sources.open_source(str(tmp_path))


def test_a_member_of_a_tar_that_unpacks_to_too_much_is_refused(tmp_path):
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("x/data_batch_1.bin")
        member.size = 80 * 2**20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(MsmdiffError, match=r"c.tar.gz .* data_batch_1.bin would unpack to 83,886"):
        sources.open_source(str(tmp_path / "c.tar.gz"))
