"""What a run was made from, known again by its content wherever it lies now: the data, and the
weights of `train.init_from`.
"""

from pathlib import Path
from typing import Any

from msmdiff.core import files, weights
from msmdiff.core.config import Config
from msmdiff.core.data.source import Source
from msmdiff.core.errors import UsageError

MOVABLE = ("data.source", "train.init_from")
"""The keys of the configuration that name a place."""


def of(config: Config, source: Source) -> dict[str, Any]:
    """What a checkpoint keeps: `images`, the data's identity, and `primer`, the sha256 of the
    weights that a new run starts from, or None.

    Raises UsageError where these are not there.
    """
    start = config.train.init_from
    primer = None if start is None else files.checksum(weights.file_of(weights.locate(start)))
    return {"images": source.identity(), "primer": primer}


def known_again(
    run: Path, begun: Config, config: Config, source: Source, state: dict[str, Any]
) -> dict[str, Any]:
    """The origins of a run that goes on, checked against its newest checkpoint.

    Args:
        begun: the configuration that the run was begun with.
        config: the present one; its paths may differ.
        source: the present data.
        state: the checkpoint's: `data`, how many images there were, and what `of` gave. Older
            checkpoints lack the last, and know data and weights by their paths.

    Raises UsageError for other data, and for other weights to start from.
    """
    images, primer = source.identity(), state.get("primer")
    if "images" in state:
        same = images == state["images"]
    else:
        listed = source.listing()
        here = _same_place(begun.data.source, config.data.source)
        same = here and len(source) == state["data"] and state.get("listing", listed) == listed
    if not same:
        others = ", others or of other classes" if state["data"] == len(source) else ""
        raise UsageError(
            f"{run} was trained on {state['data']:,} images, {config.data.source} now has "
            f"{len(source):,}{others}: restore the data, or finetune --ckpt from it in another "
            "--run"
        )
    _require_same_primer(run, begun.train.init_from, config.train.init_from, primer)
    return {"images": images, "primer": primer}


def _require_same_primer(run: Path, old: str | None, new: str | None, primer: str | None) -> None:
    """Where the place is another: the weights there must be the same."""
    if old is None or new is None or _same_place(old, new):
        return
    if primer is None and Path(old).is_file():
        primer = files.checksum(Path(old))
    now = files.checksum(weights.file_of(weights.locate(new)))
    if now != primer:
        told = "which is not there to compare with" if primer is None else "which were others"
        raise UsageError(
            f"train.init_from {new}: {run} was started from the weights in {old}, {told}: give "
            "those to resume it, or another --run"
        )


def _same_place(old: str, new: str) -> bool:
    return Path(old).resolve() == Path(new).resolve()
