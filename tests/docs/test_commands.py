"""Every command of README and docs/ works as it is written, with settings that make it small."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import numpy as np
import pages
import pytest
import typer
from PIL import Image

PAGES = {str(page.relative_to(pages.ROOT)): page for page in pages.pages()}

# What belongs to the reader's machine does nothing here; the launchers start one process.
NOTHING = "#!/bin/bash\nexit 0\n"
LAUNCHER = '#!/bin/bash\nwhile [ "$1" != msmdiff ]; do shift; done\nexec "$@"\n'
MAKE = f'#!/bin/bash\nexec /usr/bin/env -i PATH=/usr/bin:/bin make -C {pages.ROOT} --dry-run "$@"\n'


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the programs that the pages call; `msmdiff` is served by a process that forks."""
    folder = tmp_path_factory.mktemp("programs")
    address = str(folder / "door")
    forks.client(folder / "msmdiff", address, "msmdiff")
    forks.client(folder / "python", address, "python")
    for name in ("pip", "git", "docker", "python3", "ruff", "mypy", "pytest", "tensorboard"):
        _write_program(folder / name, NOTHING)
    for name in ("torchrun", "accelerate"):
        _write_program(folder / name, LAUNCHER)
    _write_program(folder / "make", MAKE)
    here = Path(__file__).parent
    served = subprocess.Popen(
        [sys.executable, str(here / "forks.py"), address],
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "MSMDIFF_CACHE": str(folder / "cache"),
        },
    )
    assert served.stdout is not None
    assert served.stdout.readline() == "ready\n"
    yield folder
    served.terminate()
    served.wait()


Run = Callable[[str], subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def world(
    programs: Path, tmp_path_factory: pytest.TempPathFactory, random_inception: Path, vae: Path
) -> Path:
    """A folder where a reader of the first page stands: with pictures, two runs and some published
    files at hand.
    """
    folder = tmp_path_factory.mktemp("reader")
    _furnish(folder, programs, random_inception, vae)
    made = _runner(folder, programs)((Path(__file__).parent / "reader.sh").read_text())
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.fixture
def reader(world: Path, programs: Path, tmp_path: Path) -> Run:
    """A function that runs a script in a copy of that folder: no page depends on another one."""
    folder = tmp_path / "reader"
    shutil.copytree(world, folder, symlinks=True)
    return _runner(folder, programs)


def _runner(folder: Path, programs: Path) -> Run:
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(folder)}
    return lambda script: subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _write_program(path: Path, script: str) -> None:
    path.write_text(script)
    path.chmod(0o755)


def _furnish(world: Path, programs: Path, inception: Path, vae: Path) -> None:
    """The pictures, and the files that the pages take from elsewhere."""
    rng = np.random.default_rng(0)
    for i in range(24):
        colours = rng.integers(0, 255, (4, 6, 3), np.uint8)
        picture = Image.fromarray(colours).resize((72, 66), Image.Resampling.BICUBIC)
        for set_ in ("photos", "photos-train", "photos-val"):
            folder = world / set_ / ("cats", "dogs")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{i}.png")
    (world / "inception.pth").symlink_to(inception)
    (world / "sd-vae").symlink_to(vae)
    (world / ".venv").mkdir()
    (world / ".venv/bin").symlink_to(programs)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_work(page, reader):
    failures = []
    for block in pages.blocks(PAGES[page]):
        if block.language == "python" and block.file is None:
            script = f"cat > block.py <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK\npython block.py"
        elif block.file is not None:
            script = f"cat > {block.file} <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK\n"
        elif block.language in ("", "bash") and block.runs:
            script = block.text
        else:
            continue
        done = reader(script)
        if done.returncode:
            failures.append(f"{block.where}\n{block.text}\n{done.stdout}{done.stderr}")
    assert not failures, "\n\n".join(failures)


def _check(arguments: list[str]) -> None:
    """Parse a command without running it; raises what the command line would say."""
    from msmdiff.cli import app

    command = typer.main.get_command(app)
    context = command.make_context("msmdiff", list(arguments))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        if not rest and command.invoke_without_command:
            return
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, list(rest), parent=context)


@pytest.mark.parametrize("page", PAGES)
def test_the_options_of_what_needs_more_than_this_machine_exist(page):
    for block in pages.blocks(PAGES[page]):
        if block.language not in ("", "bash") or block.runs:
            continue
        syntax = subprocess.run(
            ["bash", "-n"], input=block.text, capture_output=True, text=True, check=False
        )
        assert syntax.returncode == 0, f"{block.where}: {syntax.stderr}"
        for arguments in pages.command_lines(block.text):
            _check(arguments)


@pytest.mark.parametrize(
    "command",
    [
        "pretrain --mask 0.9 --run hinted",
        "finetune --ckpt primer --run hinted-too",
        "data encode photos/ -o hinted-latents --vae sd-vae/ --image-size 64",
        "data encode photos/ -o hinted-pixels --codec pixel --image-size 32",
    ],
)
def test_the_command_that_a_command_shows_at_its_end_works(command, reader):
    done = reader(f"msmdiff {command}")
    assert done.returncode == 0, done.stderr
    hint = re.search(r"next: (msmdiff .+)", done.stdout)
    assert hint is not None, done.stdout
    followed = reader(hint[1])
    assert followed.returncode == 0, f"{hint[1]}\n{followed.stderr}"


def test_the_examples_of_every_help_text_parse():
    from msmdiff.cli import app

    shown = _epilogs(typer.main.get_command(app))
    examples = [example for text in shown for example in re.findall(r"`([^`]+)`", text)]
    lines = [line for example in examples for line in pages.command_lines(example)]
    assert len(lines) > 30
    for arguments in lines:
        _check(arguments)


def _epilogs(command: typer.core.TyperCommand) -> Iterator[str]:
    yield command.epilog or ""
    for below in getattr(command, "commands", {}).values():
        yield from _epilogs(below)
