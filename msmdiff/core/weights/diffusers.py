"""DiT as diffusers stores it: a folder that `DiTTransformer2DModel.from_pretrained` opens."""

from typing import Any

from msmdiff.core.errors import UsageError
from msmdiff.core.sections import ModelConfig
from msmdiff.core.weights.layout import Pairs, Tensors, linear_to_kernel, rename

TIME = "transformer_blocks.{}.norm1.emb.timestep_embedder."
LABEL = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
PAIRS: Pairs = [
    ("patch_embed.", "pos_embed.proj."),
    ("final.modulation.", "proj_out_1."),
    ("final.linear.", "proj_out_2."),
    ("blocks.", "transformer_blocks."),
    (".modulation.", ".norm1.linear."),
    (".attn.proj.", ".attn1.to_out.0."),
    (".attn.qkv.", ".attn1.to_qkv."),
    (".mlp.fc1.", ".ff.net.0.proj."),
    (".mlp.fc2.", ".ff.net.2."),
]

CAVEAT = (
    "diffusers spaces DiT's time frequencies over 127 steps where DiT has 128, so its outputs "
    "equal ours at t = 0 "
    "only; for equal ones at every t, set block.norm1.emb.time_proj.downscale_freq_shift = 0 on "
    "each transformer block"
)


def export(
    tensors: Tensors, model: ModelConfig, shape: tuple[int, int, int]
) -> tuple[dict[str, Any], Tensors]:
    """A DiT's tensors -> the content of `config.json`, and diffusers' state dict.

    diffusers keeps a copy of the time and label embeddings in every block. Raises UsageError for a
    network that its class cannot hold: another family, an unconditional one, another MLP ratio than
    4.
    """
    fields = model.model_dump()
    problem = ""
    if model.family != "dit":
        problem = f"model.family {model.family}"
    elif not model.num_classes:
        problem = "model.num_classes 0"
    elif not fields["null_class"]:
        problem = "model.null_class false"
    elif int(fields["hidden_size"] * fields["mlp_ratio"]) != 4 * fields["hidden_size"]:
        problem = f"model.mlp_ratio {fields['mlp_ratio']}"
    if problem:
        raise UsageError(
            f"--format diffusers holds class-conditional DiT with an MLP ratio of 4, not {problem}"
        )
    channels, side, _ = shape
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": fields["num_heads"],
        "attention_head_dim": fields["hidden_size"] // fields["num_heads"],
        "in_channels": channels,
        "out_channels": channels * (1 + fields["learn_sigma"]),
        "num_layers": fields["depth"],
        "sample_size": side,
        "patch_size": fields["patch_size"],
        "num_embeds_ada_norm": model.num_classes,
        "norm_eps": 1e-6,
    }
    state = rename({k: v for k, v in tensors.items() if k != "pos_embed"}, PAIRS)
    state["pos_embed.proj.weight"] = linear_to_kernel(
        state["pos_embed.proj.weight"], fields["patch_size"]
    )
    for name in [n for n in state if ".to_qkv." in n]:
        q, k, v = state.pop(name).chunk(3)
        state |= {
            name.replace("to_qkv", f"to_{part}"): t.clone()
            for part, t in (("q", q), ("k", k), ("v", v))
        }
    shared = {
        name: state.pop(name)
        for name in list(state)
        if name.startswith(("time_embed.", "label_emb."))
    }
    for i in range(fields["depth"]):
        for theirs, ours in (("linear_1", "time_embed.0"), ("linear_2", "time_embed.2")):
            for part in ("weight", "bias"):
                state[f"{TIME.format(i)}{theirs}.{part}"] = shared[f"{ours}.{part}"].clone()
        state[LABEL.format(i)] = shared["label_emb.weight"].clone()
    return config, state
