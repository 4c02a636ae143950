"""The picture beside the numbers: samples next to the references nearest to them."""

from collections.abc import Sequence
from pathlib import Path

from msmdiff.core import figure_files
from msmdiff.core.metrics.evaluate import Pass
from msmdiff.core.metrics.inputs import Images
from msmdiff.core.metrics.prdc import nearest
from msmdiff.core.metrics.scores import Score

MADE_BY = "msmdiff fid"
"""Stands in the PNG, which by it is known for one that may be replaced."""


def save(
    path: Path,
    a: Images,
    b: Images,
    each: Pass,
    scores: Sequence[Score],
    rows: int = 8,
    columns: int = 5,
) -> None:
    """Write a PNG of the samples that lie nearest to any reference, each with its nearest ones and
    their distances.

    Memorised images come first. Distances are Euclidean, over the features of the pass; the scores
    stand above.
    """
    from matplotlib.figure import Figure

    one, two = each.sets[0].rows, each.sets[-1].rows
    assert one is not None  # with `keep_rows`, `evaluate` refuses statistics alone
    assert two is not None
    squares, where = nearest(one, two, columns, each.features.device)
    chosen = squares[:, 0].argsort()[:rows].tolist()
    # Row i of the features is the i-th image that could be read.
    good_a, good_b = ([i for i in range(len(x)) if i not in x.bad] for x in (a, b))
    figure = Figure(
        figsize=(1.3 * (where.shape[1] + 1), 1.5 * len(chosen) + 1), layout="constrained"
    )
    axes = figure.subplots(len(chosen), where.shape[1] + 1, squeeze=False)
    for line, sample in zip(axes, chosen, strict=True):
        found = zip(where[sample].tolist(), squares[sample].sqrt().tolist(), strict=True)
        shown = [
            (a, good_a[sample], f"sample {good_a[sample]}"),
            *((b, good_b[i], f"{d:.3g}") for i, d in found),
        ]
        for axis, (images, index, title) in zip(line, shown, strict=True):
            axis.imshow(
                next(images.batches([index], 1))[0].permute(1, 2, 0).numpy(),
                interpolation="nearest",
            )
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    named = [f"{s.name} {s.value:.4g}" for s in scores]
    lines = [
        f"{a.spec} and its nearest in {b.spec}",
        *(", ".join(named[i : i + 4]) for i in range(0, len(named), 4)),
    ]
    figure.suptitle("\n".join(lines), fontsize=9)
    figure_files.save(figure, path, 110, MADE_BY)


def ours(path: Path) -> bool:
    """Whether `save` made a picture."""
    return figure_files.ours(path, MADE_BY)
