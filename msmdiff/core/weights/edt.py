"""The layout of EDT's checkpoints (xinwangChen/EDT)."""

import sys
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from msmdiff.core.backbones import edt
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.registry import register
from msmdiff.core.samplers.papers import SAMPLINGS
from msmdiff.core.weights.dit import ENDS, adm_sections, ends_to_ours, ends_to_published, read_ends
from msmdiff.core.weights.layout import Network, Pairs, Tensors, count, mlp_ratio

PAIRS: Pairs = [
    *ENDS,
    ("down_blocks.", "down."),
    ("up_blocks.", "up."),
    ("concat_blocks.", "fuse."),
    (".rel_pos_bias.relative_position_bias_table", ".bias_table"),
]
TABLE = "attn.rel_pos_bias.relative_position_bias_table"


HOLDS = frozenset({"edt"})


def matches(names: set[str]) -> bool:
    return "down_blocks.0.reduction.weight" in names


def describe(tensors: Tensors, given: Mapping[str, Any]) -> Network:
    """Stage depths come from the blocks' widths and tables: the published table does not fit the
    published figures.
    """
    shape, num_classes, fields = read_ends(tensors, given)
    tables = [tensors.get(f"blocks.{i}.{TABLE}") for i in range(count(tensors, "blocks."))]
    if any(table is None for table in tables):
        raise MsmdiffError(
            "an EDT checkpoint has a relative-position table in every block, and this "
            "one lacks some"
        )
    stages = [list(group) for _, group in groupby(tables, key=lambda table: table.shape)]  # type: ignore[union-attr]
    if len(stages) != 5:
        raise MsmdiffError(
            "an EDT checkpoint has five stages, and this one's relative-position tables form "
            f"{len(stages)}"
        )
    depths = [len(stage) for stage in stages]
    starts = [sum(depths[:i]) for i in range(5)]
    widths = [len(tensors[f"blocks.{i}.attn.proj.bias"]) for i in starts]
    fields |= {
        "stage_widths": widths,
        "stage_depths": depths,
        "stage_heads": [stage[0].shape[1] for stage in stages],  # type: ignore[union-attr]
        "mlp_ratio": mlp_ratio(
            {widths[s]: len(tensors[f"blocks.{i}.mlp.fc1.bias"]) for s, i in enumerate(starts)}
        ),
        # XL is the size with this mask, and the only one with so many blocks in its first stage.
        "mid_mask": depths[0] > edt.MID_BLOCK,
        "amm": "default" if sum(depths) in edt.EDT.AMM else "off",
    }
    return Network("edt", shape, num_classes, fields)


def to_ours(tensors: Tensors, network: Network) -> Tensors:
    return ends_to_ours(tensors, PAIRS + _numbering(network))


def to_published(tensors: Tensors, network: Network) -> Tensors:
    return ends_to_published(tensors, network, PAIRS + _numbering(network))


def sections(network: Network, buffers: Tensors) -> dict[str, Any]:
    """Linear schedule with learned variance, min-SNR weights; strength 4 as in the published image
    generator.
    """
    known = network.fields["amm"] == "default"  # else the authors chose no blocks for this depth
    common = adm_sections(network, SAMPLINGS["edt"] | ({} if known else {"amm": None}))
    common["process"] |= {"weighting": "min_snr", "min_snr_gamma": 5.0}
    return common


def _numbering(network: Network) -> Pairs:
    """Block numbers run on through the stages."""
    places = [
        (s, j) for s, depth in enumerate(network.fields["stage_depths"]) for j in range(depth)
    ]
    return [(f"blocks.{i}.", f"stages.{s}.{j}.") for i, (s, j) in enumerate(places)]


register("layout", "edt")(sys.modules[__name__])
