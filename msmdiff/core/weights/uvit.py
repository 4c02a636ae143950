"""The layout of U-ViT's checkpoints (baofff/U-ViT), image and text-to-image."""

import sys
from collections.abc import Mapping
from typing import Any

from msmdiff.core.backbones import maskdwt, uvit
from msmdiff.core.registry import register
from msmdiff.core.samplers.papers import SAMPLINGS
from msmdiff.core.weights.layout import (
    PIXELS,
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

PAIRS: Pairs = [
    ("patch_embed.proj.", "patch_embed."),
    ("decoder_pred.", "to_output."),
    ("final_layer.", "final_conv."),
]


HOLDS = frozenset({"uvit"})


def matches(names: set[str]) -> bool:
    return "decoder_pred.weight" in names


def describe(tensors: Tensors, given: Mapping[str, Any]) -> Network:
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    fields = {"patch_size": patch, "hidden_size": width} | read_blocks(tensors, given, width)
    fields["final_conv"] = "final_layer.weight" in tensors
    # Without out-blocks there is nothing to skip to.
    fields["skip"] = (
        count(tensors, "out_blocks.") == 0 or "out_blocks.0.skip_linear.weight" in tensors
    )
    extras, num_classes = 1, 0
    if "label_emb.weight" in tensors:
        rows = len(tensors["label_emb.weight"])
        fields["null_class"] = has_null_class(given, rows)
        extras, num_classes = 2, rows - fields["null_class"]
    if "context_embed.weight" in tensors:
        fields["context_width"] = tensors["context_embed.weight"].shape[1]
        fields["context_tokens"] = given.get("context_tokens", 77)
        extras += fields["context_tokens"]
    side = patch * side_of(tensors["pos_embed"].shape[1] - extras, "pos_embed")
    return Network("uvit", (channels, side, side), num_classes, fields)


def to_ours(tensors: Tensors, network: Network) -> Tensors:
    ours = rename(tensors, PAIRS)
    return ours | {"patch_embed.weight": kernel_to_linear(ours["patch_embed.weight"])}


def to_published(tensors: Tensors, network: Network) -> Tensors:
    kernel = linear_to_kernel(tensors["patch_embed.weight"], network.fields["patch_size"])
    return rename(tensors | {"patch_embed.weight": kernel}, reverse(PAIRS))


def sections(network: Network, buffers: Tensors) -> dict[str, Any]:
    """Text-to-image and the latent models without a convolution (huge) are discrete, all others
    continuous in time.
    """
    text = bool(network.fields.get("context_tokens"))
    latent = network.shape[0] != PIXELS
    discrete = text or (latent and not network.fields["final_conv"])
    common = latent_sections(network.shape)
    if text:
        common["codec"]["scale"] = 0.2301
    common["process"] = {"schedule": "scaled_linear" if discrete else "vp_sde", "prediction": "eps"}
    common |= no_label_dropout(network)
    # The 512-pixel models (patch 4) use another scale than the 256-pixel ones.
    preset = SAMPLINGS[
        "uvit-t2i" if text else "uvit-512" if network.fields["patch_size"] == 4 else "uvit"
    ]
    scale = preset["cfg_scale"] if latent and (text or network.num_classes) else 1.0
    return common | {
        "sample": (preset if discrete else SAMPLINGS["uvit-continuous"]) | {"cfg_scale": scale}
    }


def read_blocks(
    tensors: Tensors, given: Mapping[str, Any], width: int, prefix: str = ""
) -> dict[str, Any]:
    """The fields that blocks tell. MaskDM has the same blocks behind a prefix, but for the name of
    its biases.
    """
    depth = 2 * count(tensors, f"{prefix}in_blocks.") + 1
    sizes = [*uvit.SIZES.values(), *maskdwt.SIZES.values()]
    return {
        "depth": depth,
        "num_heads": heads(given, sizes, width, depth, odd=True),
        "mlp_ratio": mlp_ratio({width: len(tensors[f"{prefix}mid_block.mlp.fc1.bias"])}),
        "mlp_time_embed": f"{prefix}time_embed.0.weight" in tensors,
        "qkv_bias": any(
            f"{prefix}mid_block.attn.{name}" in tensors for name in ("qkv.bias", "q_bias")
        ),
    }


register("layout", "uvit")(sys.modules[__name__])
