"""The layout of DiT's checkpoints (facebookresearch/DiT), and what MDT and EDT share with it."""

import sys
from collections.abc import Mapping
from typing import Any

from msmdiff.core.backbones import dit
from msmdiff.core.registry import register
from msmdiff.core.samplers.papers import SAMPLINGS
from msmdiff.core.weights.layout import (
    Network,
    Pairs,
    Tensors,
    count,
    has_null_class,
    heads,
    kernel_to_linear,
    latent_sections,
    linear_to_kernel,
    mlp_ratio,
    no_label_dropout,
    rename,
    reverse,
    side_of,
)

ENDS: Pairs = [
    ("x_embedder.proj.", "patch_embed."),
    ("t_embedder.mlp.", "time_embed."),
    ("y_embedder.embedding_table.", "label_emb."),
    ("final_layer.", "final."),
    (".adaLN_modulation.1.", ".modulation."),
]


HOLDS = frozenset({"dit"})


def matches(names: set[str]) -> bool:
    return "x_embedder.proj.weight" in names and not any(
        n.startswith(("sideblocks.", "down_blocks.")) for n in names
    )


def describe(tensors: Tensors, given: Mapping[str, Any]) -> Network:
    depth = count(tensors, "blocks.")
    shape, num_classes, fields = read_ends(tensors, given)
    width = fields["hidden_size"]
    fields |= {
        "depth": depth,
        "num_heads": heads(given, dit.SIZES.values(), width, depth, odd=False),
        "mlp_ratio": mlp_ratio({width: len(tensors["blocks.0.mlp.fc1.bias"])}),
    }
    return Network("dit", shape, num_classes, fields)


def to_ours(tensors: Tensors, network: Network) -> Tensors:
    return ends_to_ours(tensors, ENDS)


def to_published(tensors: Tensors, network: Network) -> Tensors:
    return ends_to_published(tensors, network, ENDS)


def sections(network: Network, buffers: Tensors) -> dict[str, Any]:
    """Linear schedule with learned variance; guided with strength 1.5 for the published FID."""
    return adm_sections(network, SAMPLINGS["dit"])


# ------------------------------------------------------------------ shared with MDT and EDT


def read_ends(
    tensors: Tensors, given: Mapping[str, Any]
) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
    """Input shape, classes, and the fields that the embeddings and the final layer tell."""
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    side = patch * side_of(tensors["pos_embed"].shape[1], "pos_embed")
    table = tensors.get("y_embedder.embedding_table.weight")
    out = len(tensors["final_layer.linear.bias"])
    fields = {
        "patch_size": patch,
        "hidden_size": width,
        "learn_sigma": out == 2 * channels * patch**2,
    }
    if table is None:
        return (channels, side, side), 0, fields
    fields["null_class"] = has_null_class(given, len(table))
    return (channels, side, side), len(table) - fields["null_class"], fields


def ends_to_ours(tensors: Tensors, pairs: Pairs) -> Tensors:
    ours = rename(tensors, pairs)
    return ours | {"patch_embed.weight": kernel_to_linear(ours["patch_embed.weight"])}


def ends_to_published(tensors: Tensors, network: Network, pairs: Pairs) -> Tensors:
    kernel = linear_to_kernel(tensors["patch_embed.weight"], network.fields["patch_size"])
    return rename(tensors | {"patch_embed.weight": kernel}, reverse(pairs))


def adm_sections(network: Network, preset: dict[str, Any]) -> dict[str, Any]:
    """What these networks were trained for, and the `sample` section they were sampled with.

    The scale is 1 where there is nothing to guide away from. A variance that is not learned is
    beta.
    """
    guided = network.num_classes and network.fields.get("null_class", True)
    common = latent_sections(network.shape) | no_label_dropout(network)
    common["process"] = {"schedule": "linear", "timesteps": 1000, "prediction": "eps"}
    return common | {"sample": preset | ({} if guided else {"cfg_scale": 1.0})}


register("layout", "dit")(sys.modules[__name__])
