"""The configuration: typed sections, how layers of them are merged, and what may change when a run
is resumed.

Precedence: defaults < preset or YAML file < named flags < `--set section.key=value`.
"""

import json
import re
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    field_validator,
    model_validator,
)

from msmdiff.core.errors import UsageError, nearest
from msmdiff.core.presets import parse_yaml


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class DataConfig(Section):
    source: str = Field(
        "digits", description="`digits[:train|:test]`, or any folder or file of docs/data.md"
    )
    image_size: int = Field(16, ge=2, description="side of the square images, in pixels")
    labels: Literal["auto", "folders", "adm", "none"] = Field(
        "auto",
        description="classes from sub-folders, from `ClassID_anything.jpg` file names, or none",
    )
    crop: Literal["center", "random"] = Field("center", description="ADM's centre or random crop")
    hflip: float = Field(0.0, ge=0, le=1, description="probability of a horizontal flip")
    verify: StrictBool = Field(
        True, description="decode every image once before the first training on this data"
    )
    skip_unreadable: StrictBool = Field(
        False, description="leave unreadable images out instead of stopping"
    )
    workers: int | None = Field(None, ge=0, description="loader processes; null: as many as help")


class CodecConfig(Section):
    name: Literal["pixel", "dwt", "vae"] = "pixel"
    wavelet: str = Field(
        "haar", description="dwt: any orthogonal or biorthogonal PyWavelets filter"
    )
    level: int = Field(1, ge=1, description="dwt: decomposition levels")
    mean: list[float] | None = Field(
        None,
        description="dwt: mean of each sub-band, null: measured; vae: of each channel, null: 0",
    )
    std: list[float] | None = Field(
        None,
        description="dwt: standard deviation of each sub-band, null: measured; vae: of each "
        "channel, null: 1",
    )
    vae: str | None = Field(
        None,
        description="vae: folder, file or hub id of an AutoencoderKL; null: what packed data was "
        "encoded with",
    )
    vae_config: str | None = Field(
        None,
        description="vae: folder or hub id with the config.json of a single file; null: "
        "Stable Diffusion's",
    )
    scale: float = Field(0.18215, gt=0, description="vae: x0 = scale (latent - mean) / std")
    channels: int = Field(4, ge=1, description="vae: channels of a latent")
    factor: int = Field(8, ge=1, description="vae: pixels per latent, along a side")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="vae: of its network")
    tile: StrictBool = Field(
        False, description="vae: large images in tiles: less memory, slightly other latents"
    )
    text: str | None = Field(
        None,
        description="folder or hub id of the CLIP text encoder; null: what packed data was "
        "encoded with",
    )


class ModelConfig(Section):
    """`name` is a published size; every other key is an argument of that family's network and
    overrides the size.
    """

    model_config = ConfigDict(extra="allow", validate_assignment=True)

    name: str | None = "tiny"
    family: str | None = None
    num_classes: int | Literal["auto"] = Field(
        0, description="0: unconditional; auto: as many as the data has"
    )


class ProcessConfig(Section):
    schedule: Literal[
        "linear", "cosine", "shifted_cosine", "scaled_linear", "vp_sde", "vp_cosine"
    ] = "cosine"
    timesteps: int = Field(1000, ge=2)
    shift_size: int = Field(
        64, ge=1, description="shifted_cosine: image side the schedule is shifted to"
    )
    prediction: Literal["eps", "x0", "v"] = "eps"
    weighting: Literal["uniform", "min_snr"] = "uniform"
    min_snr_gamma: float = Field(5.0, gt=0)
    time_sampling: Literal["uniform", "stratified", "loss_second_moment"] = "uniform"


class MaskConfig(Section):
    ratio: float = Field(0.0, ge=0, lt=1, description="share of hidden tokens; 0: no mask")
    kind: Literal["patch", "block", "crop"] = "patch"
    block: int = Field(4, ge=1, description="block: side of a block, in tokens")
    crop: int | None = Field(
        None, ge=1, description="crop: side of the visible window, in tokens; null: from ratio"
    )
    spread: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="mdt: each step hides up to so much more than ratio; null: as published",
    )
    rounding: Literal["nearest", "floor"] = Field(
        "nearest", description="patch: floor is the MaskDM code's rule"
    )


class ObjectiveConfig(Section):
    name: Literal["auto", "dsm", "msm", "mdt", "edt"] = Field(
        "auto",
        description="all tokens, visible ones, MDT's and EDT's two passes; auto: as the network "
        "was published",
    )
    loss: Literal["mse", "l1"] = "mse"
    variational: Literal["hybrid", "rescaled", "kl"] = Field(
        "hybrid", description="with a learned variance: mse + vb, mse + vb T / 1000, or vb T alone"
    )
    channel_groups: list[int] | None = Field(
        None,
        description="average the error within each group of channels and add: [3, 9] for "
        "MaskDM's wavelets",
    )
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="share of labels replaced by the null class"
    )


class OptimConfig(Section):
    name: Literal["adamw", "adan", "adan-pytorch"] = "adamw"
    lr: float | None = Field(None, gt=0, description="null: 2e-4 x 512 / hidden_size, at most 1e-3")
    betas: list[float] | None = Field(
        None, description="null: adamw (0.99, 0.99), adan (0.98, 0.92, 0.99)"
    )
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.03, ge=0)
    warmup_steps: int = Field(0, ge=0)
    no_prox: StrictBool = Field(
        False, description="adan: weight decay before the step instead of proximal"
    )
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_lr: float = Field(0.0, ge=0, description="where a linear or cosine schedule ends")
    decay_steps: int | None = Field(
        None, ge=1, description="length of the decay; null: the whole training"
    )
    clip_grad_norm: float | None = Field(1.0, gt=0)


class EmaConfig(Section):
    decays: list[float] = Field(
        default=[0.999], description="one average per decay, the first one is sampled from"
    )
    warmup: Literal["power", "constant"] = Field(
        "power",
        description="power: ema-pytorch's min(1 - (1 + k)^-power, decay); constant: the decay "
        "from step one",
    )
    power: float = Field(2 / 3, gt=0)
    update_after_step: int = Field(100, ge=0, description="power: plain copies until then")
    update_every: int = Field(
        1, ge=1, description="optimiser steps between updates; the decay is not rescaled"
    )


class TrainConfig(Section):
    steps: int = Field(2000, ge=1, description="optimiser steps")
    max_seconds: float | None = Field(
        None, gt=0, description="stop after this much time spent in training steps"
    )
    batch_size: int = Field(128, ge=1, description="images per optimiser step, over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="images per forward pass and process"
    )
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: StrictBool = False
    gradient_checkpointing: StrictBool = False
    init_from: str | None = Field(
        None, description="weights to start from; set by `finetune --ckpt`"
    )
    on_nonfinite: Literal["stop", "skip"] = "stop"
    log_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    preview_every: int = Field(1000, ge=0, description="0: none")
    trackers: list[Literal["tensorboard", "wandb"]] = []
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a process; null: its share of the cores"
    )


class SampleConfig(Section):
    sampler: Literal[
        "ddim", "ddpm", "dpm_solver", "dpm_solver++", "unipc", "euler", "heun", "euler_maruyama"
    ] = "ddim"
    steps: int | str = Field(
        50, description="network evaluations, heun: two each; or ADM's spacing: ddim25, 10,20,30"
    )
    grid: Literal["even", "maskdm", "adm", "uniform", "quadratic", "logsnr"] | None = Field(
        None,
        description="training steps (even, maskdm, adm) or free times to visit; null: the "
        "sampler's own, see times",
    )
    end: float | None = Field(
        None, gt=0, lt=1, description="free times: the last one; null: the process's first step"
    )
    eta: float = Field(0.0, ge=0, description="ddim: 0 deterministic, 1 as noisy as ddpm")
    variance: Literal["small", "large"] = Field(
        "small", description="ddpm: posterior variance or beta"
    )
    order: Literal[1, 2, 3] = Field(2, description="dpm_solver, dpm_solver++, unipc")
    method: Literal["multistep", "singlestep", "fast", "adaptive"] = Field(
        "multistep",
        description="dpm_solver(++); singlestep: steps // order intervals; fast: mixed "
        "orders, all steps",
    )
    taylor: StrictBool = Field(False, description="dpm_solver(++): differences by Taylor expansion")
    lower_order_final: StrictBool = Field(
        True, description="multistep: lower the order at the end of under 10 steps"
    )
    denoise_to_zero: StrictBool = Field(
        False, description="dpm_solver(++), unipc: one more evaluation gives x0"
    )
    clip: StrictBool = Field(True, description="clip x0 to the codec's range at every step")
    threshold: float | None = Field(
        None, gt=0, le=1, description="clip x0 to this quantile of its own size (Imagen)"
    )
    eps_after_clip: Literal["derived", "raw"] = Field(
        "derived",
        description="the noise estimate after clipping x0: derived again (ADM) or as "
        "predicted (MaskDM)",
    )
    cfg_scale: float = Field(
        1.0, ge=0, description="eps_u + cfg_scale (eps_c - eps_u); 1: no guidance"
    )
    cfg_channels: Literal["all", "first3"] = Field(
        "all",
        description="first3: as the published samplers of DiT, MDT and EDT, which leave a fourth "
        "one unguided",
    )
    cfg_schedule: Literal["constant", "linear", "power_cosine"] = Field(
        "constant",
        description="of the scale over time: from 1 at pure noise to cfg_scale at the image",
    )
    cfg_power: float | None = Field(None, gt=0, description="power_cosine's exponent (MDT: 4)")
    cfg_interval: list[float] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="guide at noise levels sigma / alpha from .. to, else not at all",
    )
    guide: str | None = Field(
        None, description="autoguidance: a weaker run or file in the unconditional one's place"
    )
    guide_ema: float | None = Field(None, description="which average of the guide's run")
    amm: Literal["off", "default"] | list[int] | None = Field(
        None, description="null: as the model section says"
    )
    rounding: Literal["half_even", "half_up", "truncate"] = Field(
        "half_even", description="to uint8; half_up: as DiT, U-ViT and MaskDM; truncate: as MDT"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="the network's, by autocast")
    compile: StrictBool = False
    ema: float | None = Field(None, description="which average to sample from; null: the first")

    @model_validator(mode="before")
    @classmethod
    def _a_power_implies_its_schedule(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("cfg_power") is not None:
            given = {"cfg_schedule": "power_cosine", **given}
        return given

    @field_validator("steps", mode="before")
    @classmethod
    def _steps_or_spacing(cls, steps: Any) -> Any:
        if isinstance(steps, str) and steps.strip().isdigit():
            steps = int(steps)
        if isinstance(steps, bool) or (isinstance(steps, int) and steps < 1):
            raise ValueError("give at least one step")
        if isinstance(steps, str) and not re.fullmatch(r"ddim\d+|\d+(,\d+)*", steps):
            raise ValueError("give a number, or ADM's spacing such as ddim25 or 10,20,30")
        return steps


class EvalConfig(Section):
    every: int = Field(
        0, ge=0, description="steps between measurements of the samples' distance; 0: none"
    )
    n: int = Field(5000, ge=2, description="samples drawn for each")
    features: Literal["inception", "dinov2", "pixel"] = "inception"
    weights: str | None = Field(
        None, description="the features' weights file; null: as `msmdiff fid` finds them"
    )
    reference: str | None = Field(None, description="images or statistics; null: the training data")


class Config(Section):
    data: DataConfig = DataConfig()
    codec: CodecConfig = CodecConfig()
    model: ModelConfig = ModelConfig()
    process: ProcessConfig = ProcessConfig()
    mask: MaskConfig = MaskConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.as_dict(), sort_keys=False)

    def to_json(self) -> str:
        return json.dumps(self.as_dict())


# Keys that may differ when a run is resumed: they change when things are shown or saved, never what
# is computed.
MUTABLE = re.compile(
    r"train\.(steps|max_seconds|log_every|checkpoint_every|keep_checkpoints|preview_every|trackers)"
    r"|data\.workers|sample\..*|eval\..*"
)


def build(*layers: dict[str, Any]) -> Config:
    """Merge nested dictionaries, later ones winning, and validate the result.

    Raises UsageError that lists every problem at once, an unknown key with the nearest valid name.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        _check_shape(layer)
        layer = {name: content for name, content in layer.items() if content is not None}
        model = layer.get("model") or {}
        if model.get("name") not in (None, merged.get("model", {}).get("name")):
            # Another size: what an earlier layer said of the old one's dimensions no longer
            # applies.
            merged["model"] = {
                k: v for k, v in merged.get("model", {}).items() if k == "num_classes"
            }
        optimiser = (layer.get("optim") or {}).get("name")
        if optimiser not in (None, merged.get("optim", {}).get("name", optimiser)):
            merged["optim"].pop("betas", None)  # they were the other optimiser's
        _merge(merged, layer)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(e) for e in error.errors())) from None


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1, "a.c": None}` -> `{"a": {"b": 1}}`: None means not given."""
    out: dict[str, Any] = {}
    for dotted, value in flat.items():
        if value is not None:
            node = out
            *parents, leaf = dotted.split(".")
            for name in parents:
                node = node.setdefault(name, {})
            node[leaf] = value
    return out


def parse_sets(items: list[str]) -> dict[str, Any]:
    """`["optim.lr=1e-4", "mask.kind=block"]` -> nested dictionary; values are read as YAML.

    Raises UsageError for an item without `=` or without a section.
    """
    out: dict[str, Any] = {}
    for item in items:
        dotted, equals, text = item.partition("=")
        if not equals or "." not in dotted:
            raise UsageError(
                f"--set {item}: write section.key=value, for example --set optim.lr=1e-4"
            )
        node = out
        *parents, leaf = dotted.strip().split(".")
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UsageError(
                    f"--set {item}: {name} was given a value before, it cannot hold {leaf}"
                )
        node[leaf] = parse_yaml(text, f"--set {item}")
    return out


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for name, value in nested.items():
        out |= (
            flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return out


def plain(config: Config) -> dict[str, int | float | str | bool]:
    """One flat table of numbers and text, which is what experiment trackers take."""
    flat = flatten(config.as_dict())
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in flat.items()}


def difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys in which two configurations compute different things, as `{key: (old, new)}`."""
    a, b = flatten(old.as_dict()), flatten(new.as_dict())
    keys = [k for k in [*a, *(k for k in b if k not in a)] if a.get(k) != b.get(k)]
    return {k: (a.get(k), b.get(k)) for k in keys if not MUTABLE.fullmatch(k)}


# ------------------------------------------------------------------ messages


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Config
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation
        near = nearest(str(error["loc"][-1]), list(section.model_fields))
        return f"unknown configuration key '{where}'{near}"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{where} = {error['input']!r}: {message}"


def _check_shape(layer: dict[str, Any]) -> None:
    for name, content in layer.items():
        if content is not None and not isinstance(content, dict) and name in Config.model_fields:
            raise UsageError(f"{name} must be a mapping of keys, not {content!r}")


def _merge(base: dict[str, Any], layer: dict[str, Any]) -> None:
    for name, value in layer.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            _merge(base[name], value)
        else:
            base[name] = json.loads(json.dumps(value)) if isinstance(value, dict) else value
