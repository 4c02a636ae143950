"""The sections of the configuration: the keys that do not depend on a choice.

A key in `CHOICES` names something of a registered kind. What that choice takes beside the keys here
is declared where it is defined, and `config` puts the two together.
"""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StrictBool, field_validator

from msmdiff.core import registry
from msmdiff.core.registry import Checked

AUTO = "auto"
"""A choice that is settled when the configuration is resolved."""


class Section(Checked):
    """One section; subclasses are completed by the options of what they choose."""

    CHOICES: ClassVar[dict[str, str]] = {}
    """Keys that choose something registered: key -> kind."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Keep the section's own keys from being options of what it chooses."""
        for key, kind in vars(cls).get("CHOICES", {}).items():
            automatic = cls.model_fields[key].default in (None, AUTO)
            registry.reserve(kind, cls.model_fields, automatic)

    @classmethod
    def prepare(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Keys as users may write them -> today's keys."""
        return fields


class DataConfig(Section):
    CHOICES: ClassVar = {"kind": "source"}

    source: str = Field(
        "digits", description="`digits[:train|:test]`, or any folder or file of docs/data.md"
    )
    kind: str = Field(AUTO, description="which kind of source it is; auto: by its look")
    image_size: int = Field(16, ge=2, le=16_384, description="side of the square images, in pixels")
    labels: Literal["auto", "folders", "adm", "none"] = Field(
        "auto",
        description="classes from sub-folders, from `ClassID_anything.jpg` file names, or none",
    )
    classes: list[str] | None = Field(
        None, description="only images of these classes, by name; all of them keep their numbers"
    )
    share: float = Field(
        1.0, gt=0, le=1, description="only this share of each class's images, spread evenly"
    )
    crop: Literal["center", "random"] = Field("center", description="ADM's centre or random crop")
    hflip: float = Field(0.0, ge=0, le=1, description="probability of a horizontal flip")
    verify: Literal["auto", "all", "lazy", "off"] = Field(
        "auto",
        description="before the first training on this data, decode every image once (all), or "
        "look at the beginnings of the files (lazy: auto of more than 50,000 images); off: neither",
    )
    skip_unreadable: StrictBool = Field(
        False, description="leave unreadable images out instead of stopping"
    )
    float_range: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="what is white in images of floats or 32-bit integers, such as float TIFFs",
    )
    background: str = Field(
        "white",
        pattern="^(white|black|checker|[0-9a-fA-F]{6})$",
        description="what transparent images are laid on: white, black, a colour RRGGBB, or "
        "checker",
    )
    workers: int | None = Field(
        None, ge=0, le=1024, description="loader processes; null: as many as help"
    )

    @field_validator("verify", mode="before")
    @classmethod
    def _verify_as_once(cls, value: Any) -> Any:
        """It was a truth value."""
        return {True: "auto", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("classes", mode="before")
    @classmethod
    def _digits_are_names(cls, classes: Any) -> Any:
        """YAML reads a class that is called 5 as a number."""
        if not isinstance(classes, list):
            return classes
        return [str(c) if isinstance(c, int) and not isinstance(c, bool) else c for c in classes]


class CodecConfig(Section):
    CHOICES: ClassVar = {"name": "codec"}

    name: str = Field("pixel", description="the space that diffusion runs in")
    text: str | None = Field(
        None,
        description="folder or hub id of the CLIP text encoder; null: what packed data was "
        "encoded with",
    )


class ModelConfig(Section):
    """`name` is a published size; every other key is an argument of that family's network and
    overrides the size.
    """

    model_config = ConfigDict(extra="allow")

    name: str | None = Field("tiny", description="a published size; null: by family and its keys")
    family: str | None = Field(None, description="the backbone; null: the size's")
    num_classes: Annotated[int, Field(le=10_000_000)] | Literal["auto"] = Field(
        0, description="0: unconditional; auto: as many as the data has"
    )


registry.reserve("backbone", ModelConfig.model_fields)


class ProcessConfig(Section):
    CHOICES: ClassVar = {
        "schedule": "schedule",
        "prediction": "prediction",
        "weighting": "weighting",
        "time_sampling": "time_sampling",
    }

    schedule: str = Field("cosine", description="how much signal and noise there is at each time")
    timesteps: int = Field(
        1000, ge=2, le=100_000, description="training steps, or how finely samplers step"
    )
    prediction: str = Field("eps", description="what the network's output means")
    weighting: str = Field("uniform", description="how much each time counts in the loss")
    time_sampling: str = Field("uniform", description="how training times are drawn")


class MaskConfig(Section):
    CHOICES: ClassVar = {"kind": "mask", "route": "route"}

    ratio: float = Field(0.0, ge=0, lt=1, description="share of hidden tokens; 0: no mask")
    kind: str = Field("patch", description="what is hidden as one")
    route: str = Field(
        AUTO, description="how the visible tokens travel; auto: as the objective was published"
    )
    schedule: Literal["constant", "linear", "cosine", "steps"] = Field(
        "constant",
        description="of the ratio over the training's images: as it is, from ratio to final_ratio "
        "in even pieces, or as `stages` says",
    )
    final_ratio: float = Field(
        0.0, ge=0, lt=1, description="where a linear or cosine schedule of the ratio ends"
    )
    levels: int = Field(
        4, ge=2, le=64, description="ratios that a linear or cosine schedule goes through"
    )
    stages: list[tuple[float, float]] | None = Field(
        None,
        description="of schedule steps: pairs of the share of the training from which, and the "
        "ratio: [[0, 0.9], [0.6, 0.5]]",
    )
    tail: float = Field(
        0.0, ge=0, lt=1, description="share of the training at its end that hides nothing"
    )


class ObjectiveConfig(Section):
    CHOICES: ClassVar = {"name": "objective"}

    name: str = Field(
        AUTO,
        description="all tokens, visible ones, MDT's and EDT's two passes; auto: as the network "
        "was published",
    )
    loss: Literal["mse", "l1"] = Field("mse", description="distance of output and target")
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
    CHOICES: ClassVar = {"name": "optimiser"}

    name: str = Field("adamw", description="the optimiser")
    lr: float | None = Field(None, gt=0, description="null: 2e-4 x 512 / hidden_size, at most 1e-3")
    eps: float = Field(1e-8, gt=0, description="added to the denominator of the update")
    weight_decay: float = Field(0.03, ge=0, description="decoupled weight decay")
    warmup_steps: int = Field(0, ge=0, description="steps over which the rate rises from 0")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the rate, after the warm-up"
    )
    final_lr: float = Field(0.0, ge=0, description="where a linear or cosine schedule ends")
    decay_steps: int | None = Field(
        None, ge=1, description="length of the decay; null: the whole training"
    )
    clip_grad_norm: float | None = Field(1.0, gt=0, description="largest norm of the gradient")


class EmaConfig(Section):
    decays: list[float] = Field(
        default=[0.999], description="one average per decay, the first one is sampled from"
    )
    warmup: Literal["power", "constant"] = Field(
        "power",
        description="power: ema-pytorch's min(1 - (1 + k)^-power, decay); constant: the decay "
        "from step one",
    )
    power: float = Field(2 / 3, gt=0, description="power: of the ramp")
    update_after_step: int = Field(100, ge=0, description="power: plain copies until then")
    update_every: int = Field(
        1, ge=1, description="optimiser steps between updates; the decay is not rescaled"
    )


class TrainConfig(Section):
    steps: int = Field(2000, ge=1, description="optimiser steps")
    max_seconds: float | None = Field(
        None,
        gt=0,
        description="stop after so many seconds since the start, pictures and measurements "
        "included; those of earlier starts of a run count too",
    )
    batch_size: int = Field(
        128, ge=1, le=1_000_000, description="images per optimiser step, over all processes"
    )
    micro_batch_size: int | None = Field(
        None, ge=1, le=1_000_000, description="images per forward pass and process"
    )
    seed: int = Field(0, ge=0, description="of everything random")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="of the network; auto: bf16 where it is faster"
    )
    compile: StrictBool = Field(False, description="torch.compile the network's blocks")
    deterministic: StrictBool = Field(
        False, description="the same bits again on a GPU: slower kernels; a CPU's always are"
    )
    gradient_checkpointing: StrictBool = Field(
        False, description="compute blocks again in the backward pass: less memory, slower"
    )
    init_from: str | None = Field(
        None, description="weights to start from; set by `finetune --ckpt`"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite: stop, or leave the step out"
    )
    log_every: int = Field(50, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints that stay")
    preview_every: int = Field(1000, ge=0, description="steps between pictures; 0: none")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="where metrics are shown as well"
    )
    threads: int | None = Field(
        None, ge=1, le=4096, description="CPU threads of a process; null: its share of the cores"
    )


class SampleConfig(Section):
    CHOICES: ClassVar = {"sampler": "sampler", "times": "times", "cfg_schedule": "guidance"}

    sampler: str = Field("ddim", description="the method")
    steps: int | str = Field(
        50, description="network evaluations, heun: two each; or ADM's spacing: ddim25, 10,20,30"
    )
    times: str | None = Field(
        None,
        description="training steps (even, maskdm, adm) or free times to visit; null: the "
        "sampler's own",
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
        1.0, ge=0, le=10_000, description="eps_u + cfg_scale (eps_c - eps_u); 1: no guidance"
    )
    cfg_against: Literal["null", "route", "path"] = Field(
        "null",
        description="what guidance leads away from: the null; `route`, the same with few tokens "
        "on the trained route (sparse guidance); `path`, the null without the fused blocks "
        "(SPRINT)",
    )
    cfg_hidden: float = Field(
        0.75, gt=0, lt=1, description="share of tokens hidden from the other pass of `route`"
    )
    cfg_channels: Literal["all", "first3"] = Field(
        "all",
        description="first3: as the published samplers of DiT, MDT and EDT, which leave a fourth "
        "one unguided",
    )
    cfg_schedule: str = Field(
        "constant",
        description="of the scale over time: from 1 at pure noise to cfg_scale at the image",
    )
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
    compile: StrictBool = Field(False, description="torch.compile the network's blocks")
    ema: float | None = Field(None, description="which average to sample from; null: the first")

    @classmethod
    def prepare(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """`grid` was the name of `times`; a power implies its schedule."""
        if "grid" in fields:
            fields = {("times" if key == "grid" else key): value for key, value in fields.items()}
        if fields.get("cfg_power") is not None:
            fields = {"cfg_schedule": "power_cosine", **fields}
        return fields

    @field_validator("steps", mode="before")
    @classmethod
    def _steps_or_spacing(cls, steps: Any) -> Any:
        if isinstance(steps, str) and re.fullmatch(r"[0-9]{1,9}", steps.strip()):
            steps = int(steps)
        if isinstance(steps, bool) or (isinstance(steps, int) and not 1 <= steps <= 100_000):
            raise ValueError("give 1 to 100,000 steps")
        spacing = r"ddim[0-9]{1,6}|[0-9]{1,6}(,[0-9]{1,6})*"
        if isinstance(steps, str) and not re.fullmatch(spacing, steps):
            raise ValueError("give a number, or ADM's spacing such as ddim25 or 10,20,30")
        return steps


class EvalConfig(Section):
    CHOICES: ClassVar = {"features": "features"}

    every: int = Field(
        0, ge=0, description="steps between measurements of the samples' distance; 0: none"
    )
    n: int = Field(5000, ge=2, description="samples drawn for each")
    features: str = Field("inception", description="what images are compared by")
    weights: str | None = Field(
        None, description="the features' weights file; null: as `msmdiff fid` finds them"
    )
    reference: str | None = Field(
        None,
        description="images or statistics; null: the held-out images (eval.heldout) where there "
        "are any, else the training data",
    )
    heldout: str | None = Field(
        None,
        description="images that are not trained on, opened as data.source is, for the held-out "
        "loss; null: SOURCE:test where SOURCE:train is trained on, else none",
    )
    heldout_n: int = Field(256, ge=1, description="of those, how many are looked at")
    heldout_every: int | None = Field(
        None,
        ge=0,
        description="steps between held-out losses; 0: none; null: train.checkpoint_every",
    )
