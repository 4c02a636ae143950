"""Bad images are read or refused by their names, in bounded memory, by every command alike."""

from pathlib import Path

import numpy as np
import pytest
from children import require_calm
from PIL import Image


@pytest.fixture(scope="module")
def bad(children, tmp_path_factory) -> Path:
    """A folder of bad images."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad").mkdir()
    end = children.call(folder, ("pictures", "write"), {"folder": "bad"})
    require_calm(end, 0)
    assert end.result > 400
    return folder


def test_each_is_an_image_or_a_sentence(children, bad):
    end = children.call(bad, ("pictures", "read_all"), {"folder": "bad"}, megabytes=300)
    require_calm(end, 0)
    assert end.result["problems"] == []
    count = len(list((bad / "bad").iterdir()))
    assert 50 < end.result["read"] < count - 200


def test_commands_name_the_first_and_skip_them_all_where_they_are_told_to(children, bad):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    for i in range(3):
        Image.fromarray(pixels).save(bad / "bad" / f"good{i}.png")
    end = children.command(bad, "data", "inspect", "bad")
    assert (end.code, end.seen) == (1, [])
    assert "unreadable" in end.out
    argv = ["--data", "bad", "--image-size", "16", "--steps", "1", "--batch-size", "2"]
    argv += ["--set", "data.workers=0", "--model", "tiny", "--set", "train.preview_every=0"]
    end = children.command(bad, "pretrain", *argv, "--run", "refused")
    require_calm(end, 1)
    end = children.command(
        bad, "pretrain", *argv, "--run", "r", "--set", "data.skip_unreadable=true"
    )
    require_calm(end, 0)
    assert "left out: " in end.out
    argv = ["data", "encode", "bad", "-o", "packed", "--codec", "pixel", "--image-size", "16"]
    end = children.command(bad, *argv)
    require_calm(end, 1)
    end = children.command(bad, "fid", "stats", "bad", "--features", "pixel", "-o", "s.npz")
    require_calm(end, 1)
