"""Outputs of sampling: never mixed, never in place of other files, claimed at the start."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import files, gallery, weights
from msmdiff.core.data import npy, sources
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.gallery import Gallery, Request


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A tiny network of random numbers, in a file."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = {"num_classes": 0, "hidden_size": 16, "num_heads": 2, "depth": 3}
    layers = {"model": model, "data": {"image_size": 8}, "sample": {"steps": 2}}
    config = road.resolve(configuration.build(layers))
    weights.save(tmp_path / "r.safetensors", road.build(config).backbone.state_dict(), config)
    return tmp_path / "r.safetensors"


def make(stored, tmp_path, layers=(), **options):
    request = Request(seeds=[0, 1, 2], folder=tmp_path / "s", batch_size=2)
    model = weights.load(stored, layers=layers)
    return Gallery(model, replace(request, **options)).make(lambda *_: None)


def no_steps(monkeypatch):
    """Fail where a network is asked for anything."""

    def drawn(*_, **__):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(gallery.Model, "batches", drawn)


@pytest.mark.parametrize("option", ["npz", "stats", "grid"])
def test_what_was_not_written_here_is_replaced_only_when_told(
    stored, tmp_path, monkeypatch, option
):
    target = tmp_path / ("s.grid.png" if option == "grid" else "x.npz")
    target.write_bytes(b"mine")
    (tmp_path / "x.json").write_text("mine, too")
    options = {"features": "pixel", option: True if option == "grid" else target}
    with monkeypatch.context() as patch:
        no_steps(patch)
        with pytest.raises(UsageError, match="is there already, and was not written by msmdiff"):
            make(stored, tmp_path, **options)
    assert target.read_bytes() == b"mine"
    make(stored, tmp_path, overwrite=True, **options)
    assert gallery.is_ours(target)
    make(stored, tmp_path, **options)  # our own, once more
    assert (tmp_path / "x.json").read_text() == "mine, too"


def test_an_archive_and_a_picture_carry_their_record(stored, tmp_path):
    make(stored, tmp_path, npz=tmp_path / "x.npz", png=False)
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["arr_0"].shape == (3, 8, 8, 3)
        assert json.loads(str(archive["msmdiff"]))["seeds"] == "0-2"
    with Image.open(tmp_path / "x.grid.png") as picture:
        assert json.loads(picture.info["msmdiff"])["sha256"] == files.checksum(stored)
    assert {p.name for p in tmp_path.iterdir()} == {"r.safetensors", "x.npz", "x.grid.png"}


@pytest.mark.parametrize("lost", [[0], [1, 2], [0, 3]])
def test_what_was_there_already_changes_no_bit(stored, tmp_path, lost):
    wish = {"seeds": [4, 0, 1, 2, 3], "npz": tmp_path / "x.npz", "stats": tmp_path / "stats.npz"}
    make(stored, tmp_path, features="pixel", **wish)

    def arrays():
        with np.load(wish["npz"]) as images, np.load(wish["stats"]) as moments:
            return [images["arr_0"], moments["mu"], moments["sigma"], moments["rows"]]

    undisturbed = arrays()
    for seed in lost:
        (tmp_path / "s" / f"{seed:06d}.png").unlink()
    assert f"({5 - len(lost)} were there)" in make(stored, tmp_path, features="pixel", **wish)
    for before, after in zip(undisturbed, arrays(), strict=True):
        np.testing.assert_array_equal(after, before)


def test_a_folder_of_the_user_is_not_taken(stored, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sample.json").write_text(json.dumps({"seeds": "mine"}))
    with pytest.raises(UsageError, match=r"sample.json is there already, and was not written"):
        make(stored, tmp_path)
    (tmp_path / "s" / "sample.json").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "s" / "000001.png")
    with pytest.raises(UsageError, match="holds images that were not sampled here"):
        make(stored, tmp_path, overwrite=True)


def test_one_process_at_a_time_writes_an_output(stored, tmp_path):
    make(stored, tmp_path)
    with (
        files.Lock(tmp_path / "s", ""),
        pytest.raises(MsmdiffError, match=r"another process is sampling into .*s: wait"),
    ):
        make(stored, tmp_path)
    with (
        files.Lock(tmp_path / ".x.npz.part.npy", ""),
        pytest.raises(MsmdiffError, match=r"another process is writing .*x.npz: wait"),
    ):
        make(stored, tmp_path, png=False, npz=tmp_path / "x.npz")


def test_a_full_disk_is_said_before_the_first_step(stored, tmp_path, monkeypatch):
    no_steps(monkeypatch)
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(npy.shutil, "disk_usage", lambda path: free)
    with pytest.raises(MsmdiffError, match=r"x.npz needs 0.0 MiB, its disk has 0.0 MiB free"):
        make(stored, tmp_path, png=False, npz=tmp_path / "x.npz")
    assert not list(tmp_path.glob(".*"))


def latent_model(tmp_path):
    torch.manual_seed(0)
    layers = {
        "model": {"num_classes": 0, "hidden_size": 16, "num_heads": 2, "depth": 3, "patch_size": 1},
        "data": {"image_size": 16},
        "codec": {"name": "vae"},
        "sample": {"steps": 2},
    }
    config = road.resolve(configuration.build(layers))
    weights.save(tmp_path / "l.safetensors", road.build(config).backbone.state_dict(), config)
    return tmp_path / "l.safetensors"


def test_a_folder_is_of_one_codec_wherever_it_lies(tmp_path, vae):
    stored = latent_model(tmp_path)
    make(stored, tmp_path, [{"codec": {"vae": str(vae)}}])
    moved = tmp_path / "elsewhere"
    moved.symlink_to(vae)
    assert "(3 were there)" in make(stored, tmp_path, [{"codec": {"vae": str(moved)}}])
    with pytest.raises(UsageError, match=r"codec.scale: 0.18215 there, 0.5 now"):
        make(stored, tmp_path, [{"codec": {"vae": str(vae), "scale": 0.5}}])


def test_a_missing_vae_is_said_before_the_first_step(tmp_path, monkeypatch):
    stored = latent_model(tmp_path)
    with pytest.raises(UsageError, match="latents need their VAE"):
        make(stored, tmp_path)
    assert not (tmp_path / "s").exists()
    model = weights.load(stored)
    monkeypatch.setattr(model, "denoiser", None)
    with pytest.raises(UsageError, match="latents need their VAE"):
        model.draw(range(2))


def of_named_classes(tmp_path, names=("Food & Drink", "big_dogs")):
    """A network of two classes that have names, in a file."""
    torch.manual_seed(0)
    model = {"num_classes": 2, "hidden_size": 16, "num_heads": 2, "depth": 3}
    layers = {"model": model, "data": {"image_size": 8}, "sample": {"steps": 2}}
    config = road.resolve(configuration.build(layers))
    network, path = road.build(config).backbone, tmp_path / "named.safetensors"
    weights.save(path, network.state_dict(), config, class_names=json.dumps(names))
    return path


def of(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def test_images_are_called_by_their_class_where_it_has_a_name(tmp_path):
    path = of_named_classes(tmp_path)
    make(path, tmp_path)
    named = ["000000-Food-Drink.png", "000001-big-dogs.png", "000002-Food-Drink.png"]
    assert of(tmp_path / "s") == named
    source = sources.open_source(str(tmp_path / "s"))
    assert len(source) == 3
    assert source.labels is None  # the names are for people; no class is read from them
    (tmp_path / "s" / named[1]).unlink()
    assert "(2 were there)" in make(path, tmp_path)
    assert of(tmp_path / "s") == named


def test_a_folder_begun_without_names_goes_on_without_them(tmp_path):
    path = of_named_classes(tmp_path)
    make(path, tmp_path)
    for i, name in enumerate(of(tmp_path / "s")):
        (tmp_path / "s" / name).rename(tmp_path / "s" / f"00000{i}.png")
    record = json.loads((tmp_path / "s" / "sample.json").read_text())
    del record["names_classes"]
    (tmp_path / "s" / "sample.json").write_text(json.dumps(record))
    assert "(3 were there)" in make(path, tmp_path, seeds=[0, 1, 2, 3])
    assert of(tmp_path / "s") == [f"00000{i}.png" for i in range(4)]


def test_classes_that_are_numbers_are_no_names(tmp_path):
    make(of_named_classes(tmp_path, ("0", "1")), tmp_path)
    assert of(tmp_path / "s") == ["000000.png", "000001.png", "000002.png"]
