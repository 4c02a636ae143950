"""What a file of `msmdiff compare` asks for: arms, their budget, how they are judged."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from msmdiff.core import files, presets
from msmdiff.core.errors import UsageError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Budget(_Strict):
    """What every arm gets with one seed: exactly one of these."""

    seconds: float | None = Field(
        None, gt=0, description="Seconds of training steps, at the paces that were timed."
    )
    flops: float | None = Field(
        None,
        gt=0,
        description="Floating-point operations of forward and backward passes, as counted.",
    )
    images: int | None = Field(None, gt=0, description="Images seen in training.")

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if sum(value is not None for value in (self.seconds, self.flops, self.images)) != 1:
            raise ValueError("give one of seconds, flops and images")
        return self


class Measure(_Strict):
    """How an arm is judged: by a distance of its samples, and by the held-out loss where
    `eval.heldout` names images.
    """

    points: int = Field(4, ge=1, le=100, description="The number of measurements along the budget.")
    by: Literal["distance", "heldout"] = Field(
        "distance",
        description="What decides in a sweep and in the table: the distance of samples, or the "
        "held-out loss.",
    )
    n: int = Field(500, ge=0, description="The number of samples of each measurement.")
    samples: Literal["every", "last"] = Field(
        "every", description="Whether samples are drawn at every point, or at the last one only."
    )
    features: str = Field(
        "pixel",
        description="What images are compared by: a feature network, or a classifier's file.",
    )
    weights: str | None = Field(None, description="The weights file of the features.")
    reference: str = Field("digits:test", description="The images or statistics to compare with.")

    nearest: bool = Field(
        False,
        description="Also measure whether samples lie nearer to training images than held-out "
        "images do.",
    )

    @model_validator(mode="after")
    def _enough(self) -> "Measure":
        if self.n == 1 or (self.n == 0 and self.by == "distance"):
            raise ValueError("a distance needs two samples or more: n is 0 only with by: heldout")
        return self


class Spec(_Strict):
    """A comparison: arms by name, each a configuration or a list of stages, with the keys of a
    configuration, `config` (a preset or file under them) and `share` (of the budget).
    """

    arms: dict[str, list[dict[str, Any]]] = Field(min_length=1)
    budget: Budget
    seeds: list[int] = Field(
        [0, 1, 2], min_length=1, description="The seeds that every arm is trained with."
    )
    slice: float = Field(3.0, gt=0, description="The seconds of an arm's turn.")
    checkpoints: int = Field(
        10,
        ge=1,
        le=1000,
        description="The number of checkpoints along a training; 1 saves it at its end only.",
    )
    common: dict[str, Any] = Field(
        {}, description="Keys of all arms, which lie over their presets and under their own keys."
    )
    sweep: list[float] = Field(
        [], description="Learning rates that every arm tries with the first seed."
    )
    measure: Measure = Measure()

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, content: Any) -> Any:
        if isinstance(content, dict) and isinstance(content.get("arms"), dict):
            arms = content["arms"].items()
            listed = {k: [v or {}] if not isinstance(v, list) else v for k, v in arms}
            content = {**content, "arms": listed}
        return content


def read(path: Path) -> Spec:
    """The comparison that a YAML file asks for. Raises UsageError naming the file."""
    files.require_regular(path)
    with files.reading(path, "a comparison in YAML"):
        text = path.read_text(encoding="utf-8")
    try:
        return Spec.model_validate(presets.parse_yaml(text, str(path)))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise UsageError(f"{path}: {problems}") from None
