"""The model card of a weights file: what it is, how to use it and what it scored, as a `README.md`
that the Hugging Face Hub reads.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from msmdiff.core.diffusion import codecs
from msmdiff.core.diffusion.coverage import is_primer
from msmdiff.core.weights import Stored

MADE_BY = "<!-- Written by msmdiff weights push, which replaces this page. -->"
"""Stands in a card, which by it is known for one that may be replaced."""


def write(stored: Stored, name: str, digest: str, *, pictured: bool, license: str | None) -> str:
    """The card's text.

    Args:
        stored: the weights, ours.
        name: a hub id, or a folder's name.
        digest: the file's SHA-256.
        pictured: `samples.png` lies beside the card.
        license: as the hub names licences, such as apache-2.0; None leaves it open.
    """
    title = name.rpartition("/")[2]
    size, kind = stored.config.data.image_size, stored.config.model.family
    about = f"A diffusion transformer ({kind}) for images of {size} pixels, trained with msmdiff."
    if is_primer(stored.config):
        about += " It has only seen a part of each image: fine-tune it before you draw from it."
    parts = [
        _head(stored, license),
        MADE_BY,
        f"# {title}",
        about,
        "![Samples](samples.png)" if pictured else "",
        "## Use it",
        _usage(stored, name, title),
        "## What it is",
        _table([("what", "value"), *_facts(stored, digest)]),
        _score(stored.path),
        "" if license else "No licence was stated.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(stored: Stored, license: str | None) -> str:
    """The metadata that the hub sorts models by."""
    task = "text-to-image" if stored.config.codec.text else "unconditional-image-generation"
    lines = ["library_name: msmdiff", f"pipeline_tag: {task}"]
    lines += [f"license: {license}"] if license else []
    lines += ["tags:", "- diffusion", "- msmdiff", f"- {stored.config.model.family}"]
    return "\n".join(["---", *lines, "---"])


def _usage(stored: Stored, name: str, title: str) -> str:
    first = class_names(stored)[:1]
    labelled = bool(first and stored.config.model.num_classes)
    classes = f" --classes {shlex.quote(first[0])}" if labelled else ""
    chosen = f", classes={first[0]!r}" if labelled else ""
    pull = f"msmdiff weights pull {name}\n" if "/" in name else ""
    sample = f"msmdiff sample {title} --n 16{classes}\n"
    python = f'import msmdiff\n\nimages = msmdiff.load("{title}").draw(16{chosen})'
    if is_primer(stored.config):
        return f"```bash\n{pull}msmdiff finetune --ckpt {title} --data photos/\n```"
    return (
        f"```bash\n{pull}{sample}msmdiff finetune --ckpt {title} --data photos/\n```\n\n"
        f"```python\n{python}\n```"
    )


def _facts(stored: Stored, digest: str) -> list[tuple[str, str]]:
    config, notes = stored.config, stored.notes
    model, mask = config.model, config.mask
    shape = codecs.build(config.codec, config.data.image_size)
    numbers = sum(value.numel() for value in stored.tensors.values())
    names = class_names(stored)
    classes = f"{model.num_classes}: {', '.join(names[:50])}" if names else str(model.num_classes)
    hidden = f", {mask.ratio:.0%} of the tokens hidden ({mask.kind})" if mask.ratio else ""
    plugins = ", ".join(Path(plugin).name for plugin in config.plugins)
    return [
        ("network", f"{model.name or model.family}, {numbers:,} parameters"),
        ("images", f"{config.data.image_size} pixels"),
        ("space", f"{shape.describe()}, {' x '.join(map(str, shape.shape))}"),
        ("classes", classes if model.num_classes else "none"),
        ("noise", f"{config.process.schedule}, predicts {config.process.prediction}"),
        ("training", f"{config.objective.name}{hidden}"),
        ("images seen", f"{int(notes.get('images_seen', 0)):,}"),
        ("weights", notes.get("weights", "model")),
        ("data", Path(config.data.source).name),
        *([("plugins needed", plugins)] if plugins else []),
        ("SHA-256 of weights.safetensors", digest),
    ]


def class_names(stored: Stored) -> list[str]:
    """The classes' names, where they are known."""
    return [str(name) for name in json.loads(stored.notes.get("class_names", "[]"))]


def _score(weights: Path) -> str:
    """What the run measured of its samples, where it did."""
    try:
        best: dict[str, Any] = json.loads((weights.parent / "best.json").read_text())
        value, images = float(best["value"]), int(best["images"])
        return (
            f"## Score\n\nThe lowest distance that was measured while it trained is "
            f"{best['metric']} {value:.4f}, after {images:,} images."
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"| {what} | {_cell(value)} |" for what, value in rows]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
