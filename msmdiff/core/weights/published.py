"""Opens the checkpoints that DiT, SiT, MDT, EDT, U-ViT and MaskDM published, and writes their
layouts back.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from msmdiff.core import backbones, registry, tensor_files
from msmdiff.core.backbones.blocks import BlockOptions
from msmdiff.core.diffusion.process import Process
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.sections import ModelConfig
from msmdiff.core.weights import checks
from msmdiff.core.weights.layout import Network, Tensors


class Format(Protocol):
    """One published project's layout: a module of this package, or of a plugin.

    `HOLDS` are our families that it can hold. A layout may also have `file_content(state,
    process)`, what its project's code expects around the tensors; `claims(file name, arguments)`,
    whether a file whose keys are also another layout's is this one's; and `admit(arguments)`, which
    raises UsageError where the training's arguments say that it is not to be read.
    """

    HOLDS: frozenset[str]

    def matches(self, names: set[str]) -> bool:
        """Whether a state dict with these keys is this project's."""

    def describe(self, tensors: Tensors, given: Mapping[str, Any]) -> Network:
        """Read the network off its tensors; given: model fields that the user states."""

    def to_ours(self, tensors: Tensors, network: Network) -> Tensors: ...

    def to_published(self, tensors: Tensors, network: Network) -> Tensors: ...

    def sections(self, network: Network, buffers: Tensors) -> dict[str, Any]:
        """The configuration, without its model, that this network was trained for."""


def formats() -> dict[str, Format]:
    """Every published project's layout, by name."""
    return {name: entry.make for name, entry in registry.entries("layout").items()}


@dataclass
class Published:
    """A published checkpoint, translated.

    Attributes:
        tensors: our network's tensors, complete and of the right shapes.
        model: the resolved model section.
        shape: (C, H, W) of the network's input.
        sections: the other sections of the configuration that say what it was trained for, as
            nested dictionaries.
        notes: where it came from: `layout`, `weights` (which of the file's), `size` (published, ""
            for none).
    """

    path: Path
    tensors: Tensors
    model: ModelConfig
    shape: tuple[int, int, int]
    sections: dict[str, Any]
    notes: dict[str, str]

    def build(self) -> Any:
        """The network with its numbers, on the CPU, in evaluation mode."""
        network = backbones.build(self.model, self.shape)
        network.load_state_dict(self.tensors)
        return network.eval()


UNTOLD = ("num_heads", "null_class", "decode_layers", "context_tokens")
"""Model fields that the shapes of tensors do not tell."""


def read(
    path: Path,
    given: Mapping[str, Any] | None = None,
    average: bool = True,
    family: str = "auto",
    *,
    hints: Mapping[str, Any] | None = None,
) -> Published:
    """Read a published checkpoint: a state dict, a training checkpoint, or U-ViT's folder of one.

    Args:
        given: model fields that override what is read off the tensors, such as num_heads.
        average: take the averaged weights (EMA) where the file has them beside the last ones.
        family: a name in `formats`, or auto to go by the keys.
        hints: those of UNTOLD in a configuration that is to start from the file; its network may be
            of another family, which has not all of them.

    Raises MsmdiffError or UsageError, in one sentence, for a file that is missing, damaged, of
    another project or of another family than forced, for one that would execute code, and for
    tensors that are not exactly a network's.
    """
    given, hints = dict(given or {}), dict(hints or {})
    content, file = load(path, average)
    state, buffers, which = unwrap(content, average)
    told = arguments(content)
    name = recognise(path, set(state), family, told)
    checks.numbers(path, state, file.stat().st_size)
    layout = formats()[name]
    try:
        network = layout.describe(state, hints | given)
        num_classes = given.pop("num_classes", network.num_classes)
        fields = network.fields | _known_to(network.family, hints) | given
        model = backbones.resolve(
            ModelConfig(name=None, family=network.family, num_classes=num_classes, **fields)
        )
        expected = checks.expected(state, model, network.shape)
        tensors = layout.to_ours(state, network)
        sections = layout.sections(network, buffers)
        if hasattr(layout, "admit"):
            layout.admit(told)
    except KeyError as error:
        raise MsmdiffError(
            f"{path} looks like a {name} checkpoint, but lacks the tensor {error}"
        ) from None
    except (UsageError, MsmdiffError) as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception:  # shapes that fit no network: maps index, divide and reshape by them
        raise MsmdiffError(
            f"{path} looks like a {name} checkpoint, but its tensors have other shapes"
        ) from None
    checks.network(path, tensors, expected)
    notes = {"layout": name, "weights": which or file.name, "size": size_of(model)}
    return Published(
        path=path, tensors=tensors, model=model, shape=network.shape, sections=sections, notes=notes
    )


def _known_to(family: str, hints: dict[str, Any]) -> dict[str, Any]:
    """Those of the hints that a family's networks have."""
    fields = registry.find("backbone", family, "model.family").options.model_fields
    return {name: value for name, value in hints.items() if name in fields}


def export(tensors: Tensors, model: ModelConfig, shape: tuple[int, int, int], name: str) -> Tensors:
    """Our tensors under a published project's keys: the exact inverse of `read`.

    Raises UsageError when that project has no such network.
    """
    if name not in formats():
        raise UsageError(f"--format {name}: the published layouts are {', '.join(formats())}")
    fields = {
        k: v for k, v in model.model_dump().items() if k not in ("name", "family", "num_classes")
    }
    family, num_classes = str(model.family), int(model.num_classes)
    plain = (
        {"final_conv": False, "context_tokens": 0, "skip": True, "null_class": True}
        if name == "maskdm"
        else {}
    )
    plain |= BlockOptions().model_dump()  # what no published network has
    odd = [k for k, value in plain.items() if fields.get(k, value) != value]
    if family not in formats()[name].HOLDS or odd:
        what = f"model.{odd[0]}={fields[odd[0]]}" if odd else f"model.family {family}"
        raise UsageError(f"--format {name} cannot hold a network with {what}")
    return formats()[name].to_published(tensors, Network(family, shape, num_classes, fields))


def file_content(state: Tensors, process: Process, name: str) -> Any:
    """What a project's own code expects in a file around a network's tensors under its keys."""
    wrap = getattr(formats()[name], "file_content", None)
    return state if wrap is None else wrap(state, process)


def load(path: Path, average: bool = True) -> tuple[Any, Path]:
    """What lies in a file, and which file it was (a folder of U-ViT has two). Never executes
    anything.

    Raises what `tensor_files.read` does.
    """
    if path.is_dir():
        names = ("nnet_ema.pth", "nnet.pth") if average else ("nnet.pth",)
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise MsmdiffError(
                f"{path} is a folder without {' or '.join(names)}: name a checkpoint file"
            )
        path = found[0]
    return tensor_files.read(path), path


AVERAGES = ("ema", "model_ema", "ema_model", "ema_state_dict", "model_ema_state_dict")
LAST = ("model", "model_state_dict", "state_dict", "module")
"""Under which keys training checkpoints keep their networks."""

WRAPPERS = ("module.", "ema_model.", "model.")
"""Prefixes of a network inside another module."""

INNER = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and checkpointing put into names, at any depth."""


def unwrap(content: Any, average: bool = True) -> tuple[Tensors, Tensors, str]:
    """A checkpoint's content -> the network's tensors, the buffers saved beside them, and which
    weights they are.

    Training checkpoints hold a network under one of LAST, and its average under one of AVERAGES;
    MaskDM's hold the network inside its diffusion (`model.`), and its average inside ema_pytorch's
    (`ema_model.`). The name is "" for a bare state dict.
    """
    held, which = _held(content, (*AVERAGES, *LAST) if average else LAST)
    state = {INNER.sub("", name): tensor for name, tensor in held.items()}
    buffers: Tensors = {}
    while prefix := next((p for p in WRAPPERS if any(n.startswith(p) for n in state)), None):
        inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        if prefix == "model.":
            buffers = {name: t for name, t in state.items() if not name.startswith(prefix)}
        state = inside
    return state, buffers, which


def _held(content: Any, keys: Sequence[str]) -> tuple[Tensors, str]:
    """The tensors under the first of the keys that holds any (`model_ema.module` has two levels),
    else those of the content itself; and that key.
    """
    if not isinstance(content, Mapping):
        return {}, ""
    for key in keys:
        if found := _held(content.get(key), LAST if keys is not LAST else ())[0]:
            return found, key
    return {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}, ""


def arguments(content: Any) -> dict[str, Any]:
    """What a training was started with, where its checkpoint tells (`args`)."""
    given = content.get("args") if isinstance(content, Mapping) else None
    told = given.state if isinstance(given, tensor_files.Shell) else given
    return {str(k): v for k, v in told.items()} if isinstance(told, Mapping) else {}


def recognise(
    path: Path, names: set[str], family: str = "auto", told: Mapping[str, Any] | None = None
) -> str:
    """The layout (a name in `formats`) of a state dict with these keys.

    `told`: the arguments of its training, where the file has them. Raises when it is none, or not
    the one forced.
    """
    if family != "auto" and family not in formats():
        raise UsageError(f"--family {family}: the families are auto, {', '.join(formats())}")
    found = [name for name, layout in formats().items() if layout.matches(names)]
    if not found:
        some = ", ".join(sorted(names)[:3]) or "no tensors"
        raise MsmdiffError(f"{path} is no checkpoint of {', '.join(formats())}: it holds {some}")
    # Of several with the same keys, the one that the file or its name tells of.
    claims = (name for name in found if _claimed(formats()[name], path, told or {}))
    likely = next(claims, found[0])
    if family not in ("auto", *found):
        raise UsageError(f"{path} is a {likely} checkpoint, not {family} as --family says")
    return likely if family == "auto" else family


def _claimed(layout: Format, path: Path, told: Mapping[str, Any]) -> bool:
    claims = getattr(layout, "claims", None)
    return claims is not None and bool(claims(path.name, told))


def size_of(model: ModelConfig) -> str:
    """The published size whose fields a model has, or ""."""
    fields = model.model_dump()

    def value(name: str, given: Any) -> Any:
        return given // 2 if name == "depth" and model.family in ("uvit", "maskdwt") else given

    for size, known in backbones.sizes().items():
        if size != "tiny" and all(
            value(k, fields.get(k)) == value(k, v) for k, v in known.items() if k != "amm"
        ):
            return size
    return ""
