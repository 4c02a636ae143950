"""The built wheel works in an environment of its own, away from the repository."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a program of a fresh environment that holds the wheel; the packages that it depends on
    are borrowed from this one. Returns what the program prints.
    """
    folder = tmp_path_factory.mktemp("wheel")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"MSMDIFF_CACHE": str(folder / "cache"), "COLUMNS": "200"}

    def run(*words: str, cwd: Path = folder) -> str:
        done = subprocess.run(
            words, cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (wheel,) = folder.glob("msmdiff-*.whl")
    venv.create(folder / "clean", with_pip=False)
    python = folder / "clean" / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "clean")}))
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", str(wheel))
    return lambda name, *words: run(str(python.with_name(name)), *words)


def test_the_wheel_is_what_runs(installed):
    file = installed("python", "-c", "import msmdiff; print(msmdiff.__file__)")
    assert "clean" in Path(file).parts
    assert not Path(file).is_relative_to(ROOT)
    assert "pretrain" in installed("msmdiff", "--help")


def test_it_brings_every_preset(installed):
    from msmdiff.core import presets

    shown = json.loads(installed("msmdiff", "list", "presets", "--json"))
    assert [row["name"] for row in shown] == presets.names()
    assert len(shown) > 70


def test_a_bare_command_trains(installed):
    small = ["--set", "train.steps=2", "--set", "train.batch_size=4", "--set", "train.threads=1"]
    done = installed("msmdiff", "pretrain", *small, "--json")
    summary = json.loads(done)
    assert summary["images_seen"] == 8
    assert summary["config"]["mask"]["ratio"] == 0.9
