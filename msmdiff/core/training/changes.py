"""What may differ when a run goes on: nothing that changes what it computes, but for settings that
only change how, and, knowingly, its rate and the like.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msmdiff.core import config as configuration
from msmdiff.core.config import Config
from msmdiff.core.errors import UsageError
from msmdiff.core.training import origins

HARMLESS = re.compile(
    r"train\.(micro_batch_size|gradient_checkpointing|compile|threads|deterministic)"
)
"""How a step is computed: the same up to rounding, and to which random numbers are drawn."""

KNOWINGLY = re.compile(
    r"optim\.(lr|warmup_steps|schedule|final_lr|decay_steps|clip_grad_norm)"
    r"|train\.(precision|on_nonfinite)|data\.(hflip|skip_unreadable)|objective\.label_dropout"
)
"""What a user may change in the middle of a run by saying so."""


@dataclass
class Change:
    """A key that is another from so many images on."""

    images: int
    key: str
    old: Any
    new: Any


def admitted(
    run: Path, begun: Config, config: Config, images_seen: int, allow: bool
) -> tuple[list[str], list[Change]]:
    """What to tell of the differences between the configuration that a run was begun with and the
    one that it goes on with, and those that were changed knowingly.

    Data and the weights it started from may lie elsewhere now: what they hold tells whether they
    are the same (`origins.known_again`).

    Raises UsageError with the differences that make it another training, or that were not allowed.
    """
    found = configuration.difference(begun, config)
    for key in origins.MOVABLE:
        if all(found.get(key, ())):
            found.pop(key, None)
    notes = [
        f"{key} is {new!r} now and was {old!r}: the same training, but not bit for bit"
        for key, (old, new) in found.items()
        if HARMLESS.fullmatch(key)
    ]
    left = {key: pair for key, pair in found.items() if not HARMLESS.fullmatch(key)}
    known = {key: pair for key, pair in left.items() if KNOWINGLY.fullmatch(key)}
    if not left:
        return notes, []
    if len(known) < len(left) or not allow:
        raise UsageError(_refusal(run, left, known, allow))
    changes = [Change(images_seen, key, old, new) for key, (old, new) in known.items()]
    shown = ", ".join(f"{each.key} from {each.old!r} to {each.new!r}" for each in changes)
    return [*notes, f"changed from image {images_seen:,} on: {shown}"], changes


def _refusal(run: Path, left: dict[str, Any], known: dict[str, Any], allow: bool) -> str:
    shown = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in left.items())
    text = (
        f"{run} was trained with another configuration ({shown}): give the same settings to "
        f"resume it, or another --run; `--run {run}` alone takes its own settings"
    )
    if len(known) == len(left):
        return f"{text}; --allow-change goes on with the new ones"
    if allow:
        fixed = ", ".join(key for key in left if key not in known)
        return f"{text}; --allow-change does not cover {fixed}"
    return text


def as_records(changes: list[Change]) -> list[dict[str, Any]]:
    """As `run.json` keeps them."""
    return [asdict(change) for change in changes]
