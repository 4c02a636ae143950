"""Shared fixtures: the golden data's folder, small image folders, and the command line as a user
runs it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "slow" not in config.getoption("-m"):
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


# torchrun's default port, which tests that run side by side would share.
os.environ["PET_MASTER_PORT"] = str(29500 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSMDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    # A training before this test set it, and hypothesis wants IEEE 754.
    torch.set_flush_denormal(False)


@pytest.fixture
def golden() -> Path:
    """The folder of inputs and outputs of the published implementations."""
    folder = Path(
        os.environ.get("MSMDIFF_GOLDEN", Path(__file__).parents[1] / ".." / "shared" / "golden")
    )
    if not folder.is_dir():
        pytest.skip(f"no golden data at {folder} (MSMDIFF_GOLDEN names the folder)")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 12 PNGs of 40x24 pixels in two classes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 40, 3), np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def cli(tmp_path: Path):
    """Run the command line in a process of its own, or in several under torchrun, in an empty
    folder; checks the exit code.
    """

    def run(
        *arguments: str, code: int = 0, processes: int = 1, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--nproc_per_node", str(processes), "-m", "--"]
            environment = {"OMP_NUM_THREADS": "1", **environment}
        done = subprocess.run(
            [*command, "msmdiff", *arguments],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "200", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pytorch-fid's network with seeded He-initialised weights, saved in its own layout."""
    from unittest import mock

    from pytorch_fid import inception

    torch.manual_seed(0)
    build, made = inception._inception_v3, []

    def remember(*args, **kwargs):
        made.append(build(*args, **kwargs))
        return made[0]

    with (
        mock.patch.object(inception, "_inception_v3", remember),
        mock.patch.object(
            inception, "load_state_dict_from_url", side_effect=lambda url, **_: made[0].state_dict()
        ),
    ):
        network = inception.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny AutoencoderKL of random numbers, as diffusers saves it: 4 channels at a
    factor of 8.
    """
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    folder = tmp_path_factory.mktemp("vae") / "vae"
    network.save_pretrained(folder)
    return folder


class Quiet:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[dict] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, images_seen: int, total: int, metrics: dict) -> None:
        self.lines.append(json.loads(json.dumps(metrics)))

    def activity(self, what: str, done: int, total: int) -> None:
        pass


@pytest.fixture
def quiet() -> Quiet:
    return Quiet()
