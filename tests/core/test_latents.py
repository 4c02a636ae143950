import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.config import section
from msmdiff.core.data import encode, latents, loader, npy, sources
from msmdiff.core.data.order import Chunks
from msmdiff.core.diffusion import codecs
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.training.run import Run
from msmdiff.core.training.trainer import train


def nothing(done, total, metrics):
    pass


def make(photos, out, vae=None, **options):
    """Pack the photos at 16 pixels; with a VAE, its moments."""
    config = section("codec", name="vae", vae=str(vae)) if vae else section("codec")
    data = section("data", source=str(photos), image_size=16)
    codec = codecs.build(config, 16)
    encoded = encode.encode(sources.open_source(str(photos)), codec, data, out, nothing, **options)
    return codec, encoded


def crops(photos):
    source = sources.open_source(str(photos))
    return loader.TrainingImages(source, section("data", image_size=16), 0).crops(
        range(len(source))
    )


def everything(path):
    return {p.name: p.read_bytes() for p in path.glob("*.npy")}


@pytest.mark.parametrize("mirror", [False, True])
def test_a_packed_set_holds_the_moments_and_training_draws_from_them_afresh(
    photos, tmp_path, vae, mirror
):
    codec, encoded = make(photos, tmp_path / "p", vae, mirror=mirror, dtype="float32", shard=5)
    assert encoded == 12
    packed = sources.open_source(str(tmp_path / "p"))
    assert packed.labels.tolist() == [0] * 6 + [1] * 6
    assert packed.class_names == ["cat", "dog"]
    entries, labels = packed.gather(np.array([7, 2]))
    images = crops(photos)[[7, 2]]
    assert labels.tolist() == [1, 0]
    plain = entries[:, 0] if mirror else entries
    torch.testing.assert_close(plain, codec.pack(images), rtol=1e-4, atol=1e-5)
    if mirror:
        torch.testing.assert_close(entries[:, 1], codec.pack(images.flip(-1)), rtol=1e-4, atol=1e-5)
        chosen = loader.flip(entries, torch.tensor([True, False]))
        assert torch.equal(chosen[0], entries[0, 1])
        assert torch.equal(chosen[1], entries[1, 0])
    mean, std = plain.chunk(2, 1)
    draws = (
        torch.stack([codec.encode(plain, torch.Generator().manual_seed(i)) for i in range(500)])
        / 0.18215
    )
    assert ((draws.mean(0) - mean) / std * 500**0.5).abs().max() < 5
    assert (draws.std(0) / std - 1).abs().max() < 0.2


def test_an_encoding_that_was_killed_goes_on_and_a_torn_shard_is_not_trusted(photos, tmp_path, vae):
    make(photos, tmp_path / "whole", vae, shard=4)
    make(photos, tmp_path / "p", vae, shard=4)
    path, expected = tmp_path / "p" / "entries.npy", everything(tmp_path / "whole")
    array = np.load(path, mmap_mode="r+")
    array[5:] = 7
    array.flush()
    assert latents.finished(tmp_path / "p") == {0, 1, 2}
    (tmp_path / "p" / "shards.txt").write_text("\n0 done\n\n1 do")
    with pytest.raises(UsageError, match=r"not finished \(1 of 3 shards\): run the same"):
        sources.open_source(str(tmp_path / "p"))
    assert make(photos, tmp_path / "p", vae, shard=4, batch_size=3)[1] == 8
    assert np.allclose(np.load(path), np.load(tmp_path / "whole" / "entries.npy"), atol=1e-2)
    assert everything(tmp_path / "p").keys() == expected.keys()
    assert make(photos, tmp_path / "p", vae, shard=4)[1] == 0


def test_several_processes_write_what_one_does(photos, tmp_path, monkeypatch):
    make(photos, tmp_path / "one", shard=5, mirror=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, images in (("0", 7), ("1", 5)):
        monkeypatch.setenv("RANK", rank)
        assert make(photos, tmp_path / "two", shard=5, mirror=True)[1] == images
    assert everything(tmp_path / "one") == everything(tmp_path / "two")


def test_another_set_or_other_files_are_not_overwritten(photos, tmp_path, monkeypatch):
    make(photos, tmp_path / "p")
    with pytest.raises(UsageError, match=r"another packed set .*mirrored: False there, True now"):
        make(photos, tmp_path / "p", mirror=True)
    with pytest.raises(UsageError, match=r"holds other things \(cat\)"):
        make(photos, photos)
    with pytest.raises(UsageError, match="encoded already"):
        make(tmp_path / "p", tmp_path / "q")
    monkeypatch.setattr(npy.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(MsmdiffError, match=r"full needs .* MiB, its disk has 0.0 MiB free"):
        make(photos, tmp_path / "full")


SMALL = {
    "model": {"name": "tiny", "hidden_size": 16, "num_heads": 2, "depth": 3, "num_classes": 2},
    "train": {"batch_size": 4, "steps": 4, "log_every": 1, "preview_every": 0},
    "data": {"image_size": 16, "hflip": 0.5},
}


def losses(run):
    return [line["loss"] for line in Run(run, writes=False).metrics()]


@pytest.mark.parametrize("codec", ["pixel", "dwt"])
def test_packed_pixels_train_as_the_images_do(photos, tmp_path, quiet, codec):
    make(photos, tmp_path / "p")
    for name, source in (("a", photos), ("b", tmp_path / "p")):
        layer = {"data": {"source": str(source)}, "codec": {"name": codec}}
        train(configuration.build(SMALL, layer), tmp_path / name, quiet)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_packed_moments_train_as_encoding_in_the_loop_does(photos, tmp_path, quiet, vae):
    make(photos, tmp_path / "p", vae, mirror=True, dtype="float32")
    for name, source in (("a", photos), ("b", tmp_path / "p")):
        layer = {
            "data": {"source": str(source)},
            "codec": {"name": "vae", "vae": str(vae) if name == "a" else None},
        }
        train(
            configuration.build(SMALL, layer, {"model": {"patch_size": 1}}), tmp_path / name, quiet
        )
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-3)
    assert Run(tmp_path / "b", writes=False).stored_config().codec.vae == str(vae)  # to sample with


def test_held_out_images_and_their_moments_have_one_loss(photos, tmp_path, quiet, vae):
    make(photos, tmp_path / "p", vae, mirror=True, dtype="float32")
    held = tmp_path / "held"
    for path in sorted(photos.rglob("*.png"))[4:9]:  # of both classes
        place = held / path.relative_to(photos)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).rotate(180).save(place)
    make(held, tmp_path / "packed", vae, mirror=True, dtype="float32")
    values = []
    for name in ("held", "packed"):
        layer = {
            "data": {"source": str(tmp_path / "p")},
            "codec": {"name": "vae"},
            "eval": {"heldout": str(tmp_path / name)},
            "model": {"patch_size": 1},
        }
        train(configuration.build(SMALL, layer), tmp_path / f"run-{name}", quiet)
        values.append(Run(tmp_path / f"run-{name}", writes=False).metrics()[-1])
    keys = [f"val_loss_{number}" for number in range(6)]
    assert [values[0][k] for k in keys] == pytest.approx([values[1][k] for k in keys], rel=1e-4)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"codec": {"name": "pixel"}}, "codec.name is pixel, not vae"),
        ({"data": {"hflip": 0.5}}, "data.hflip needs mirrored latents: encode with --mirror"),
        (
            {"data": {"image_size": 32}},
            r"data.image_size is 32, not 16; .*codec.factor is 4, not 2",
        ),
        ({"codec": {"channels": 16}}, "codec.channels is 16, not 4"),
        ({"data": {"crop": "random"}}, "data.crop is random, not center"),
    ],
)
def test_what_does_not_fit_is_refused(photos, tmp_path, vae, layer, message):
    make(photos, tmp_path / "p", vae)
    config = configuration.build(SMALL, {"data": {"hflip": 0}, "codec": {"name": "vae"}}, layer)
    config = road.resolve(configuration.build(config.as_dict(), {"model": {"patch_size": 1}}))
    with pytest.raises(UsageError, match=message):
        sources.open_source(str(tmp_path / "p")).check(config)


def test_an_epoch_visits_every_entry_once(photos, tmp_path):
    make(photos, tmp_path / "p")
    packed = sources.open_source(str(tmp_path / "p"))
    dataset = loader.TrainingImages(packed, section("data", image_size=16), seed=1)
    stream = loader.batches(dataset, Chunks(0, 4, 4), pin_memory=False)
    seen = torch.cat([next(stream).images for _ in range(3)])
    first = {image.numpy().tobytes() for image in seen}
    assert first == {image.numpy().tobytes() for image in crops(photos)}
    assert np.array_equal(np.asarray(packed.read(3)), crops(photos)[3].permute(1, 2, 0).numpy())


def fast_dit(root, n=11):
    """fast-DiT's cache, in the order of its sorted names: 0, 1, 10, 2, ..."""
    rng = np.random.default_rng(0)
    for folder in ("imagenet256_features", "imagenet256_labels"):
        (root / folder).mkdir(parents=True)
    for i in range(n):
        np.save(
            root / "imagenet256_features" / f"{i}.npy",
            rng.standard_normal((1, 4, 2, 2), np.float32),
        )
        np.save(root / "imagenet256_labels" / f"{i}.npy", np.array([i % 3]))
    return root


def u_vit(root, n=11):
    """U-ViT's cache of ImageNet: a pickled pair of moments and label per file."""
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        pair = np.empty(2, object)
        pair[:] = [rng.standard_normal((8, 2, 2)).astype(np.float32), np.int64(i % 3)]
        np.save(root / f"{i}.npy", pair, allow_pickle=True)
    return root


def test_fast_dit_and_u_vit_caches_are_read_as_they_are(tmp_path):
    cache = sources.open_source(str(fast_dit(tmp_path / "f")))
    assert cache.names[:3] == ["0.npy", "1.npy", "10.npy"]
    entries, labels = cache.gather(np.array([2, 3]))
    assert labels.tolist() == [10 % 3, 2]
    latent = torch.from_numpy(np.load(tmp_path / "f" / "imagenet256_features" / "10.npy"))
    codec = codecs.build(section("codec", name="vae"), 16)
    # The sample itself, as scaled.
    torch.testing.assert_close(codec.encode(entries, torch.Generator())[:1], latent)

    cache = sources.open_source(str(u_vit(tmp_path / "u")))
    assert cache.names[:3] == ["0.npy", "1.npy", "2.npy"]
    entries, labels = cache.gather(np.array([4]))
    mean, logvar = torch.from_numpy(np.load(tmp_path / "u" / "4.npy", allow_pickle=True)[0]).chunk(
        2
    )
    assert labels.tolist() == [1]
    torch.testing.assert_close(entries[0], torch.cat([mean, (logvar / 2).exp()]))


@pytest.mark.parametrize("make_cache", [fast_dit, u_vit])
def test_what_systems_leave_in_a_cache_is_passed_over(tmp_path, make_cache):
    root = make_cache(tmp_path / "cache")
    names = sources.open_source(str(root)).names
    for folder in (root, *root.glob("*_features"), *root.glob("*_labels")):
        (folder / "._0.npy").write_bytes(b"of macOS")
        (folder / "._11_0.npy").write_bytes(b"of macOS")
    for folder in (".a_features", ".a_labels", "@eaDir"):
        (root / folder).mkdir()
        (root / folder / "0.npy").write_bytes(b"of Synology")
    cache = sources.open_source(str(root))
    assert cache.names == names
    assert cache.text is None
    cache.gather(np.arange(len(cache)))


def test_a_cache_trains_and_packs(tmp_path, quiet):
    data = {"source": str(u_vit(tmp_path / "u")), "hflip": 0, "workers": 0}
    layers = (
        SMALL,
        {"data": data, "codec": {"name": "vae"}},
        {"model": {"patch_size": 1, "num_classes": 3}},
    )
    train(configuration.build(*layers), tmp_path / "a", quiet)
    config = configuration.build(*layers)
    codec = codecs.build(config.codec, 16)  # of no VAE, which is not asked for
    encode.encode(sources.open_source(data["source"]), codec, config.data, tmp_path / "p", nothing,
                  dtype="float32", shard=4)  # fmt: skip
    packed = sources.open_source(str(tmp_path / "p"))
    assert packed.num_classes == 3
    train(configuration.build(*layers, {"data": {"source": packed.spec}}), tmp_path / "b", quiet)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    with pytest.raises(MsmdiffError, match=r"has class 2, model.num_classes is 2"):
        train(configuration.build(*layers, {"model": {"num_classes": 2}}), tmp_path / "c", quiet)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_cache_with_other_pickles_is_refused_and_not_executed(tmp_path):
    root = u_vit(tmp_path / "u")
    with (root / "0.npy").open("wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(file, header)
        pickle.dump(Evil(), file)
    with pytest.raises(
        MsmdiffError, match=r"0.npy is not a .npy file .*: it asks for builtins.exec"
    ):
        sources.open_source(str(root))
    (root / "0.npy").write_bytes(b"torn")
    with pytest.raises(MsmdiffError, match=r"0.npy is not .*: it does not begin as one"):
        sources.open_source(str(root))


def test_a_newer_format_is_named(photos, tmp_path):
    make(photos, tmp_path / "p")
    header = json.loads((tmp_path / "p" / "packed.json").read_text())
    (tmp_path / "p" / "packed.json").write_text(
        json.dumps({**header, "msmdiff_packed": latents.FORMAT_VERSION + 1})
    )
    with pytest.raises(MsmdiffError, match="packed by a newer msmdiff"):
        sources.open_source(str(tmp_path / "p"))


def test_pickles_of_older_numpy_are_read(tmp_path):
    root = u_vit(tmp_path / "u", 2)
    expected = sources.open_source(str(root)).gather(np.array([1]))
    content = (root / "1.npy").read_bytes()
    start = content.index(b"\x80")  # of the pickle
    old = pickle.dumps(pickle.loads(content[start:]), protocol=3).replace(
        b"numpy._core", b"numpy.core"
    )
    (root / "1.npy").write_bytes(content[:start] + old)
    entries, labels = sources.open_source(str(root)).gather(np.array([1]))
    assert torch.equal(entries, expected[0])
    assert labels.tolist() == [1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("3.npy", np.zeros((8, 3, 3), np.float32), r"3.npy holds \[8, 3, 3\], the first file of"),
        (
            "3.npy",
            np.full((8, 2, 2), np.nan, np.float32),
            "3.npy holds numbers that are not finite",
        ),
        ("3.npy", np.zeros((7, 2, 2), np.float32), r"3.npy is \[7, 2, 2\]: neither"),
        ("3.npy", np.zeros(3, [("a", "f4")]), "it does not hold plain numbers"),
    ],
)
def test_an_odd_file_of_a_cache_is_named(tmp_path, name, content, words):
    root = u_vit(tmp_path / "u")
    np.save(root / name, content)
    with pytest.raises(MsmdiffError, match=words):
        sources.open_source(str(root)).gather(np.array([3]))


def test_a_label_that_no_network_has_a_row_for_is_refused(tmp_path):
    root = fast_dit(tmp_path / "f")
    np.save(root / "imagenet256_labels" / "1.npy", np.array([10**11]))
    with pytest.raises(MsmdiffError, match=r"1.npy has the label 100000000000: classes are 0 to"):
        sources.open_source(str(root)).gather(np.array([1]))


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("packed.json", lambda d: {**d, "count": 10**12}, "is not finished"),
        ("packed.json", lambda d: {**d, "shard": 0}, "its count cannot be"),
        ("packed.json", lambda d: {**d, "codec": "vae"}, "its codec cannot be"),
        ("packed.json", lambda d: {**d, "dtype": "float32"}, "entries.npy has not the shape"),
        ("labels.npy", lambda a: a * 10**11, "labels.npy holds classes outside 0 to 1"),
        ("labels.npy", lambda a: a[:3], r"labels.npy has the shape \[3\], not \[12\]"),
        ("entries.npy", lambda a: a[:3], "entries.npy has not the shape"),
        ("entries.npy", lambda a: a.astype(object), "it holds Python objects"),
    ],
)
def test_a_damaged_packed_set_says_what_is_wrong(photos, tmp_path, file, change, words):
    make(photos, tmp_path / "p")
    path = tmp_path / "p" / file
    if file == "packed.json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        np.save(path, change(np.load(path)))
    with pytest.raises(MsmdiffError, match=words):
        sources.open_source(str(tmp_path / "p"))


def test_numbers_of_a_packed_set_that_are_not_finite_are_named_where_they_are_read(
    photos, tmp_path, vae
):
    make(photos, tmp_path / "p", vae, shard=5)
    entries = np.load(tmp_path / "p" / "entries.npy")
    entries[7, 0, 0, 0] = np.nan
    np.save(tmp_path / "p" / "entries.npy", entries)
    source = sources.open_source(str(tmp_path / "p"))
    source.gather(np.array([0, 6, 8]))
    with pytest.raises(MsmdiffError, match=rf"entries of {source.names[7]} \(shard 1\) hold num"):
        source.gather(np.array([3, 7]))


def big_vae(vae, folder, factor):
    """The tiny VAE, whose means are this much larger."""
    import diffusers

    network = diffusers.AutoencoderKL.from_pretrained(vae)
    network.quant_conv.weight.data[:4] *= factor
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1e7, r"latent of \S+1.png.* is beyond float16's 65,504: give --dtype float32"),
        (float("nan"), r"latent of \S+1.png.* is not finite"),
    ],
)
def test_latents_that_cannot_be_stored_stop_the_encoding_by_name(
    photos, tmp_path, vae, factor, words
):
    with pytest.raises(MsmdiffError, match=words):
        make(photos, tmp_path / "p", big_vae(vae, tmp_path / "big", factor))
    assert latents.finished(tmp_path / "p") == set()


def test_large_latents_fit_float32(photos, tmp_path, vae):
    assert make(photos, tmp_path / "p", big_vae(vae, tmp_path / "big", 1e7), dtype="float32")[1]


def test_one_process_at_a_time_encodes_into_a_folder(photos, tmp_path):
    with (
        encode._sole_launch(tmp_path / "p", rank=0),
        pytest.raises(MsmdiffError, match=r"another process is encoding into .*p: wait for it"),
    ):
        make(photos, tmp_path / "p")
    assert make(photos, tmp_path / "p")[1] == 12


def test_files_of_the_user_in_the_folder_are_not_replaced(photos, tmp_path):
    out = tmp_path / "p"
    out.mkdir()
    (out / "names.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds other things \(names.txt\)"):
        make(photos, out)
    assert (out / "names.txt").read_text() == "mine"


def test_a_set_that_a_kill_left_half_made_is_made(photos, tmp_path):
    make(photos, tmp_path / "whole")
    make(photos, tmp_path / "p")
    (tmp_path / "p" / "shards.txt").unlink()
    (tmp_path / "p" / "labels.npy").write_bytes(b"\x93NUM")
    (tmp_path / "p" / "names.txt").unlink()
    assert make(photos, tmp_path / "p")[1] == 12
    assert everything(tmp_path / "p") == everything(tmp_path / "whole")


def test_names_that_are_no_utf8_are_kept(photos, tmp_path):
    odd = photos / "cat" / "caf\udce9.png"
    (photos / "cat" / "1.png").rename(odd)
    make(photos, tmp_path / "p")
    packed = sources.open_source(str(tmp_path / "p"))
    assert len(packed) == 12
    assert any("caf%E9" in name for name in packed.names)
