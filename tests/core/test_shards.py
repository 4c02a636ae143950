"""Data sets of other libraries, in their own files: WebDataset's shards, Hugging Face's tables."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from msmdiff.core.config import section
from msmdiff.core.data import checking, halves, loader, sources
from msmdiff.core.data.order import Chunks
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics import inputs


def picture(i):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (8, 10, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path, entries):
    with tarfile.open(path, "w") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    """Three shards of two entries, each an image, a class and a text."""
    folder = tmp_path / "set"
    folder.mkdir()
    for k in range(3):
        entries = []
        for i in (2 * k, 2 * k + 1):
            name = f"{i:04d}"
            entries += [(f"{name}.cls", str(i % 3).encode()), (f"{name}.png", picture(i))]
            entries.append((f"{name}.json", b"{}"))
        shard(folder / f"part-{k:03d}.tar", entries)
    return folder


def test_shards_are_read_in_their_order(shards, monkeypatch):
    for spec in (str(shards), f"{shards}/part-{{000..002}}.tar"):
        source = sources.open_source(spec)
        assert len(source) == 6
        assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert source.class_names == ["0", "1", "2"]
        assert [source.content(i) for i in range(6)] == [picture(i) for i in range(6)]
        assert source.name(3) == "part-001.tar/0003.png"
    alone = sources.open_source(f"{shards}/part-001.tar")
    assert [alone.content(i) for i in range(2)] == [picture(2), picture(3)]
    # From what was remembered of them; and anew where a shard has changed.
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", None)
        assert len(sources.open_source(f"{shards}/part-{{000..002}}.tar")) == 6
    shard(shards / "part-002.tar", [("9.cls", b"1"), ("9.png", picture(9))])
    assert len(sources.open_source(str(shards))) == 5


def test_shards_are_trained_on_like_any_images(shards, quiet):
    config = section("data", source=str(shards), image_size=8, workers=1, verify="lazy")
    source = checking.open_training(config, quiet.note)
    dataset = loader.TrainingImages(source, config, seed=0)
    beside = loader.TrainingImages(source, config.model_copy(update={"workers": 0}), seed=0)
    for a, b, _ in zip(
        loader.batches(dataset, Chunks(0, 4, 4), False),
        loader.batches(beside, Chunks(0, 4, 4), False),
        range(3),
        strict=False,
    ):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.y, b.y)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([("0.txt", b"x"), ("0.png", b""), ("1.cls", b"-1")], "1.cls in .* is not a class index"),
        ([("0.txt", b"x"), ("0.bin", b"y")], "holds no images"),
    ],
)
def test_shards_that_are_none_are_named(tmp_path, entries, sentence):
    (tmp_path / "set").mkdir()
    shard(tmp_path / "set" / "a.tar", entries)
    with pytest.raises(MsmdiffError, match=sentence):
        sources.open_source(str(tmp_path / "set"))


def test_damaged_and_missing_shards_are_named(shards):
    with pytest.raises(MsmdiffError, match=r"part-003\.tar"):
        sources.open_source(f"{shards}/part-{{000..003}}.tar")
    with pytest.raises(UsageError, match=r"\{002..000\} is no rising range"):
        sources.open_source(f"{shards}/part-{{002..000}}.tar")
    whole = (shards / "part-001.tar").read_bytes()
    (shards / "part-001.tar").write_bytes(whole[:900])
    with pytest.raises(MsmdiffError, match=r"part-001.tar"):
        sources.open_source(str(shards))
    (shards / "part-001.tar").unlink()
    shard(shards / "part-001.tar", [("5.png", picture(5))])
    assert "0000.png has" not in str(sources.open_source(str(shards)).unlabelled)
    assert "5.png has no .cls" in sources.open_source(str(shards)).unlabelled


@pytest.fixture
def table():
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": picture(i), "path": None} for i in range(5)],
        "label": [i % 2 for i in range(5)],
        "other": ["x"] * 5,
    }
    kinds = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "other": datasets.Value("string"),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


def test_tables_of_hugging_face(table, tmp_path):
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    table.select(range(3)).to_parquet(tmp_path / "parquet" / "train-0.parquet")
    table.select(range(3, 5)).to_parquet(tmp_path / "parquet" / "train-1.parquet")
    for spec in ("saved", "parquet"):
        source = sources.open_source(str(tmp_path / spec))
        assert [source.content(i) for i in range(5)] == [picture(i) for i in range(5)]
        assert source.labels.tolist() == [0, 1, 0, 1, 0]
        assert source.class_names == ["cat", "dog"]
        assert source.image(4).size == (10, 8)
    one = sources.open_source(str(tmp_path / "parquet" / "train-1.parquet"))
    assert one.content(0) == picture(3)


def test_columns_are_named_where_it_is_open(table, tmp_path):
    second = table.rename_column("image", "second").select_columns(["second"])
    table = pytest.importorskip("datasets").concatenate_datasets([table, second], axis=1)
    table.save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match=r"images in image, second: name a column"):
        sources.open_source(str(tmp_path / "saved"))
    options = {"image_column": "second"}
    assert len(sources.open_source(str(tmp_path / "saved"), options=options)) == 5
    with pytest.raises(
        UsageError, match=r"data.image_column other: .* has images in image, second"
    ):
        sources.open_source(str(tmp_path / "saved"), options={"image_column": "other"})
    named = {"image_column": "image", "label_column": "other"}
    assert sources.open_source(str(tmp_path / "saved"), options=named).class_names == ["x"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(MsmdiffError, match=r"bad\.parquet"):
        sources.open_source(str(tmp_path / "bad.parquet"))


def test_labels_that_are_none_leave_a_table_unlabelled(table, tmp_path):
    """A test split's are -1; and beside images a table is no data set."""
    datasets = pytest.importorskip("datasets")
    without = table.remove_columns("label").add_column("label", [-1] * 5)
    without.to_parquet(tmp_path / "test.parquet")
    source = sources.open_source(str(tmp_path / "test.parquet"))
    assert source.labels is None
    assert source.unlabelled == "no labels: column label holds -1"
    assert sources.open_source(str(tmp_path / "test.parquet"), "none").labels is None
    with pytest.raises(UsageError, match="column label holds -1, not classes"):
        sources.open_source(str(tmp_path / "test.parquet"), options={"label_column": "label"})
    words = table.remove_columns("label").add_column("label", ["dog", "cat", "dog", "dog", "cat"])
    words.to_parquet(tmp_path / "words.parquet")
    source = sources.open_source(str(tmp_path / "words.parquet"))
    assert (source.class_names, source.labels.tolist()) == (["cat", "dog"], [1, 0, 1, 1, 0])
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "0.png").write_bytes(picture(0))
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "photos" / "meta.parquet")
    assert sources.open_source(str(tmp_path / "photos")).names == ["cat/0.png"]


def test_a_half_takes_the_options_of_its_source(table, tmp_path):
    join = pytest.importorskip("datasets").concatenate_datasets
    table = join([table] * 12)
    second = table.rename_column("image", "second").select_columns(["second"])
    spec = str(tmp_path / "two.parquet")
    join([table, second], axis=1).to_parquet(spec)
    column = {"image_column": "second"}
    held = sum(halves.held_out(f"row {i}") for i in range(60))
    assert sources.takes(f"{spec}:test", "image_column")
    assert not sources.takes(f"{spec}:test", "columns")
    assert len(inputs.open_input(f"{spec}:test", layers=[{"data": column}])) == held
    assert len(inputs.open_input(f"{spec}:train", layers=[{"data": column}])) == 60 - held
    chosen = sources.open_source(f"{spec}:test", kind="huggingface", options=column)
    assert (len(chosen), chosen.spec) == (held, f"{spec}:test")
    assert len(sources.open_source("digits:train", kind="digits")) == 1437
