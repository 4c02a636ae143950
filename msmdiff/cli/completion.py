"""What a shell completes: presets, sizes, runs, samplers. `msmdiff --install-completion` sets it
up.
"""

from collections.abc import Callable
from pathlib import Path


def presets(incomplete: str) -> list[str]:
    """Presets that begin so."""
    from msmdiff.core import presets as known

    return [name for name in known.names() if name.startswith(incomplete)]


def registered(kind: str) -> Callable[[str], list[str]]:
    """A completion of what is registered under a kind, such as `size` or `sampler`."""

    def complete(incomplete: str) -> list[str]:
        from msmdiff.core import registry

        return [name for name in registry.entries(kind) if name.startswith(incomplete)]

    return complete


def runs(incomplete: str) -> list[str]:
    """Runs under runs/ that begin so, and files and folders, the shell's own."""
    folder = Path("runs")
    if incomplete.startswith("runs/"):
        return [str(p.parent) for p in folder.glob("*/run.json")
                if str(p.parent).startswith(incomplete)]  # fmt: skip
    return [p.parent.name for p in folder.glob("*/run.json")
            if p.parent.name.startswith(incomplete)]  # fmt: skip
