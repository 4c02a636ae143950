"""The layout of MaskDM's checkpoints (jiachenlei/maskdm), and of its older wavelet network."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msmdiff.core.diffusion.process import Process
from msmdiff.core.diffusion.schedules import cosine_betas, linear_betas
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.registry import register
from msmdiff.core.samplers.papers import SAMPLINGS
from msmdiff.core.weights.layout import (
    Network,
    Pairs,
    Tensors,
    kernel_to_linear,
    linear_to_kernel,
    rename,
    reverse,
    side_of,
)
from msmdiff.core.weights.uvit import read_blocks

PAIRS: Pairs = [
    ("encoder.patch_embed.proj.", "patch_embed."),
    ("encoder.approx_patch_embed.proj.", "patch_embed.approx."),
    ("encoder.detail_patch_embed.proj.", "patch_embed.detail."),
    ("encoder_to_output.", "to_output."),
    ("approx_to_output.", "to_output.approx."),
    ("detail_to_output.", "to_output.detail."),
    ("encoder.encoder_pos_embed", "pos_embed"),
    ("encoder.", ""),
]
BACK: Pairs = [
    ("patch_embed.approx.", "encoder.approx_patch_embed.proj."),
    ("patch_embed.detail.", "encoder.detail_patch_embed.proj."),
    ("to_output.approx.", "approx_to_output."),
    ("to_output.detail.", "detail_to_output."),
    *reverse(PAIRS),
]


HOLDS = frozenset({"uvit", "maskdwt"})


def matches(names: set[str]) -> bool:
    return bool({"encoder_to_output.weight", "approx_to_output.weight"} & names)


def describe(tensors: Tensors, given: Mapping[str, Any]) -> Network:
    wavelet = "approx_to_output.weight" in tensors
    kernel = tensors[
        "encoder.approx_patch_embed.proj.weight" if wavelet else "encoder.patch_embed.proj.weight"
    ]
    width, channels, patch, _ = kernel.shape
    fields = {"patch_size": patch, "hidden_size": width} | read_blocks(
        tensors, given, width, "encoder."
    )
    labels = tensors.get("encoder.label_emb.weight")
    num_classes = 0 if labels is None else len(labels)
    tokens = tensors["encoder.encoder_pos_embed"].shape[1] - (1 if labels is None else 2)
    if not wavelet:
        side = patch * side_of(tokens, "encoder_pos_embed")
        return Network("uvit", (channels, side, side), num_classes, fields)
    _, details, detail_patch, _ = tensors["encoder.detail_patch_embed.proj.weight"].shape
    scale = detail_patch // patch
    side = patch * side_of(tokens * scale**2 / (scale**2 + 1), "encoder_pos_embed")
    return Network(
        "maskdwt", (channels + details, side, side), num_classes, fields | {"detail_scale": scale}
    )


def to_ours(tensors: Tensors, network: Network) -> Tensors:
    ours = rename(tensors, PAIRS)
    for name in [n for n in ours if n.startswith("patch_embed.") and n.endswith("weight")]:
        ours[name] = kernel_to_linear(ours[name])
    if (null := ours.pop("uncond_embed", None)) is not None:
        ours["label_emb.weight"] = torch.cat([ours["label_emb.weight"], null.reshape(1, -1)])
    # There is no bias for the keys: it adds the same to all scores of a query, which softmax does
    # not see.
    for name in [n for n in ours if n.endswith("attn.q_bias")]:
        q = ours.pop(name)
        v = ours.pop(name.replace("q_bias", "v_bias"))
        ours[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return ours


def to_published(tensors: Tensors, network: Network) -> Tensors:
    tensors = dict(tensors)
    patch = network.fields["patch_size"]
    for name in [n for n in tensors if n.startswith("patch_embed.") and n.endswith("weight")]:
        scale = network.fields["detail_scale"] if ".detail." in name else 1
        tensors[name] = linear_to_kernel(tensors[name], patch * scale)
    if "label_emb.weight" in tensors:
        table = tensors["label_emb.weight"]
        tensors |= {"label_emb.weight": table[:-1].clone(), "uncond_embed": table[-1:].clone()}
    for name in [n for n in tensors if n.endswith("attn.qkv.bias")]:
        q, _, v = tensors.pop(name).chunk(3)
        tensors |= {
            name.replace("qkv.bias", "q_bias"): q.clone(),
            name.replace("qkv.bias", "v_bias"): v.clone(),
        }
    return rename(tensors, BACK)


def sections(network: Network, buffers: Tensors) -> dict[str, Any]:
    """The schedule is the one of the buffers beside the network; a bare state dict is taken for
    cosine.
    """
    _, _, side = network.shape
    if network.family == "maskdwt":
        # Coefficients of an image in 0..1, the approximation mapped by 2v - 1; ours are of an image
        # in -1..1.
        codec = {
            "name": "dwt",
            "wavelet": "haar",
            "level": 1,
            "mean": [-1.0, 0.0, 0.0, 0.0],
            "std": [1.0, 2.0, 2.0, 2.0],
        }
        data = {"image_size": 2 * side}
    else:
        codec, data = {"name": "pixel"}, {"image_size": side}
    schedule, timesteps = _schedule(buffers.get("betas"))
    process = {"schedule": schedule, "timesteps": timesteps, "prediction": "eps"}
    return {"data": data, "codec": codec, "process": process, "sample": SAMPLINGS["maskdm"]}


def file_content(state: Tensors, process: Process) -> dict[str, Any]:
    """The file around a network's keys. Raises UsageError for a schedule without betas."""
    return checkpoint(state, process.table("MaskDM's layout").alpha_bar)


def checkpoint(state: Tensors, alpha_bar: Tensor) -> dict[str, Any]:
    """The file around a network's keys: MaskDM's training code reads `model`, its evaluation `ema`
    and the buffers.

    alpha_bar [T + 1] float64 is `Table.alpha_bar`, from 1 at the clean image on.
    """
    now, before = alpha_bar[1:], alpha_bar[:-1]
    alphas = now / before
    betas = 1 - alphas
    variance = betas * (1 - before) / (1 - now)
    buffers = {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": now,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": now.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - now).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - now).log(),
        "sqrt_recip_alphas_cumprod": now.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / now - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - now),
        "posterior_mean_coef2": (1 - before) * alphas.sqrt() / (1 - now),
    }
    model = {f"model.{k}": v for k, v in state.items()} | {k: v.float() for k, v in buffers.items()}
    copies = {
        f"{place}.{k}": v for place in ("online_model", "ema_model") for k, v in model.items()
    }
    ema = {"initted": torch.tensor(True), "step": torch.tensor(0), **copies}
    return {"step": 0, "model": model, "ema": ema, "scaler": None}


def _schedule(betas: Tensor | None) -> tuple[str, int]:
    if betas is None:
        return "cosine", 1000
    for name, function in (("cosine", cosine_betas), ("linear", linear_betas)):
        if torch.allclose(
            betas.double(), torch.from_numpy(function(len(betas))), rtol=1e-4, atol=1e-7
        ):
            return name, len(betas)
    raise MsmdiffError("its noise schedule (betas) is neither MaskDM's cosine nor its linear one")


register("layout", "maskdm")(sys.modules[__name__])
