"""`bench tables`: the networks of the papers on the device at hand, as a table for a page."""

import gc
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import files, presets
from msmdiff.core.bench import timing
from msmdiff.core.bench.training import Training, summed_up
from msmdiff.core.errors import UsageError
from msmdiff.core.training import memory
from msmdiff.core.training.meter import forget_peak, peak_memory

BEGIN, END = "<!-- msmdiff bench tables: begin -->", "<!-- msmdiff bench tables: end -->"
"""Lines of a page between which the tables stand."""


@dataclass(frozen=True)
class Row:
    """A training to time: a preset, its batch, and keys of `train` besides."""

    preset: str
    batch: int
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        said = "".join(f", {name}={value}".lower() for name, value in self.train.items())
        return f"{self.preset}, batch {self.batch}{said}"


COMPILED = {"compile": True}
LARGE = [
    Row("dit-xl", 64),
    Row("dit-xl", 64, COMPILED),
    Row("dit-xl", 256, COMPILED),
    Row("dit-xl-tread", 64, COMPILED),
    Row("uvit-imagenet256-h", 64, {**COMPILED, "gradient_checkpointing": False}),
    Row("uvit-imagenet256-h", 128, {**COMPILED, "gradient_checkpointing": True}),
    Row("mdtv2-xl", 64, COMPILED),
    Row("edt-xl", 64, COMPILED),
    Row("maskdm-celebahq-90p", 64, COMPILED),
    Row("maskdm-celebahq-finetune", 64, COMPILED),
]
"""What a GPU is measured on."""

SMALL = [Row("dit-s", 8), Row("uvit-cifar10", 8), Row("digits-finetune", 128)]
"""What a CPU is."""


@dataclass
class Measured:
    """A row, measured.

    Attributes:
        title: of the row.
        kept, tokens: what the network sees of an image.
        ms, low, high: median, least and most of a step.
        images_per_s: from the median.
        tflops, of_peak: 10^12 counted operations a second, and their share of a large product's.
        first_step_s: from an idle process to the end of the first step, compiling included.
        peak_gib, estimated_gib: memory.
    """

    title: str
    kept: int
    tokens: int
    ms: float
    low: float
    high: float
    images_per_s: float
    tflops: float
    of_peak: float
    first_step_s: float
    peak_gib: float
    estimated_gib: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rows(device: torch.device, only: Collection[str] = ()) -> list[Row]:
    """What to measure on a device: everything, or some presets' rows.

    Raises UsageError for a preset that has none.
    """
    every = LARGE if device.type == "cuda" else SMALL
    known = list(dict.fromkeys(row.preset for row in every))
    if unknown := sorted(set(only) - set(known)):
        raise UsageError(
            f"--only {unknown[0]}: there is no such row on this device; give some of "
            f"{', '.join(known)}"
        )
    return [row for row in every if not only or row.preset in only]


def measure(wanted: list[Row], device: torch.device, steps: int = 15) -> Iterator[Measured]:
    """Time each row in turn, in bf16; the memory of one is free before the next."""
    peak = timing.matmul_peak(device, torch.bfloat16)
    for row in wanted:
        layer = {"train": {"batch_size": row.batch, "precision": "bf16", **row.train}}
        chosen = configuration.build(presets.read(row.preset), layer)
        yield _measured(row, road.resolve(chosen, data_classes=10), device, peak, steps)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(row: Row, config: Any, device: torch.device, peak: float, steps: int) -> Measured:
    estimated = memory.estimate(config, device=device.type).total
    forget_peak(device)
    made: list[Training] = []

    def begin() -> None:
        made.append(Training(config))
        made[0]()

    (first,) = timing.each_second(begin, device, steps=1, warmup=0)
    seconds = sorted(timing.each_second(made[0], device, steps, warmup=2))
    found = summed_up(made[0], seconds[len(seconds) // 2], peak)
    return Measured(
        title=row.title,
        kept=found.kept,
        tokens=found.tokens,
        ms=found.ms_per_step,
        low=1000 * seconds[0],
        high=1000 * seconds[-1],
        images_per_s=found.images_per_s,
        tflops=found.flops_per_s / 1e12,
        of_peak=found.peak_fraction,
        first_step_s=first,
        peak_gib=peak_memory(device) / 2**30,
        estimated_gib=estimated / 2**30,
    )


def markdown(measured: list[Measured], machine: str) -> str:
    """The table, under a line that says what it was measured on."""
    lines = [
        f"{machine}, bf16, {date.today():%d %B %Y}; ms a step, median (least to most); memory "
        "measured / estimated.",
        "",
        "| training | tokens | ms | images/s | TFLOP/s | of peak | first step, s | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {m.title} | {m.kept} of {m.tokens} | {m.ms:,.1f} ({m.low:,.1f} to {m.high:,.1f}) "
        f"| {m.images_per_s:,.0f} | {m.tflops:,.1f} | {m.of_peak:.0%} | {m.first_step_s:.1f} "
        f"| {m.peak_gib:.1f} / {m.estimated_gib:.1f} |"
        for m in measured
    ]
    return "\n".join(lines) + "\n"


def write(page: Path, text: str) -> None:
    """Put the tables between a page's two marks. Raises UsageError where they are not."""
    files.require_regular(page)
    with files.reading(page, "a page in UTF-8"):
        whole = page.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{page} has no place for tables: a line {BEGIN} and, below it, {END}")
    changed = f"{before}{begin}\n\n{text}\n{end}{after}"
    files.write_text(page, changed)
