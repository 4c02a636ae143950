"""The layouts of MDT's checkpoints (sail-sg/MDT): version 1 (branch mdtv1) and MDTv2."""

import re
import sys
from collections.abc import Mapping
from typing import Any

from msmdiff.core.backbones.layers import relative_index
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.registry import register
from msmdiff.core.samplers.papers import SAMPLINGS
from msmdiff.core.weights.dit import ENDS, adm_sections, ends_to_ours, ends_to_published, read_ends
from msmdiff.core.weights.layout import Network, Pairs, Tensors, count, mlp_ratio

PAIRS: Pairs = [
    *ENDS,
    ("sideblocks.", "side."),
    ("en_inblocks.", "in_blocks."),
    ("en_outblocks.", "out_blocks."),
    ("de_blocks.", "decoder."),
    (".rel_pos_bias.relative_position_bias_table", ".bias_table"),
]
INDEX = ".rel_pos_bias.relative_position_index"


HOLDS = frozenset({"mdt", "mdtv2"})


def matches(names: set[str]) -> bool:
    return "x_embedder.proj.weight" in names and any(
        name.startswith("sideblocks.") for name in names
    )


def describe(tensors: Tensors, given: Mapping[str, Any]) -> Network:
    shape, num_classes, fields = read_ends(tensors, given)
    side = tensors.get("sideblocks.0.attn.rel_pos_bias.relative_position_bias_table")
    if side is None:
        raise MsmdiffError(
            "an MDT checkpoint has a relative-position table in sideblocks.0, and this one has none"
        )
    fields["num_heads"] = side.shape[1]
    fields["mlp_ratio"] = mlp_ratio(
        {fields["hidden_size"]: len(tensors["sideblocks.0.mlp.fc1.bias"])}
    )
    if "en_inblocks.0.attn.qkv.weight" in tensors or "de_blocks.0.attn.qkv.weight" in tensors:
        decode = count(tensors, "de_blocks.")
        depth = 2 * count(tensors, "en_inblocks.") + decode
        return Network(
            "mdtv2", shape, num_classes, fields | {"depth": depth, "decode_layers": decode}
        )
    # Version 1's decoder has no keys of its own; every published script gives it two layers.
    decode = given.get("decode_layers", 2)
    return Network(
        "mdt",
        shape,
        num_classes,
        fields | {"depth": count(tensors, "blocks."), "decode_layers": decode},
    )


def to_ours(tensors: Tensors, network: Network) -> Tensors:
    return ends_to_ours({name: t for name, t in tensors.items() if not name.endswith(INDEX)}, PAIRS)


def to_published(tensors: Tensors, network: Network) -> Tensors:
    published = ends_to_published(tensors, network, PAIRS)
    _, height, width = network.shape
    index = relative_index(
        (height // network.fields["patch_size"], width // network.fields["patch_size"])
    )
    tables = [name for name in published if name.endswith("relative_position_bias_table")]
    return published | {re.sub(r"\.rel_pos_bias\..*", INDEX, name): index for name in tables}


def sections(network: Network, buffers: Tensors) -> dict[str, Any]:
    """Linear schedule with learned variance; MDTv2 weights its losses by min-SNR."""
    common = adm_sections(network, SAMPLINGS["mdtv2"])
    if network.family == "mdtv2":
        common["process"] |= {"weighting": "min_snr", "min_snr_gamma": 5.0}
    return common


register("layout", "mdt")(sys.modules[__name__])
