"""Weights files: one self-describing `.safetensors` per network, to sample or to start from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msmdiff.core import backbones, files, registry, tensor_files
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.condition import describe
from msmdiff.core.config import Config
from msmdiff.core.diffusion import codecs
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.model import Model
from msmdiff.core.weights import checks, published

FORMAT_VERSION = 2


@dataclass
class Stored:
    """A weights file as it lies on disk: the tensors, the configuration they belong to, and notes
    about them.
    """

    path: Path
    tensors: dict[str, Tensor]
    config: Config
    notes: dict[str, str] = field(default_factory=dict)


def save(path: Path, tensors: dict[str, Tensor], config: Config, **notes: Any) -> None:
    """Write a weights file, atomically: an existing file is replaced only by a whole one.

    The configuration, the format's version and the notes (images seen, which average, ...) go into
    the metadata.
    """
    about = {
        "version": FORMAT_VERSION,
        "config": config.as_dict(),
        **{k: str(v) for k, v in notes.items()},
    }
    tensor_files.write(path, tensors, {"msmdiff": json.dumps(about)})


def read(
    path: Path,
    given: Mapping[str, Any] | None = None,
    average: bool = True,
    family: str = "auto",
    *,
    hints: Mapping[str, Any] | None = None,
) -> Stored:
    """Read a weights file, ours or a published project's, onto the CPU.

    Args:
        given: model fields for a published file whose shapes do not tell them (num_heads), see
            `published.read`.
        average: take a published checkpoint's averaged weights where it has them.
        family: the published project, or auto.
        hints: as `given`, of a configuration that starts from the file, see `published.read`.

    Raises MsmdiffError or UsageError for a file that is missing, truncated, of no known layout or
    from a newer version. Nothing in it is executed.
    """
    if is_ours(path):
        about, config = _described(path)
        tensors = tensor_files.read(path)
        _check(path, tensors, config)
        return Stored(path, tensors, config, about)
    found = published.read(path, given, average, family, hints=hints)
    config = road.resolve(
        configuration.build({**found.sections, "model": found.model.model_dump()})
    )
    return Stored(path, found.tensors, config, found.notes)


def is_ours(path: Path) -> bool:
    """Whether a file carries msmdiff's metadata."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        return "msmdiff" in tensor_files.metadata(path)
    except MsmdiffError:
        return False


def is_conversion(path: Path) -> bool:
    """Whether a file is what `weights convert` wrote, which it may write again."""
    return is_ours(path) and "layout" in _described(path)[0]


def stored_config(path: Path) -> Config:
    """The configuration in a weights file of ours. Raises MsmdiffError where it is damaged."""
    return _described(path)[1]


def _described(path: Path) -> tuple[dict[str, Any], Config]:
    """What `save` wrote beside the tensors: the notes, and the configuration."""
    with files.reading(path, "a weights file with whole metadata"):
        about = dict(json.loads(tensor_files.metadata(path)["msmdiff"]))
        version, content = int(about.pop("version")), about.pop("config")
    if version > FORMAT_VERSION:
        raise MsmdiffError(
            f"{path} was written by a newer msmdiff; this one reads format "
            f"{FORMAT_VERSION}: upgrade it"
        )
    layer = configuration.stored(content, str(path))
    try:
        return about, configuration.build(layer)
    except UsageError as error:
        raise UsageError(f"{path} holds a configuration that is not valid: {error}") from None


def _check(path: Path, tensors: dict[str, Tensor], config: Config) -> None:
    """Raises MsmdiffError unless the tensors are exactly the network of the configuration, before
    anything of the size that it claims is made.
    """
    checks.numbers(path, tensors, path.stat().st_size)
    shape = codecs.build(config.codec, config.data.image_size).shape
    try:
        expected = checks.expected(tensors, backbones.resolve(config.model), shape)
        checks.network(path, tensors, expected)
    except MsmdiffError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise MsmdiffError(
            f"{path} does not hold the network that it describes: {reason}"
        ) from None


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    layers: Sequence[dict[str, Any]] = (),
    plugins: Sequence[str | Path] = (),
    **model_fields: Any,
) -> Model:
    """The model of a weights file, a run, or a published checkpoint, in evaluation mode on
    `device`: `load("runs/primer").draw(seeds=range(16), classes=3)` gives images.

    Args:
        path: as `locate` takes it; of a run, `sample.ema` says which average.
        layers: nested configuration dictionaries laid over the stored one, for example
            {"codec": {"vae": FOLDER}} or {"sample": {"sampler": "heun", "steps": 20}}.
        plugins: files, or names of installed ones, to load first: those that it was made with.
        model_fields: what the shapes of a published checkpoint do not tell, such as num_heads=16.

    Raises MsmdiffError where the file's tensors are not exactly a network's, and UsageError for a
    source that is not there or does not say enough.
    """
    for spec in [plugins] if isinstance(plugins, str | Path) else plugins:
        registry.load_plugin(str(spec), "plugins")
    stored, config = _stored_with(path, layers, model_fields)
    parts = road.build(config)
    try:
        parts.backbone.load_state_dict(stored.tensors)
    except RuntimeError as error:
        raise MsmdiffError(f"{path} does not hold the network that it describes: {error}") from None
    backbone = parts.backbone.to(device).eval().requires_grad_(False)
    _set_amm(backbone, config)
    model = Model(
        backbone=backbone,
        process=parts.process.to(device),
        codec=parts.codec,
        condition=parts.objective.condition,
        config=config,
        report=stored.notes,
        path=stored.path,
    )
    known = (json.loads(stored.notes.get(f"class_{key}", "[]")) for key in ("names", "counts"))
    describe(model.condition, *known)
    if config.sample.guide:
        model.guide = _guide(model, device)
    return model


def _stored_with(
    path: str | Path, layers: Sequence[dict[str, Any]], model_fields: dict[str, Any]
) -> tuple[Stored, Config]:
    """What lies in a file, and its configuration under the layers, resolved."""
    asked = [(layer.get("sample") or {}).get("ema") for layer in layers]
    ema = next((decay for decay in reversed(asked) if decay is not None), None)
    stored = read(locate(path, ema=ema), model_fields)
    config = road.resolve(configuration.build(stored.config.as_dict(), *layers))
    if config.sample.ema is not None and ema is None and not Path(path).is_file():
        stored = read(locate(path, ema=config.sample.ema), model_fields)  # as the run was set up
    own = stored.config.model.model_dump() if is_ours(stored.path) else model_fields
    for name, value in model_fields.items():
        if own.get(name) != value:
            raise UsageError(
                f"model.{name} {value}: {stored.path} says itself what its network is "
                f"({own.get(name)})"
            )
    return stored, config


def _set_amm(backbone: Any, config: Config) -> None:
    """Modulate attention as `sample.amm` says. Raises UsageError for a network without it."""
    if config.sample.amm is None:
        return
    if not hasattr(backbone, "set_amm"):
        raise UsageError(
            f"sample.amm {config.sample.amm}: {config.model.family} has no attention modulation"
        )
    formula = config.model.model_dump().get("amm_formula", "exp")
    backbone.set_amm(config.sample.amm, formula, cfg_scale=config.sample.cfg_scale)


def _guide(model: Model, device: torch.device | str) -> Any:
    """The network of `sample.guide`. Raises UsageError where it does not predict what the guided
    one does.
    """
    config = model.config
    source = str(config.sample.guide)
    plain = {"sample": {"guide": None, "amm": None}}
    guide = load(locate(source, ema=config.sample.guide_ema), device, (plain,))
    ours, theirs = config.process, guide.config.process
    for name in ("schedule", "timesteps", "prediction"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UsageError(
                f"the guide {source} has process.{name} {getattr(theirs, name)}, not "
                f"{getattr(ours, name)}: a guide is a weaker version of the same model"
            )
    shape, classes = model.codec.shape, config.model.num_classes
    if guide.codec.shape != shape or guide.config.model.num_classes != classes:
        raise UsageError(
            f"the guide {source} is for {guide.codec.shape} and {guide.config.model.num_classes} "
            f"classes, not {shape} and {classes}"
        )
    return guide.backbone


def locate(source: str | Path, runs: Path = Path("runs"), ema: float | None = None) -> Path:
    """The weights file that a user means by a file, a run directory, or a run's name.

    A checkpoint's folder means its first average. `ema` picks another one: of a run, that of its
    newest checkpoint. Raises UsageError when there is no such run, or none of its weights yet.
    """
    places = [Path(source), runs / source]
    if places[0].is_dir() and not any(places[0].glob("nnet*.pth")) and _is_run(places[1]):
        places = [place for place in places if _is_run(place)]  # a folder hides no run of its name
    for path in places:
        if path.is_dir() and any(path.glob("nnet*.pth")):
            return path  # the training state that U-ViT writes
        if (path / "state.pt").is_file():
            return _of_checkpoint(path, ema)
        if path.is_dir():
            if ema is not None:
                averages = sorted(
                    path.glob(f"checkpoints/img-*/ema-{ema:g}.safetensors"),
                    key=lambda p: (len(p.parent.name), p),
                )
                if not averages:
                    raise UsageError(_no_average(path, ema, "checkpoints/img-*/"))
                return averages[-1]
            if not (path / "weights.safetensors").is_file():
                raise UsageError(
                    f"{path} holds no weights.safetensors: is it a run that has saved a checkpoint?"
                )
            return path / "weights.safetensors"
        if path.is_file():
            if ema is not None:
                raise UsageError(
                    f"{path} is one file: which average (--ema {ema:g}) can be chosen of a run only"
                )
            return path
    raise UsageError(
        f"'{source}' is neither a weights file nor a run directory, here or under {runs}/"
    )


def _of_checkpoint(path: Path, ema: float | None) -> Path:
    """The weights of one checkpoint: an average by its decay, else the first, else the network."""
    if ema is None:
        decays = stored_config(path / "model.safetensors").ema.decays
        ema = decays[0] if decays else None
    found = path / ("model.safetensors" if ema is None else f"ema-{ema:g}.safetensors")
    if not found.is_file():
        raise UsageError(_no_average(path, ema or 0.0))
    return found


def _no_average(path: Path, ema: float, under: str = "") -> str:
    """That there is none of this decay, and which there are."""
    found = {
        p.name[4:].removesuffix(".safetensors") for p in path.glob(f"{under}ema-*.safetensors")
    }
    there = f"its averages have the decays {', '.join(sorted(found))}" if found else "it has none"
    return f"{path} has no average with decay {ema:g} (--ema): {there}"


def best(source: str | Path, runs: Path = Path("runs")) -> Path:
    """The checkpoint that a run's `best.json` names.

    Raises UsageError for what is no run, was never measured, or did not keep that checkpoint.
    """
    run = next((p for p in (Path(source), runs / source) if (p / "best.json").is_file()), None)
    if run is None:
        raise UsageError(
            f"--best: {source} has no best.json: it is written where a training measures its "
            "samples (--set eval.every=1000), or by `msmdiff fid --run`"
        )
    named = json.loads(files.read_text(run / "best.json")).get("checkpoint")
    if not named or not (run / named / "state.pt").is_file():
        raise UsageError(f"--best: {run} did not keep the checkpoint that was best")
    return run / named


def _is_run(path: Path) -> bool:
    return (path / "weights.safetensors").is_file()


def newest(runs: Path = Path("runs")) -> Path:
    """The run that saved weights last. Raises UsageError when there is none."""
    found = list(runs.glob("*/weights.safetensors"))
    if not found:
        raise UsageError(
            f"no run with weights under {runs}/: name a run or a file, or train one with "
            "`msmdiff pretrain`"
        )
    return max(found, key=lambda p: p.stat().st_mtime).parent


def file_of(path: Path) -> Path:
    """The file that holds the numbers: of U-ViT's folder the average, where it has one."""
    return next((f for f in (path / "nnet_ema.pth", path / "nnet.pth") if f.is_file()), path)
