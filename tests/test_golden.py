"""Every call of the golden data: outputs, losses and gradients of the published code, from its own
checkpoints.

MSMDIFF_GOLDEN names the folder (default ../shared/golden, beside the repository).
"""

import gzip
import json
import math
from collections.abc import Callable
from typing import Any

import golden_metrics
import golden_sampling
import pytest
import torch
from golden import FOLDER, Case, cases, compare, compare_norms, gradients
from torch import Tensor

from msmdiff.core import backbones
from msmdiff.core.backbones.edt import TokenMasks
from msmdiff.core.backbones.layers import amm_matrix, gather_tokens, patchify
from msmdiff.core.backbones.maskdwt import PairRoute
from msmdiff.core.backbones.routes import Route
from msmdiff.core.condition import Classes, Condition, Text, Unconditional
from msmdiff.core.config import section
from msmdiff.core.diffusion import codecs, masking, process, time_sampling, variational
from msmdiff.core.diffusion.masking import BlockMask, CropMask, PatchMask, mdt_kept
from msmdiff.core.diffusion.objectives import Objective
from msmdiff.core.diffusion.schedules import Table, linear_betas
from msmdiff.core.samplers.guidance import Guided, power_cosine
from msmdiff.core.sections import ModelConfig
from msmdiff.core.training import optim
from msmdiff.core.weights import published

Outputs = dict[str, Tensor]

# What a call may set beside its tensors; another word would mean something that no runner here
# does. The local and enable_ switches are implied by amm_blocks and by the tensors given; EDT's
# enable_input_mask never did anything.
SCALARS = {
    "first_samples",
    "t",
    "dtype",
    "cfg_scale",
    "scale_pow",
    "diffusion_steps",
    "scale",
    "p",
    "u",
    "ratio",
}
SCALARS |= {
    "len_keep",
    "mask",
    "block_size",
    "masked_tokens",
    "approx_ratio",
    "detail_ratio",
    "beta_schedule",
}
SCALARS |= {"loss_type", "schedule_sampler_weights", "amm_blocks", "amm_formula", "local"}
SCALARS |= {"rescale_learned_sigmas", "predict_xstart", "use_kl", "learn_sigma", "timesteps"}
SCALARS |= {"lr", "max_grad_norm", "weight_decay", "no_prox"}
SCALARS |= {"enable_mask", "enable_down_mask", "enable_input_mask"} | golden_sampling.SCALARS

# ------------------------------------------------------------------ forward passes

FORWARD_INPUTS = {"x", "t", "timesteps", "y", "context", "label_drop_uniform", "mask"}
MASK_INPUTS = {
    "mask_noise",
    "ids_keep",
    "ids_restore",
    "down0_uniform",
    "down1_uniform",
    "mid_uniform",
}


def set_amm(case: Case, network: Any, scalars: dict[str, Any]) -> None:
    """AMM as the call says, else as the case's own default arrangement."""
    if case.family not in ("edt", "dit_amm", "mdtv2_amm"):
        return
    blocks = scalars.get("amm_blocks")
    if blocks is None:
        default = next(call for call in case.calls.values() if call["scalars"].get("amm_blocks"))
        blocks = [] if scalars.get("local") is False else default["scalars"]["amm_blocks"]
    network.set_amm(blocks, {"1.3*cos": "cos", None: "exp"}[scalars.get("amm_formula")])


def drop_labels(case: Case, network: Any, y: Tensor, uniform: Tensor | None) -> Tensor:
    return (
        y
        if uniform is None
        else torch.where(uniform < case.hyper["class_dropout_prob"], network.num_classes, y)
    )


def hidden_tokens(case: Case, network: Any, inputs: Outputs, scalars: dict[str, Any]) -> Any:
    """The call's mask as the route that the backbone takes."""
    if "mask_noise" in inputs:
        tokens = inputs["mask_noise"].shape[1]
        extra = inputs["u"].item() if "u" in inputs else scalars.get("u")
        kept = mdt_kept(tokens, case.hyper["mask_ratio"], extra)
        keep = inputs["mask_noise"].argsort(dim=1)[:, :kept]
        if "ids_keep" in inputs:
            assert kept == scalars["len_keep"]
            assert torch.equal(keep, inputs["ids_keep"])
        return Route(keep, 0, network.encoder_depth, "side", "all")
    if "down0_uniform" in inputs:
        hidden = {name: inputs[f"{name}_uniform"] < p for name, p in scalars["p"].items()}
        return TokenMasks(down=(hidden["down0"], hidden["down1"]), mid=hidden.get("mid"))
    tokens = math.prod(network.grid)
    if "mask" in inputs:
        visible = ~inputs["mask"][:, len(network.special_tokens) :]
        groups = visible.split(tokens, dim=1)  # the wavelet network has two
        ids = tuple(v.nonzero()[:, 1].view(len(v), -1) + 0 for v in groups)
        return Route(ids[0]) if len(ids) == 1 else PairRoute(ids[0], detail=ids[1])
    if scalars.get("mask") == "all False":
        return Route(torch.arange(tokens).expand(len(inputs["x"]), -1))
    return None


def run_forward(case: Case, call: dict[str, Any]) -> Outputs:
    scalars = call["scalars"]
    inputs = case.inputs(call, FORWARD_INPUTS | MASK_INPUTS)
    network = case.published(average="ema" in call["name"]).build().train(call["mode"] == "train")
    set_amm(case, network, scalars)
    count = scalars.get("first_samples", len(inputs["x"]))
    dtype = getattr(torch, scalars.get("dtype", "float32"))
    network, x = network.to(dtype), inputs["x"][:count].to(dtype)
    t = inputs.get("t", inputs.get("timesteps"))
    t = torch.full((count,), scalars["t"]) if t is None else t
    y = inputs.get("y")
    if y is not None:
        y = drop_labels(case, network, y[:count], inputs.get("label_drop_uniform"))
    if "context" in inputs:
        y = inputs["context"][:count].to(dtype)
    route = hidden_tokens(case, network, inputs, scalars)
    with torch.no_grad():
        output = network(x, t, y) if route is None else network(x, t, y, route)
    if isinstance(output, tuple):
        return dict(zip(("approx", "detail"), output, strict=True))
    return {"output": output}


# ------------------------------------------------------------------ guidance


def run_adm_guidance(case: Case, call: dict[str, Any]) -> Outputs:
    """DiT's, MDT's and EDT's batch is (conditional, unconditional) on the first half's images."""
    scalars, inputs = call["scalars"], case.inputs(call, {"x", "t", "y"})
    network, (x, t, y) = case.published().build(), (inputs["x"], inputs["t"], inputs["y"])
    set_amm(case, network, scalars)
    with torch.no_grad():
        if scalars["cfg_scale"] is None:
            return {"output": network(x, t, y)}
        half = len(x) // 2
        assert (y[half:] == network.num_classes).all()
        assert torch.equal(t[:half], t[half:])
        scale = scalars["cfg_scale"]
        if "scale_pow" in scalars:
            strength = power_cosine(scale, cfg_power=scalars["scale_pow"])
            scale = strength(1 - t[:half] / scalars["diffusion_steps"])
        guide = Guided(network, Classes(network.num_classes), scale, channels=3)
        guided = guide(x[:half], t[:half], y[:half])
        rest = network(x[:half], t[half:], y[half:])[:, 3:]
    return {"output": torch.cat([guided, torch.cat([guided[:, :3], rest], dim=1)])}


def run_uvit_guidance(case: Case, call: dict[str, Any]) -> Outputs:
    inputs = case.inputs(call, {"x", "timesteps", "y", "context", "empty_context"})
    network = case.published().build()
    condition: Condition = Classes(network.num_classes)
    y = inputs.get("context", inputs.get("y"))
    if "context" in inputs:
        condition = Text(*inputs["context"].shape[1:], null=inputs["empty_context"])
    with torch.no_grad():
        guided = Guided(network, condition, 1 + call["scalars"]["scale"])
        return {"output": guided(inputs["x"], inputs["timesteps"], y)}


# ------------------------------------------------------------------ losses


def run_adm_step(case: Case, call: dict[str, Any]) -> Outputs:
    """Hybrid loss, once plain, and for MDT and EDT once more under a mask."""
    passes = ("plain", "masked") if "noise_plain" in call["inputs"] else ("",)
    marks = [f"_{name}" if name else "" for name in passes]
    known = {f"{name}{mark}" for name in ("noise", "label_drop_uniform") for mark in marks}
    inputs = case.inputs(call, known | MASK_INPUTS | {"x_start", "t", "y", "u", "weights"})
    weights = inputs.get(
        "weights", torch.tensor(call["scalars"].get("schedule_sampler_weights", 1.0))
    )
    network, noise = case.published().build().train(), case.process()
    x0, t = inputs["x_start"], (inputs["t"] + 1) / noise.schedule.timesteps
    assert torch.equal(noise.schedule.clock(t).long(), inputs["t"])
    got: Outputs = {}
    total = torch.zeros(())
    for name, mark in zip(passes, marks, strict=True):
        eps = inputs[f"noise{mark}"]
        y = drop_labels(case, network, inputs["y"], inputs[f"label_drop_uniform{mark}"])
        masked = name == "masked"
        route = hidden_tokens(case, network, inputs, call["scalars"]) if masked else None
        output = noise.feed(network, noise.add_noise(x0, t, eps), t, y, route)
        terms = variational.terms(noise, output, x0, eps, t)
        total = total + (terms["loss"] * weights).mean()
        got |= {f"{name}_{term}" if name else term: value for term, value in terms.items()}
    total.backward()
    return got | {"total": total} | gradients(case, network)


def run_losses(case: Case, call: dict[str, Any]) -> Outputs:
    """ADM's loss terms for a given network output, under each of its options."""
    inputs, scalars = case.inputs(call, {"x_start", "t", "noise", "model_output"}), call["scalars"]
    weighting = "min_snr" if case.data.get("loss_weighting_in_words") else "uniform"
    prediction = "x0" if scalars.get("predict_xstart") else "eps"
    steps = case.hyper["diffusion_steps"]
    noise = process.build(
        section(
            "process",
            schedule=case.hyper["noise_schedule"],
            timesteps=steps,
            prediction=prediction,
            weighting=weighting,
        )
    )
    x0, output = inputs["x_start"], inputs["model_output"]
    if not scalars.get("learn_sigma", True):
        output = output[:, : x0.shape[1]]
    bound = (
        "kl"
        if scalars.get("use_kl")
        else "rescaled"
        if scalars.get("rescale_learned_sigmas")
        else "hybrid"
    )
    return variational.terms(
        noise, output, x0, inputs["noise"], (inputs["t"] + 1) / steps, variational=bound
    )


def run_loss_second_moment(case: Case, call: dict[str, Any]) -> Outputs:
    inputs, steps = case.inputs(call, {"t1", "loss1", "t2", "loss2"}), call["scalars"]["timesteps"]
    assert case.hyper == {
        "history_per_term": time_sampling.RECORDED,
        "uniform_prob": time_sampling.UNIFORM,
    }
    got: Outputs = {}
    history = time_sampling.LossSecondMoment(Table(linear_betas(steps)))
    for phase in ("1", "2"):
        history.update((inputs[f"t{phase}"] + 1) / steps, inputs[f"loss{phase}"])
        got[f"weights{phase}"] = torch.from_numpy(history.weights())
    t, importance = history.draw(4000, lambda *_: torch.Generator().manual_seed(0))
    k = (t * steps).round().long() - 1
    assert (importance - case.tensors["phase2/importance"][k]).abs().max() < 1e-6
    drawn = torch.bincount(k, minlength=steps) / len(k)
    assert (drawn - case.tensors["phase2/probabilities"]).abs().max() < 0.04
    return got


def run_adan(case: Case, call: dict[str, Any]) -> Outputs:
    """The trainer's optimiser and its clipping, over the given gradients."""
    names = ("param0", "param1")
    inputs, scalars = case.inputs(call, {*names, "grads0", "grads1"}), call["scalars"]
    parameters = [torch.nn.Parameter(inputs[name].clone()) for name in names]
    config = section(
        "optim",
        name="adan",
        lr=scalars["lr"],
        betas=case.hyper["betas"],
        eps=case.hyper["eps"],
        weight_decay=scalars.get("weight_decay", 0.0),
        no_prox=scalars.get("no_prox", False),
    )
    optimizer = optim.build(config, parameters)
    after: list[list[Tensor]] = [[], []]
    for gradients_ in zip(inputs["grads0"], inputs["grads1"], strict=True):
        for parameter, gradient in zip(parameters, gradients_, strict=True):
            parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(parameters, scalars.get("max_grad_norm") or math.inf)
        optimizer.step()
        for trace, parameter in zip(after, parameters, strict=True):
            trace.append(parameter.detach().clone())
    return {name: torch.stack(trace) for name, trace in zip(names, after, strict=True)}


def run_uvit_loss(case: Case, call: dict[str, Any]) -> Outputs:
    discrete = {"loss_discrete": True, "loss_continuous": False}[call["name"]]
    inputs = case.inputs(call, {"x0", "eps", "y", "context"} | ({"n"} if discrete else {"t"}))
    network = case.published().build().train()
    noise = case.process(schedule="scaled_linear" if discrete else "vp_sde")
    t = inputs["n"] / noise.schedule.timesteps if discrete else inputs["t"]
    if discrete:
        assert torch.equal(noise.schedule.clock(t), inputs["n"].float())
    x_t = noise.add_noise(inputs["x0"], t, inputs["eps"])
    output = noise.feed(network, x_t, t, inputs.get("context", inputs.get("y")))
    loss = variational.terms(noise, output, inputs["x0"], inputs["eps"], t)["loss"]
    loss.mean().backward()
    return {"loss": loss, "xn": x_t} | gradients(case, network)


def run_maskdm_loss(case: Case, call: dict[str, Any]) -> Outputs:
    inputs = case.inputs(call, {"img", "noise", "t", "mask", "y"})
    scalars = call["scalars"]
    network, noise = (
        case.published().build().train(),
        case.process(schedule=scalars["beta_schedule"]),
    )
    x0, t = 2 * inputs["img"] - 1, (inputs["t"] + 1) / noise.schedule.timesteps
    route = hidden_tokens(case, network, inputs, {})
    distance = section("objective", loss={"l1": "l1", "l2": "mse"}[scalars["loss_type"]])
    objective = Objective(
        noise, None, {}, distance, patch_size=network.patch_size, condition=Unconditional()
    )
    loss = objective.terms(network, x0, inputs["noise"], t, inputs.get("y"), route)["loss"].mean()
    loss.backward()
    return {"loss": loss} | gradients(case, network)


def run_maskdwt_loss(case: Case, call: dict[str, Any]) -> Outputs:
    inputs = case.inputs(call, {"img", "dwt", "noise", "t", "mask"})
    network, noise = case.published().build().train(), case.process()
    approx, detail = inputs["dwt"].split([3, inputs["dwt"].shape[1] - 3], dim=1)
    x0, eps, t = (
        torch.cat([2 * approx - 1, detail], dim=1),
        inputs["noise"],
        (inputs["t"] + 1) / noise.schedule.timesteps,
    )
    route = hidden_tokens(case, network, inputs, {})
    outputs = noise.feed(network, noise.add_noise(x0, t, eps), t, None, route)
    targets = patchify(eps[:, :3], network.patch_size), patchify(eps[:, 3:], network.detail_patch)
    parts = [
        (o - gather_tokens(e, k)).square().mean()
        for o, e, k in zip(outputs, targets, (route.keep, route.detail), strict=True)
    ]
    sum(parts).backward()
    return {"loss": sum(parts), "approx_loss": parts[0], "detail_loss": parts[1]} | gradients(
        case, network
    )


def run_dwt(case: Case, call: dict[str, Any]) -> Outputs:
    """The recognised codec transforms as the network was trained, and its scaling is the published
    mapping.
    """
    image = case.inputs(call, {"img"})["img"]
    sections = case.published().sections
    codec = codecs.build(section("codec", **sections["codec"]), sections["data"]["image_size"])
    assert codec.shape == tuple(case.tensors["dwt"].shape[1:]) == case.published().shape
    coefficients = codec.transform(image)
    fed = coefficients.clone()
    fed[:, :3] = 2 * fed[:, :3] - 1
    torch.testing.assert_close(
        (codec.transform(2 * image - 1) - codec._mean) / codec._std, fed, atol=1e-5, rtol=0
    )
    return {"dwt": coefficients, "idwt": codec.inverse(coefficients)}


UVIT = {"forward": run_forward, "cfg": run_uvit_guidance, "loss": run_uvit_loss}
ADM = {"forward": run_forward, "cfg": run_adm_guidance, "train_step": run_adm_step}
RUNNERS: dict[str, dict[str, Callable[[Case, dict[str, Any]], Outputs]]] = {
    **dict.fromkeys(("dit", "dit_amm", "mdtv1", "mdtv2", "mdtv2_amm", "edt"), ADM),
    "uvit": UVIT,
    "uvit_t2i": UVIT,
    "maskdm": {"forward": run_forward, "loss": run_maskdm_loss},
    "maskdwt": {"forward": run_forward, "loss": run_maskdwt_loss, "dwt": run_dwt},
    **golden_sampling.RUNNERS,
    "diffusion_math": {
        **golden_sampling.RUNNERS["diffusion_math"],
        "losses": run_losses,
        "loss_second_moment": run_loss_second_moment,
    },
    "optimizer": {"": run_adan},
}


def parameters(owned: Callable[[Case], list[Any]]) -> Any:
    """A test over (case, item) for what `owned` lists of each case; skipped where there is no
    golden data.
    """
    rows = [
        pytest.param(case, item, id=f"{case.name}-{item}")
        for case in cases()
        for item in owned(case)
    ]
    missing = pytest.mark.skip(reason=f"no golden data in {FOLDER}: set MSMDIFF_GOLDEN")
    return pytest.mark.parametrize(
        ("case", "item"), rows or [pytest.param(None, None, marks=missing)]
    )


@parameters(lambda case: ["family"])
def test_family(case: Case, item: str) -> None:
    """No case is left out in silence."""
    assert (
        case.family in RUNNERS
        or case.family in ("maskdm_masks", "metrics")
        or case.name == "manifests"
    )


@parameters(lambda case: list(case.calls))
def test_call(case: Case, item: str) -> None:
    call = case.calls[item]
    runner = next(
        (
            run
            for start, run in RUNNERS.get(case.family or "", {}).items()
            if item.startswith(start)
        ),
        None,
    )
    assert case.family in RUNNERS, f"no runner for the family {case.family}"
    assert runner is not None, f"no runner for the call {item} of the family {case.family}"
    assert not (odd := set(call["scalars"]) - SCALARS), f"unknown settings {odd}"
    got = runner(case, call)
    compare(call, case, got)
    norms = case.data.get("gradient_norms")
    if (
        norms
        and item == norms.get("of_call", item)
        and any(at.startswith("grad/") for at in call["outputs"].values())
    ):
        compare_norms(case, {name: got[name] for name in gradient_names(got)})


def gradient_names(got: Outputs) -> list[str]:
    terms = {"loss", "mse", "vb", "total", "xn", "approx_loss", "detail_loss"}
    return [
        name for name in got if name not in terms and not name.startswith(("plain_", "masked_"))
    ]


# ------------------------------------------------------------------ tables, checkpoints, masks, man

TABLES = (
    "guidance_table",
    "len_keep_table",
    "amm_tables",
    "table",
    "dwt_table",
    "statistics",
    *golden_sampling.TABLES,
)


@parameters(lambda case: [t for t in TABLES if t in case.data])
def test_table(case: Case, item: str) -> None:
    table = case.data[item]
    if item in golden_sampling.TABLES:
        golden_sampling.TABLES[item](case, table)
        return
    rows = (
        [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        if "rows" in table
        else []
    )
    if item == "guidance_table":
        for name, expected in table["strength"].items():
            scale, power = (float(part.split("=")[1]) for part in name.split(","))
            torch.testing.assert_close(
                power_cosine(scale, cfg_power=power)(1 - torch.tensor(table["t"]) / 1000),
                torch.tensor(expected),
                **table["tolerance"],
            )
    elif item == "len_keep_table":
        assert [mdt_kept(r["tokens"], r["mask_ratio"], r["u"]) for r in rows] == [
            r["len_keep"] for r in rows
        ]
    elif item == "amm_tables":
        for side, facts in table["grids"].items():
            n = int(side)
            matrix = amm_matrix((n, n))
            place = torch.cartesian_prod(torch.arange(n), torch.arange(n))
            squared = (place[:, None] - place).square().sum(-1)
            for distance, value in facts["squared_distance_to_value"].items():
                assert (matrix[squared == int(distance)] - value).abs().max() < 1e-6
            assert int((matrix != 0).sum()) == facts["nonzero_entries"]
    elif item == "table":
        for r in rows:
            own = {
                "block": {"block": r["block_size"] or 4},
                "crop": {"crop": r["crop_size"]},
                "patch": {"rounding": "floor"},
            }[r["type"]]
            wish = section("mask", ratio=r["ratio"] or 0.0, kind=r["type"], **own)
            mask = masking.build(wish, (r["grid_side"],) * 2)
            assert mask.tokens - mask.kept == r["masked_tokens"], r
    elif item == "dwt_table":
        for r in rows:
            for part, side in (
                ("approx", r["grid_side"]),
                ("detail", r["grid_side"] // r["scale"]),
            ):
                mask = BlockMask((side, side), r[f"{part}_ratio"], block=r["block_size"])
                assert mask.tokens - mask.kept == r[f"masked_{part}"], r
    else:
        keep = BlockMask((16, 16), 0.5, block=4).draw(4000, torch.Generator().manual_seed(0))
        hidden = 1 - torch.zeros(4000, 256).scatter(1, keep, 1).mean(0)
        assert (hidden - table["expected"]).abs().max() < 0.04


@parameters(lambda case: [n for n in case.data.get("tensors", {}) if n.startswith("example/")])
def test_example_masks(case: Case, item: str) -> None:
    """A published mask of each kind has the structure that ours has: whole blocks, one window, as
    many tokens.
    """
    for hidden in case.tensors[item].bool():
        side = math.isqrt(len(hidden))
        kind, number = item.removeprefix("example/").split("_")[0], item.rsplit("_", 1)[1]
        if kind.startswith("crop"):
            window = int(kind.removeprefix("crop"))
            mask = CropMask((side, side), 0.0, crop=window)
        else:
            block = int(kind.removeprefix("block") or 1) if kind != "patch" else 1
            ratio = float(number)
            if block > 1:
                mask = BlockMask((side, side), ratio, block=block)
            else:
                mask = PatchMask((side, side), ratio, rounding="floor")
            blocks = hidden.view(side // block, block, side // block, block)
            assert torch.equal(blocks, blocks[:, :1, :, :1].expand_as(blocks))
        assert int((~hidden).sum()) == mask.kept


@parameters(lambda case: ["model", "ema"] if case.data.get("checkpoint") else [])
def test_checkpoint_round_trip(case: Case, item: str) -> None:
    """What was read is written back under the same keys, bit for bit."""
    read = case.published(average=item == "ema")
    path = case.folder / case.data["checkpoint"]["file"]
    if item == "ema" and "training_folder" in case.data:
        path = case.folder / case.data["training_folder"]["folder"]
    original, _, _ = published.unwrap(published.load(path, item == "ema")[0], item == "ema")
    back = published.export(read.tensors, read.model, read.shape, read.notes["layout"])
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


@parameters(lambda case: list(golden_metrics.TABLES) if case.family == "metrics" else [])
def test_metrics(case: Case, item: str) -> None:
    golden_metrics.run(case, item)


@parameters(lambda case: sorted(p.name for p in case.folder.glob("*.json.gz")))
def test_manifest(case: Case, item: str) -> None:
    """Every published size, built on the meta device from the registry, has the published keys and
    shapes.
    """
    for entry in json.loads(gzip.decompress((case.folder / item).read_bytes()))["models"]:
        keys = {name: tuple(shape) for name, shape in entry["state_dict"].items()}
        theirs = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
        layout = published.recognise(case.folder / item, set(theirs))
        network = published.formats()[layout].describe(theirs, {})  # heads from the registry alone
        size = backbones.ALIASES.get(entry["name"], entry["name"])
        model = backbones.resolve(
            ModelConfig(
                name=size if size in backbones.sizes() else None,
                family=network.family,
                num_classes=network.num_classes,
                **network.fields,
            )
        )
        fields = model.model_dump()
        if size in backbones.sizes():
            known = dict(backbones.sizes()[size])
            if "decode_layer" in entry["hyper_parameters"]:
                known.pop("decode_layers", None)  # some are listed with two
            depth = known.pop("depth", None)
            assert {name: fields[name] for name in known} == known, entry["name"]
            assert depth is None or depth in (fields["depth"], fields["depth"] - 1), entry["name"]
        else:
            assert published.size_of(model), f"{entry['name']} has no size in the registry"
        with torch.device("meta"):
            ours = backbones.build(model, network.shape)
        back = published.export(dict(ours.state_dict()), model, network.shape, layout)
        assert {name: tuple(tensor.shape) for name, tensor in back.items()} == keys, entry["name"]
        assert sum(t.numel() for t in back.values() if t.is_floating_point()) == entry["parameters"]
        frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
        assert len(frozen) == len(entry["frozen_parameters"])
        back = published.export(dict(ours.named_parameters()), model, network.shape, layout)
        trainable = entry["parameters"] - sum(
            back[name].numel() for name in entry["frozen_parameters"]
        )
        assert trainable == entry["trainable_parameters"]
