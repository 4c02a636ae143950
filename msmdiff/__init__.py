"""msmdiff: train diffusion transformers cheaply by masking."""

from msmdiff.core import machine

machine.wait_briefly()

__version__ = "0.1.0"


def __getattr__(name: str):
    """`msmdiff.load`, imported when asked for: torch takes seconds."""
    if name == "load":
        from msmdiff.core.weights import load

        return load
    raise AttributeError(f"module 'msmdiff' has no attribute '{name}'")
