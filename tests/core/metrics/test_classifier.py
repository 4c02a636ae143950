"""A classifier of the data at hand, its file and its features."""

import numpy as np
import pytest
import torch

from msmdiff.cli import data as command
from msmdiff.core import files, machine, tensor_files
from msmdiff.core.data.sources import open_source
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics import classifier, evaluate, features, statistics
from msmdiff.core.metrics.inputs import open_input
from msmdiff.core.metrics.scores import compare


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A classifier of the digits, and what its training said."""
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    source = open_source("digits:train")
    return path, classifier.train(source, path, side=8, steps=50)


def test_it_learns_and_its_file_tells_what_it_is(net):
    path, made = net
    assert made.accuracy > 0.8  # of ten classes
    assert classifier.told(path) == made
    assert (made.source, made.classes, made.side) == ("digits:train", 10, 8)


def test_the_same_command_gives_the_same_numbers(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        classifier.train(open_source("digits:test"), path, side=8, steps=3)
    assert files.checksum(paths[0]) == files.checksum(paths[1])


def test_the_distance_tells_noise_from_digits_and_names_the_file(net):
    path, _ = net
    made = features.build("classifier", path)
    digits, others = (open_input(f"digits:{part}") for part in ("train", "test"))
    real = [evaluate.of_input(images, made) for images in (digits, others)]
    drawn = np.random.default_rng(0).integers(0, 256, (360, 3, 8, 8), np.uint8)
    noise = evaluate.of_images([torch.from_numpy(drawn)], made)
    near, far = compare(real[0], real[1], made), compare(noise, real[1], made)
    assert far.value > 10 * near.value
    digest = files.checksum(path)[:8]
    assert near.name == "fd_classifier"
    assert near.features == f"classifier-128/{digest}"
    assert near.title == f"Fréchet distance over the classifier {digest}"
    assert "FID" not in near.title


def test_images_of_another_size_are_brought_to_its_side(net):
    made = features.build("classifier", net[0])
    flat = torch.full((2, 3, 24, 16), 77, dtype=torch.uint8)
    small = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    torch.testing.assert_close(made(flat)[0], made(small)[0], rtol=1e-4, atol=1e-5)


def test_statistics_are_compared_without_the_network(net, tmp_path):
    """As those of every feature network: by what they say of themselves."""
    made = features.build("classifier", net[0])
    kept = []
    for part in ("train", "test"):
        kept.append(tmp_path / f"{part}.npz")
        found = evaluate.of_input(open_input(f"digits:{part}"), made)
        statistics.save(kept[-1], found)
    how = evaluate.Settings(features="classifier")
    results, _, _ = evaluate.evaluate([str(kept[0])], str(kept[1]), how)
    assert results[0][0].title.startswith("Fréchet distance over the classifier")


def test_a_file_stands_for_the_network(tmp_path):
    assert features.named("net.safetensors", None)[0] == "classifier"
    assert features.named("pixel", None) == ("pixel", None)
    with pytest.raises(UsageError, match="give one"):
        features.named("net.safetensors", tmp_path / "other.safetensors")


def test_what_is_no_classifier_is_refused_by_name(net, tmp_path):
    with pytest.raises(UsageError, match="msmdiff data features"):
        features.build("classifier")
    other = tmp_path / "other.safetensors"
    tensor_files.write(other, {"x": torch.zeros(2)}, {})
    with pytest.raises(MsmdiffError, match=r"other.safetensors was not written by"):
        features.build("classifier", other)
    about = tensor_files.metadata(net[0])
    state = tensor_files.read(net[0])
    state.pop("head.bias")
    tensor_files.write(other, state, about)
    with pytest.raises(MsmdiffError, match=r"other.safetensors is not a whole classifier: .*bias"):
        features.build("classifier", other)


def test_images_without_classes_or_too_few_are_refused(tmp_path):
    plain = open_source("digits", "none")
    with pytest.raises(UsageError, match="digits has no classes"):
        classifier.train(plain, tmp_path / "x.safetensors")
    few = open_source("digits")
    few.labels, few._pixels = few.labels[:12], few._pixels[:12]
    with pytest.raises(UsageError, match="holds 12 images"):
        classifier.train(few, tmp_path / "x.safetensors")


def test_the_command_replaces_its_own_files_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "prepare", lambda: None)  # threads of the whole process
    out = tmp_path / "net.safetensors"
    for _ in range(2):
        command.features("digits:test", out, image_size=8, steps=10)
        assert "net.safetensors: 10 classes" in capsys.readouterr().out
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match="was not written by msmdiff"):
        command.features("digits:test", out, image_size=8, steps=10)
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        command.features("digits:test", tmp_path / "net.pt")
    assert out.read_bytes() == b"mine"
