"""One page about one or several runs: a single HTML file that loads nothing."""

import base64
import html
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

import msmdiff
from msmdiff.core import config as configuration
from msmdiff.core import files
from msmdiff.core.config import Config
from msmdiff.core.diffusion.coverage import is_primer
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.report import expected
from msmdiff.core.report.charts import chart, short
from msmdiff.core.report.expected import Expected
from msmdiff.core.training import checkpoint, results
from msmdiff.core.training.run import Run
from msmdiff.core.training.validation import EDGES

MOST_BYTES = 2_500_000
"""Of all pictures in the page, as text."""
MADE_BY = b'<meta name="generator" content="msmdiff report">'
"""Stands in the page, which by it is known for one that may be replaced."""
SIDE = 640
"""The width to which pictures are reduced."""


@dataclass
class Told:
    """What is known of a run.

    Attributes:
        path, config, lines: its directory, configuration and log.
        circumstances: its `run.json`.
    """

    path: Path
    config: Config
    lines: list[dict[str, Any]]
    circumstances: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read(path: Path) -> Told:
    """A run's directory. Raises UsageError where there is none."""
    run = Run(path, writes=False)
    config = run.stored_config()
    if config is None:
        raise UsageError(f"{path} is no run: it has no config.yaml and no checkpoint")
    circumstances: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        found = json.loads((path / "run.json").read_text(encoding="utf-8"))
        circumstances = found if isinstance(found, dict) else {}
    return Told(path, config, run.metrics(), circumstances)


def write(paths: Sequence[Path], out: Path, expect: Sequence[Expected] = ()) -> int:
    """The page of some runs, with curves to expect behind theirs; returns its bytes. Without such
    curves those of a preset with the same settings are taken.

    Raises UsageError for what is no run, and MsmdiffError where it cannot be written.
    """
    runs = [read(path) for path in paths]
    share = MOST_BYTES // max(1, len(runs))
    body = [
        f"<h1>{html.escape(', '.join(run.name for run in runs))}</h1>",
        _summary(runs),
        f'<section class="charts">{_charts(runs, expect or _expected(runs))}</section>',
        *(_pictures(run, share) for run in runs),
        _settings(runs),
        *(_about(run) for run in runs),
    ]
    title = html.escape(", ".join(run.name for run in runs))
    empty = (resources.files("msmdiff.core.report") / "page.html").read_text(encoding="utf-8")
    page = empty.replace("{{title}}", title).replace("{{body}}", "\n".join(body))
    files.write_text(out, page)
    return len(page.encode())


def store(path: Path, out: Path) -> None:
    """Store a run's curves, to be drawn behind others.

    Raises UsageError for what is no run, and MsmdiffError where they cannot be written.
    """
    run = read(path)
    known = {"msmdiff": msmdiff.__version__, **run.circumstances}
    said = [f"{key} {known[key]}" for key in ("msmdiff", "torch") if known.get(key)]
    said += [f"on {known['device']}"] if known.get("device") else []
    said += [f"with seed {run.config.train.seed}"]
    expected.write(out, run.name, run.config, run.lines, ", ".join(said))


def ours(path: Path) -> bool:
    """Whether `write` made a page."""
    try:
        return MADE_BY in files.beginning(path, 100_000)
    except MsmdiffError:
        return False


# ------------------------------------------------------------------ parts of the page


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


class _Command(str):
    """A cell that is a command, of which no word is broken."""


def _cell(value: Any) -> str:
    if not isinstance(value, _Command):
        return html.escape(str(value))
    words = " ".join(f"<span>{html.escape(word)}</span>" for word in value.split())
    return f"<code>{words}</code>"


def _summary(runs: Sequence[Told]) -> str:
    rows = []
    for run in runs:
        each = results.standing(run.path)
        if each is None:
            continue
        figures = [each.loss, each.heldout, each.distance]
        shown = ["-" if value is None else f"{value:.4f}" for value in figures]
        rows.append(
            [run.name, run.config.model.name or run.config.model.family,
             f"{each.steps:,} of {each.of:,}", *shown, f"{each.bytes / 2**20:,.1f}"]
        )  # fmt: skip
    header = ["run", "network", "steps", "loss", "held-out loss", "distance", "MiB"]
    note = "; ".join(f"{run.name}: {results.meaning(run.config)}" for run in runs)
    return (
        _table(header, rows)
        + f"<p>Training losses: {html.escape(note)}. They compare only where these words are the "
        "same; held-out losses compare within one space.</p>"
    )


def _points(run: Told, key: str) -> expected.Curve:
    return expected.curve(run.lines, key)


def _expected(runs: Sequence[Told]) -> list[Expected]:
    found = [expected.of(run.config) for run in runs]
    return list({each.name: each for each in found if each is not None}.values())


def _charts(runs: Sequence[Told], expect: Sequence[Expected]) -> str:
    def of_all(key: str) -> dict[str, expected.Curve]:
        return {run.name: _points(run, key) for run in runs}

    ways = [expected.measured_as(run.lines) for run in runs]

    def behind(key: str) -> dict[str, expected.Curve]:
        """Of distances, only those that were measured in the same way."""
        told = [each for each in expect if "loss" in key or each.measured_as in ways]
        return {f"expected: {each.name}": each.curves.get(key, []) for each in told}

    found = [
        chart("training loss", of_all("loss"), log=True, behind=behind("loss")),
        chart(
            "held-out loss, mean over noise levels",
            of_all("val_loss"),
            log=True,
            behind=behind("val_loss"),
        ),
    ]
    for run in runs:
        bins = {
            f"log-SNR {low:g} to {high:g}": _points(run, f"val_loss_{number}")
            for number, (low, high) in enumerate(pairwise(EDGES))
        }
        found.append(chart(f"{run.name}: held-out loss by noise level", bins, log=True))
    metrics = {results.distance_key(run.lines) for run in runs} - {None}
    for metric in sorted(str(name) for name in metrics):
        found.append(chart(f"{metric} of samples", of_all(metric), behind=behind(metric)))
    found.append(chart("images per second", of_all("images_per_s")))
    found.append(chart("learning rate", of_all("lr")))
    told = "".join(
        f"<p>Dashed: {html.escape(each.name)}, {html.escape(each.told)}.</p>" for each in expect
    )
    return "".join(found) + told


def _pictures(run: Told, budget: int) -> str:
    """Previews over time, with a slider each for samples and for what a mask leaves."""
    parts = []
    for kind, title in (("samples", "samples"), ("masked", "what the masked network sees")):
        paths = sorted((run.path / "previews").glob(f"img-*-{kind}.png"))
        shown = _chosen(paths, budget // 2)
        if not shown:
            continue
        images = "".join(
            f'<img alt="{title} after {short(seen)} images" data-seen="{seen:,}" src="{source}"'
            f"{'' if i == len(shown) - 1 else ' hidden'}>"
            for i, (seen, source) in enumerate(shown)
        )
        last = len(shown) - 1
        parts.append(
            f'<figure class="over-time"><figcaption>{html.escape(run.name)}: {title}, image '
            f"<output>{shown[-1][0]:,}</output></figcaption>"
            f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{title}">{images}'
            "</figure>"
        )
    return f"<section>{''.join(parts)}</section>" if parts else ""


def _chosen(paths: Sequence[Path], budget: int) -> list[tuple[int, str]]:
    """(images seen, picture as a data address) of as many pictures as fit, evenly in time."""
    encoded: list[tuple[int, str]] = []
    for path in paths:
        with suppress(MsmdiffError, ValueError), files.reading(path, "a picture"):
            encoded.append((int(path.name.split("-")[1]), _encoded(path)))
    while len(encoded) > 2 and sum(len(source) for _, source in encoded) > budget:
        encoded = [*encoded[:-1:2], encoded[-1]]
    return encoded


def _encoded(path: Path) -> str:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if picture.width > SIDE:
        size = (SIDE, round(picture.height * SIDE / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _settings(runs: Sequence[Told]) -> str:
    """The configuration; of several runs, what differs between them first."""
    flat = [configuration.flatten(run.config.as_dict()) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    differing = [k for k in keys if len({json.dumps(f.get(k), default=str) for f in flat}) > 1]
    parts = []
    if len(runs) > 1:
        rows = [[key, *(_value(each.get(key)) for each in flat)] for key in differing]
        header = ["key", *(run.name for run in runs)]
        parts.append("<h2>What differs</h2>" + _table(header, rows))
    same = [[key, _value(flat[0].get(key))] for key in keys if key not in differing]
    parts.append(
        f"<details><summary>Configuration{' that is the same' if len(runs) > 1 else ''}</summary>"
        f"{_table(['key', 'value'], same)}</details>"
    )
    return f"<section>{''.join(parts)}</section>"


def _value(value: Any) -> str:
    """As YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _about(run: Told) -> str:
    """The machine, what was changed, the checkpoints, and commands to go on with."""
    known = run.circumstances
    keys = ("command", "started", "msmdiff", "git", "torch", "python", "machine", "device")
    rows = [[key, known[key]] for key in keys if known.get(key)]
    if known.get("command"):
        rows[0][1] = _Command(known["command"])
    for change in known.get("changes") or []:
        told = f"{change['key']} to {change['new']} from image {change['images']} on"
        rows.append(["changed", told])
    saved = ", ".join(path.name for path in checkpoint.complete(run.path)) or "none"
    rows.append(["checkpoints", saved])
    place = run.path
    following = (
        f"msmdiff finetune --ckpt {place} --run {run.name}-tuned"
        if is_primer(run.config)
        else f"msmdiff sample {place} --n 100"
    )
    rows += [["next", _Command(following)], ["resume", f"--run {place}, with the same command"]]
    return f"<section><h2>{html.escape(run.name)}</h2>{_table(['what', 'value'], rows)}</section>"
