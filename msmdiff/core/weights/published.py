"""Opens the checkpoints that DiT, MDT, EDT, U-ViT and MaskDM published, and writes their layouts
back.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from msmdiff.core import backbones, registry
from msmdiff.core.diffusion.process import Process
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.sections import ModelConfig
from msmdiff.core.weights.layout import Network, Tensors


class Format(Protocol):
    """One published project's layout: a module of this package, or of a plugin.

    `HOLDS` are our families that it can hold.
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


def read(
    path: Path, given: Mapping[str, Any] | None = None, average: bool = True, family: str = "auto"
) -> Published:
    """Read a published checkpoint: a state dict, a training checkpoint, or U-ViT's folder of one.

    Args:
        given: model fields that override what is read off the tensors, such as num_heads.
        average: take the averaged weights (EMA) where the file has them beside the last ones.
        family: a name in `formats`, or auto to go by the keys.

    Raises MsmdiffError or UsageError, in one sentence, for a file that is missing, damaged, of
    another project or of another family than forced, for one that would execute code, and for
    tensors that are not exactly a network's.
    """
    given = dict(given or {})
    content, file = load(path, average)
    state, buffers, which = unwrap(content, average)
    name = recognise(path, set(state), family)
    layout = formats()[name]
    try:
        network = layout.describe(state, given)
        num_classes = given.pop("num_classes", network.num_classes)
        model = backbones.resolve(
            ModelConfig(
                name=None, family=network.family, num_classes=num_classes, **network.fields | given
            )
        )
        with torch.device("meta"):
            expected = backbones.build(model, network.shape).state_dict()
        tensors = layout.to_ours(state, network)
        sections = layout.sections(network, buffers)
    except KeyError as error:
        raise MsmdiffError(
            f"{path} looks like a {name} checkpoint, but lacks the tensor {error}"
        ) from None
    except (UsageError, MsmdiffError) as error:
        raise type(error)(f"{path}: {error}") from None
    except (ValueError, IndexError, RuntimeError):
        raise MsmdiffError(
            f"{path} looks like a {name} checkpoint, but its tensors have other shapes"
        ) from None
    check(path, tensors, expected)
    notes = {"layout": name, "weights": which or file.name, "size": size_of(model)}
    return Published(
        path=path, tensors=tensors, model=model, shape=network.shape, sections=sections, notes=notes
    )


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

    Raises UsageError where there is none, and MsmdiffError for anything but a safetensors file or a
    torch file of plain values.
    """
    if path.is_dir():
        names = ("nnet_ema.pth", "nnet.pth") if average else ("nnet.pth",)
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise MsmdiffError(
                f"{path} is a folder without {' or '.join(names)}: name a checkpoint file"
            )
        path = found[0]
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path), path
        with path.open("rb") as file:
            start = file.read(512).lstrip().lower()
        if start.startswith((b"<!doctype", b"<html", b"<?xml")):
            raise MsmdiffError(f"{path} is a web page, not a checkpoint: download the file itself")
        # DiT and EDT keep their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True), path
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise MsmdiffError(
                f"{path} asks to run code ({wanted[1]}), so it was not opened; nothing was executed"
            ) from None
        raise MsmdiffError(f"{path} is not a checkpoint that torch wrote, or is damaged") from None
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise MsmdiffError(f"{path} is truncated or damaged: {reason[0]}") from None


def unwrap(content: Any, average: bool = True) -> tuple[Tensors, Tensors, str]:
    """A checkpoint's content -> the network's tensors, the buffers saved beside them, and which
    weights they are.

    Training checkpoints hold `model` and `ema`; MaskDM's hold the network inside its diffusion
    (`model.`), and its average inside ema_pytorch's (`ema_model.`). The name is "" for a bare state
    dict.
    """
    which = ""
    if isinstance(content, Mapping):
        for key in ("ema", "model", "state_dict") if average else ("model", "state_dict"):
            if isinstance(content.get(key), Mapping):
                content, which = content[key], key
                break
    if not isinstance(content, Mapping):
        return {}, {}, which
    state = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}
    for prefix in ("module.", "ema_model.", "model."):
        if any(name.startswith(prefix) for name in state):
            inner = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
            if prefix == "model.":
                return (
                    inner,
                    {name: t for name, t in state.items() if not name.startswith(prefix)},
                    which,
                )
            state = inner
    return state, {}, which


def recognise(path: Path, names: set[str], family: str = "auto") -> str:
    """The layout (a name in `formats`) of a state dict with these keys. Raises when it is none, or
    not the one forced.
    """
    found = next((name for name, layout in formats().items() if layout.matches(names)), None)
    if family != "auto" and family not in formats():
        raise UsageError(f"--family {family}: the families are auto, {', '.join(formats())}")
    if found is None:
        some = ", ".join(sorted(names)[:3]) or "no tensors"
        raise MsmdiffError(f"{path} is no checkpoint of {', '.join(formats())}: it holds {some}")
    if family not in ("auto", found):
        raise UsageError(f"{path} is a {found} checkpoint, not {family} as --family says")
    return found


def check(path: Path, tensors: Tensors, expected: Mapping[str, Tensor]) -> None:
    """Raises MsmdiffError unless the tensors are exactly a network's, by name and shape."""
    problems = []
    for what, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has", tensors.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            problems.append(
                f"{what} {'the tensor' if what == 'lacks' else 'an unknown tensor'} "
                f"{min(names)}{more}"
            )
    for name in sorted(expected.keys() & tensors.keys()):
        if tensors[name].shape != expected[name].shape:
            problems.append(
                f"has {name} of shape {list(tensors[name].shape)}, not {list(expected[name].shape)}"
            )
            break
    if problems:
        raise MsmdiffError(f"{path} {' and '.join(problems)} (in msmdiff's names)")


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
