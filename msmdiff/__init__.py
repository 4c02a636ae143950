"""msmdiff: train diffusion transformers cheaply by masking.

From Python: `load` opens weights or a run, `train` trains, `distance` compares two sets of images.
"""

from typing import TYPE_CHECKING, Any

from msmdiff.core import machine

machine.wait_briefly()

if TYPE_CHECKING:
    from msmdiff.core.metrics.distance import distance
    from msmdiff.core.training.simple import train
    from msmdiff.core.weights import load

__version__ = "0.1.0"
__all__ = ["__version__", "distance", "load", "train"]

_WHERE = {
    "load": "msmdiff.core.weights",
    "train": "msmdiff.core.training.simple",
    "distance": "msmdiff.core.metrics.distance",
}
"""Imported when asked for: torch takes seconds."""


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'msmdiff' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
