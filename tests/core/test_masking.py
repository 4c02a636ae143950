import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msmdiff.core import config as configuration
from msmdiff.core.config import section
from msmdiff.core.diffusion import masking
from msmdiff.core.diffusion.masking import BlockMask, CropMask, PatchMask, build
from msmdiff.core.errors import UsageError
from msmdiff.core.seeding import stream


def draw(mask, batch=16, position=0):
    return mask.draw(batch, stream("cpu", 0, "mask", position))


KINDS = {
    "patch": (PatchMask, "rounding"),
    "block": (BlockMask, "block"),
    "crop": (CropMask, "crop"),
}


def made(grid, ratio, kind, **options):
    """A mask of a kind, with the one of the options that is its own."""
    mask, own = KINDS[kind]
    return mask(grid, ratio, **({own: options[own]} if own in options else {}))


def test_counts_equal_the_published_ones(golden):
    table = json.loads((golden / "masks" / "case.json").read_text())["table"]
    checked = 0
    for values in table["rows"]:
        row = dict(zip(table["columns"], values, strict=True))
        side = row["grid_side"]
        mask = made(
            (side, side),
            row["ratio"] or 0.0,
            row["type"],
            block=row["block_size"] or 1,
            crop=row["crop_size"],
            rounding="floor",
        )
        assert mask.tokens - mask.kept == row["masked_tokens"], row
        assert mask.effective_ratio == pytest.approx(row["masked_fraction"]), row
        keep = draw(mask, 3)
        assert (side**2 if keep is None else keep.shape[1]) == mask.kept, row
        checked += 1
    assert checked == len(table["rows"]) > 0


@given(
    side=st.sampled_from([4, 6, 8, 16]),
    ratio=st.floats(0, 0.999),
    kind=st.sampled_from(["patch", "block", "crop"]),
    rounding=st.sampled_from(["nearest", "floor"]),
)
def test_ids_are_valid_distinct_and_ascending(side, ratio, kind, rounding):
    mask = made((side, side), ratio, kind, block=2, rounding=rounding)
    keep = draw(mask)
    if keep is None:
        assert mask.kept == side**2
        return
    assert keep.shape == (16, mask.kept)
    assert keep.min() >= 0
    assert keep.max() < side**2
    assert (keep.diff(dim=1) > 0).all()


def test_default_rounding_is_to_the_nearest_and_keeps_one():
    assert PatchMask((8, 8), 0.9).kept == 6
    assert PatchMask((8, 8), 0.999).kept == 1
    assert draw(PatchMask((8, 8), 0.0)) is None
    assert build(section("mask", kind="block"), (7, 7)).kept == 49


def test_blocks_are_whole_and_aligned():
    keep = draw(BlockMask((16, 16), 0.75, block=4))
    for row in keep:
        blocks = {(int(i) // 16 // 4, int(i) % 16 // 4) for i in row}
        assert len(blocks) * 16 == len(row)


def test_crop_is_one_window_at_varying_places():
    mask = CropMask((16, 12), 0.9, crop=5)
    keep = draw(mask, 200)
    rows, columns = keep // 12, keep % 12
    assert ((rows.amax(1) - rows.amin(1)) == 4).all()
    assert ((columns.amax(1) - columns.amin(1)) == 4).all()
    assert set(rows.amin(1).tolist()) == set(range(12))
    assert set(columns.amin(1).tolist()) == set(range(8))


def test_every_token_is_kept_equally_often_and_streams_repeat():
    mask = PatchMask((8, 8), 0.75)
    keep = torch.cat([draw(mask, 100, i) for i in range(100)])
    counts = torch.bincount(keep.flatten(), minlength=64)
    assert (counts - 2500).abs().max() < 250
    assert torch.equal(draw(mask, 8, 3), draw(mask, 8, 3))
    assert not torch.equal(draw(mask, 8, 3), draw(mask, 8, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ratio=0.5, kind="block", block=5), r"mask.block 5 does not divide .*\[1, 2, 4, 8\]"),
        (dict(ratio=0.5, kind="crop", crop=9), "mask.crop 9 is larger than the 8x8"),
    ],
)
def test_impossible_masks_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        made((8, 8), **arguments)


def section_of(**mask):
    return configuration.build({"mask": mask}).mask


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (dict(ratio=0.9), [(0, 0.9)]),
        (dict(ratio=0.9, tail=0.2), [(0, 0.9), (0.8, 0)]),
        (
            dict(ratio=0.9, schedule="linear", final_ratio=0.3, levels=3),
            [(0, 0.9), (1 / 3, 0.6), (2 / 3, 0.3)],
        ),
        (
            dict(ratio=0.8, schedule="cosine", levels=3, tail=0.25),
            [(0, 0.8), (0.25, 0.4), (0.5, 0), (0.75, 0)],
        ),
        (
            dict(ratio=0.9, schedule="steps", stages=[[0, 0.9], [0.5, 0.75]], tail=0.4),
            [(0, 0.9), (0.5, 0.75), (0.6, 0)],
        ),
    ],
)
def test_the_ratio_over_a_training(mask, expected):
    got = masking.over_training(section_of(**mask))
    assert len(got) == len(expected)
    for (start, ratio), (start_wanted, ratio_wanted) in zip(got, expected, strict=True):
        assert start == pytest.approx(start_wanted)
        assert ratio == pytest.approx(ratio_wanted, abs=1e-12)


@pytest.mark.parametrize("stages", [None, [], [[0.1, 0.5]], [[0, 0.5], [0, 0.2]], [[0, 1.5]]])
def test_stages_that_do_not_rise_are_refused(stages):
    with pytest.raises(UsageError, match=r"mask.stages .* must be pairs"):
        masking.over_training(section_of(ratio=0.5, schedule="steps", stages=stages))
