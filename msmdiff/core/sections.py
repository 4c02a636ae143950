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
        "digits",
        description="Where the images are: `digits`, `digits:train`, `digits:test`, or a folder "
        "or file as docs/data.md lists them.",
    )
    kind: str = Field(AUTO, description="Which kind of source it is; `auto` tells by its look.")
    image_size: int = Field(
        16, ge=2, le=16_384, description="The side of the square images, in pixels."
    )
    labels: Literal["auto", "folders", "adm", "none"] = Field(
        "auto",
        description="Where classes come from: sub-folders (`folders`), names such as "
        "`ClassID_anything.jpg` (`adm`), nowhere, or whichever of them fits (`auto`).",
    )
    classes: list[str] | None = Field(
        None,
        description="Only images of these classes are used, by name; all classes keep their "
        "numbers. Null takes all.",
    )
    share: float = Field(
        1.0, gt=0, le=1, description="The share of each class's images to use, spread evenly."
    )
    crop: Literal["center", "random"] = Field(
        "center", description="Whether images are cropped in the centre or at random, as ADM does."
    )
    hflip: float = Field(0.0, ge=0, le=1, description="The probability that an image is mirrored.")
    verify: Literal["auto", "all", "lazy", "off"] = Field(
        "auto",
        description="How images are checked before the first training on them: `all` are decoded, "
        "`lazy` looks at the beginnings of the files, `off` at nothing; `auto` is lazy from 50,000 "
        "images on.",
    )
    skip_unreadable: StrictBool = Field(
        False, description="Leave unreadable images out instead of stopping."
    )
    float_range: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="The value of white in images of floats or 32-bit integers, such as float "
        "TIFFs.",
    )
    background: str = Field(
        "white",
        pattern="^(white|black|checker|[0-9a-fA-F]{6})$",
        description="What transparent images are laid on: `white`, `black`, a colour such as "
        "`8080FF`, or `checker`.",
    )
    workers: int | None = Field(
        None, ge=0, le=1024, description="The loader processes; null starts as many as help."
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

    name: str = Field("pixel", description="The space that diffusion runs in.")
    text: str | None = Field(
        None,
        description="The folder or hub id of CLIP's text encoder; null takes the one that packed "
        "data was encoded with.",
    )


class ModelConfig(Section):
    """`name` is a published size; every other key is an argument of that family's network and
    overrides the size.
    """

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(
        "tiny", description="A published size; null builds `model.family` from its options."
    )
    family: str | None = Field(None, description="The backbone; null takes the size's.")
    num_classes: Annotated[int, Field(le=10_000_000)] | Literal["auto"] = Field(
        0, description="The number of classes: 0 for none, `auto` for those of the data."
    )


registry.reserve("backbone", ModelConfig.model_fields)


class ProcessConfig(Section):
    CHOICES: ClassVar = {
        "schedule": "schedule",
        "prediction": "prediction",
        "weighting": "weighting",
        "time_sampling": "time_sampling",
    }

    schedule: str = Field("cosine", description="How much signal and noise there is at each time.")
    timesteps: int = Field(
        1000,
        ge=2,
        le=100_000,
        description="The number of training steps of the process; continuous schedules use it as "
        "the grid of samplers that visit training steps.",
    )
    prediction: str = Field("eps", description="What the network's output means.")
    weighting: str = Field("uniform", description="How much each time counts in the loss.")
    time_sampling: str = Field("uniform", description="How training draws its times.")


class MaskConfig(Section):
    CHOICES: ClassVar = {"kind": "mask", "route": "route"}

    ratio: float = Field(
        0.0, ge=0, lt=1, description="The share of tokens that is hidden; 0 means no mask."
    )
    kind: str = Field("patch", description="The shape of what is hidden.")
    route: str = Field(
        AUTO,
        description="How the visible tokens travel through the blocks; `auto` follows the "
        "objective's paper.",
    )
    schedule: Literal["constant", "linear", "cosine", "steps"] = Field(
        "constant",
        description="How the ratio changes over a training: it stays, goes from `ratio` to "
        "`final_ratio` along a line or a cosine, or follows `stages` (`steps`).",
    )
    final_ratio: float = Field(
        0.0, ge=0, lt=1, description="The ratio at which a linear or cosine schedule ends."
    )
    levels: int = Field(
        4, ge=2, le=64, description="The number of ratios that a linear or cosine schedule takes."
    )
    stages: list[tuple[float, float]] | None = Field(
        None,
        description="For `schedule: steps`, pairs of where a ratio begins, as a share of the "
        "training, and the ratio: [[0, 0.9], [0.6, 0.5]].",
    )
    tail: float = Field(
        0.0, ge=0, lt=1, description="The share of the training, at its end, that hides nothing."
    )


class ObjectiveConfig(Section):
    CHOICES: ClassVar = {"name": "objective", "alignment": "alignment"}

    name: str = Field(
        AUTO,
        description="The training loss; `auto` follows the network's paper, and masked score "
        "matching where there is a mask.",
    )
    alignment: str = Field(
        "none",
        description="A term beside the loss that pulls hidden tokens towards better features.",
    )
    loss: Literal["mse", "l1"] = Field(
        "mse", description="The distance of output and target: squared or absolute error."
    )
    variational: Literal["hybrid", "rescaled", "kl"] = Field(
        "hybrid",
        description="The loss with a learned variance: mse + vb (`hybrid`), mse + vb T / 1000 "
        "(`rescaled`), or vb T alone (`kl`).",
    )
    channel_groups: list[int] | None = Field(
        None,
        description="Sizes of groups of channels whose mean errors are added up: [3, 9] for "
        "MaskDM's wavelets.",
    )
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="The share of labels that training replaces by the null class."
    )


class OptimConfig(Section):
    CHOICES: ClassVar = {"name": "optimiser"}

    name: str = Field("adamw", description="The optimiser.")
    lr: float | None = Field(
        None, gt=0, description="The rate; null takes 2e-4 x 512 / hidden_size, at most 1e-3."
    )
    eps: float = Field(
        1e-8, gt=0, description="The number that is added to the denominator of an update."
    )
    weight_decay: float = Field(0.03, ge=0, description="The decoupled weight decay.")
    warmup_steps: int = Field(
        0, ge=0, description="The number of steps over which the learning rate rises from 0."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How the learning rate goes on after the warm-up."
    )
    final_lr: float = Field(
        0.0, ge=0, description="The learning rate at which a linear or cosine schedule ends."
    )
    decay_steps: int | None = Field(
        None, ge=1, description="The length of the decay in steps; null takes the whole training."
    )
    clip_grad_norm: float | None = Field(
        1.0, gt=0, description="Larger gradients are scaled to this norm; null does not clip."
    )


class EmaConfig(Section):
    decays: list[float] = Field(
        default=[0.999], description="One moving average for each decay; the first is sampled."
    )
    warmup: Literal["power", "constant"] = Field(
        "power",
        description="How an average begins: `power` raises its decay as min(1 - (1 + k)^-power, "
        "decay), as ema-pytorch does; `constant` has the decay from the first step.",
    )
    power: float = Field(2 / 3, gt=0, description="The exponent of the `power` warm-up.")
    update_after_step: int = Field(
        100,
        ge=0,
        description="With the `power` warm-up, the number of steps for which the average only "
        "copies the weights.",
    )
    update_every: int = Field(
        1, ge=1, description="Optimiser steps between updates; the decay is not rescaled."
    )
    snapshots_every: int = Field(
        0,
        ge=0,
        description="Steps between snapshots, from which `msmdiff weights ema` makes averages of "
        "any width after the training; 0 keeps none.",
    )
    widths: list[Annotated[float, Field(gt=0, le=0.28)]] = Field(
        default=[0.05, 0.1],
        min_length=1,
        description="The relative widths of the averages that snapshots hold.",
    )


class TrainConfig(Section):
    steps: int = Field(2000, ge=1, description="The number of optimiser steps.")
    max_seconds: float | None = Field(
        None,
        gt=0,
        description="Stop after so many seconds since the start, pictures and measurements "
        "included, and those of earlier starts of the run too, but not before the first step.",
    )
    batch_size: int = Field(
        128, ge=1, le=1_000_000, description="Images in one optimiser step, over all processes."
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Images in one forward pass of a process; smaller ones save memory, and null "
        "takes the whole share at once.",
    )
    seed: int = Field(0, ge=0, description="The seed of everything random.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="The precision of the network; `auto` takes bf16 where it is faster."
    )
    compile: StrictBool = Field(
        False, description="Compile the network's blocks with torch.compile."
    )
    deterministic: StrictBool = Field(
        False,
        description="Give the same bits again on a GPU, by slower kernels; a CPU always does.",
    )
    gradient_checkpointing: StrictBool | Annotated[int, Field(strict=True, ge=1)] = Field(
        False,
        description="Compute blocks again in the backward pass: less memory, slower. A number n "
        "does so with every n-th block.",
    )
    init_from: str | None = Field(
        None, description="The weights to start from; `finetune --ckpt` sets it."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="Whether a loss or gradient that is not finite stops or is skipped."
    )
    log_every: int = Field(
        50, ge=1, description="The number of steps between lines of metrics.jsonl."
    )
    checkpoint_every: int = Field(
        1000, ge=1, description="The number of steps between checkpoints."
    )
    keep_checkpoints: int = Field(2, ge=1, description="The number of checkpoints that are kept.")
    preview_every: int = Field(
        1000, ge=0, description="The number of steps between preview pictures; 0 draws none."
    )
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="Trackers that show the metrics too: tensorboard, wandb."
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="CPU threads of a process; null takes its share of the cores.",
    )


class SampleConfig(Section):
    CHOICES: ClassVar = {"sampler": "sampler", "times": "times", "cfg_schedule": "guidance"}

    sampler: str = Field("ddim", description="The sampling method.")
    steps: int | str = Field(
        50,
        description="The number of network evaluations (heun, edm and pc make two in each), or "
        "ADM's spacing: ddim25, or 10,20,30.",
    )
    times: str | None = Field(
        None,
        description="Which times are visited: training steps (even, maskdm, adm) or free times; "
        "null takes the sampler's own.",
    )
    clip: StrictBool = Field(
        True, description="Clip the predicted clean image to the codec's range at every step."
    )
    threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Clip the predicted image to this quantile of its size (Imagen).",
    )
    eps_after_clip: Literal["derived", "raw"] = Field(
        "derived",
        description="Where the noise estimate comes from after clipping: derived again (ADM), or "
        "as predicted (`raw`, MaskDM).",
    )
    cfg_scale: float = Field(
        1.0, ge=0, le=10_000, description="The scale s in eps_u + s (eps_c - eps_u); 1 is none."
    )
    cfg_against: Literal["null", "route", "path"] = Field(
        "null",
        description="What guidance leads away from: the null class; the same with few tokens "
        "(`route`, sparse guidance); or the null class without the fused blocks "
        "(`path`, SPRINT).",
    )
    cfg_hidden: float = Field(
        0.75, gt=0, lt=1, description="With `route`, the share of tokens that the other pass lacks."
    )
    cfg_channels: Literal["all", "first3"] = Field(
        "all",
        description="Which channels are guided: all, or the first three as in the published "
        "samplers of DiT, MDT and EDT.",
    )
    cfg_schedule: str = Field(
        "constant",
        description="How the guidance scale goes from pure noise to the image.",
    )
    cfg_interval: list[float] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Two noise levels sigma / alpha between which guidance acts; null guides at "
        "all of them.",
    )
    guide: str | None = Field(
        None, description="A weaker run or file in the unconditional one's place: autoguidance."
    )
    guide_ema: float | None = Field(
        None, description="Which average of the guide's run is used, by its decay."
    )
    amm: Literal["off", "default"] | list[int] | None = Field(
        None, description="The blocks that EDT's attention modulation acts in; null: the model's."
    )
    rounding: Literal["half_even", "half_up", "truncate"] = Field(
        "half_even",
        description="How numbers become 8 bits: half_up as DiT, U-ViT and MaskDM do, truncate as "
        "MDT does.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="The precision of the network while sampling."
    )
    compile: StrictBool = Field(
        False, description="Compile the network's blocks with torch.compile."
    )
    ema: float | None = Field(
        None, description="Which average to sample from, by its decay; null takes the first."
    )

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
        0, ge=0, description="Steps between measurements of the samples' distance; 0 for none."
    )
    n: int = Field(5000, ge=2, description="The number of samples drawn for each measurement.")
    features: str = Field("inception", description="What images are compared by.")
    weights: str | None = Field(
        None, description="The weights file of the features; null finds it as `msmdiff fid` does."
    )
    reference: str | None = Field(
        None,
        description="The images or statistics to compare with; null takes the held-out images "
        "(eval.heldout) if there are any, else the training data.",
    )
    heldout: str | None = Field(
        None,
        description="Images that are not trained on, for the held-out loss, named as "
        "`data.source` is; null takes SOURCE:test beside SOURCE:train, else none.",
    )
    heldout_n: int = Field(
        256, ge=1, description="The number of held-out images that are looked at."
    )
    heldout_every: int | None = Field(
        None,
        ge=0,
        description="The number of steps between held-out losses; 0 measures none, and null does "
        "with every checkpoint.",
    )
