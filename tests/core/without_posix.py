"""A training and a sampling where nothing is there that only POSIX has: a stand-in for Windows."""

import fcntl
import os
import sys
import types
from pathlib import Path

# These look at once for what their system has.
import accelerate  # noqa: F401
import torch
import torch.utils.data


def locking(descriptor: int, mode: int, size: int) -> None:
    """As Windows has it: what is locked is refused as a matter of permission."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PermissionError(*error.args) from None


windows = types.ModuleType("msvcrt")
windows.locking, windows.LK_NBLCK = locking, 2  # type: ignore[attr-defined]
sys.modules |= {"msvcrt": windows, "fcntl": None, "resource": None}  # type: ignore[dict-item]
for name in ("O_NONBLOCK", "O_CLOEXEC", "register_at_fork", "posix_fallocate", "sysconf",
             "sched_getaffinity"):  # fmt: skip
    delattr(os, name)

from msmdiff.core import config as configuration  # noqa: E402
from msmdiff.core import files, systems, weights  # noqa: E402
from msmdiff.core.errors import MsmdiffError  # noqa: E402
from msmdiff.core.gallery import Gallery, Request  # noqa: E402
from msmdiff.core.training.trainer import train  # noqa: E402


class Silent:
    """A reporter that says nothing."""

    def note(self, *_: object) -> None:
        pass

    progress = activity = note


assert systems.memory() is None
torch.set_num_threads(1)
layers = {
    "data": {"source": "digits", "workers": 0},
    "model": {"hidden_size": 16, "num_heads": 2, "depth": 3},
    "train": {"steps": 1, "batch_size": 4, "preview_every": 0, "threads": 1},
    "eval": {"heldout_every": 0},
    "sample": {"steps": 1},
}
run = Path(sys.argv[1]) / "run"
train(configuration.build(layers), run, Silent())
with files.Lock(run, "first"):
    try:
        files.Lock(run, "a second one")
        raise SystemExit("two processes have the lock")
    except MsmdiffError as error:
        assert str(error) == "a second one"  # noqa: PT017
request = Request(seeds=[0, 1], folder=run.parent / "samples", npz=run.parent / "samples.npz")
Gallery(weights.load(run), request).make(lambda *_: None)
left = sorted(path.name for path in run.parent.rglob("*.locked"))
assert left == [], left
print("done", len(list(request.folder.glob("*.png"))))
