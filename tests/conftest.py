"""Shared fixtures: the golden data's folder, small image folders, and the command line as a user runs it."""

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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSMDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def golden() -> Path:
    """The folder of inputs and outputs of the published implementations."""
    folder = Path(os.environ.get("MSMDIFF_GOLDEN", Path(__file__).parents[1] / ".." / "shared" / "golden"))
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
    """Run the command line in a process of its own, in an empty folder; checks the exit code."""

    def run(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "msmdiff", *arguments],
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


class Quiet:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[dict] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, images_seen: int, total: int, metrics: dict) -> None:
        self.lines.append(json.loads(json.dumps(metrics)))


@pytest.fixture
def quiet() -> Quiet:
    return Quiet()
