"""What must hold of tensors before a network is made for them: they are real, finite, and exactly
the network's.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from msmdiff.core import backbones
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.sections import ModelConfig

SPARE = 2
"""A network may register a parameter again (tied, or replaced): so many times what it ends with."""


def numbers(path: Path, tensors: Mapping[str, Tensor], size: int) -> None:
    """Check the tensors of a file of `size` bytes before anything is computed from them.

    Raises MsmdiffError where they claim more numbers than the file holds (they may lie upon each
    other), where one is empty, or holds a number that is not finite.
    """
    # MDT's integer indices are one table, saved under many names, and not of the network.
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    if sum(tensor.numel() * tensor.element_size() for tensor in floats) > size:
        raise MsmdiffError(f"{path} is damaged: its tensors claim more numbers than it holds")
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise MsmdiffError(f"{path} is damaged: {name} of shape {list(tensor.shape)} is empty")
        if not torch.isfinite(tensor).all():
            raise MsmdiffError(
                f"{path} holds numbers that are not finite (in {name}): its training failed; take "
                "an earlier checkpoint"
            )


def expected(
    tensors: Mapping[str, Tensor], model: ModelConfig, shape: tuple[int, int, int]
) -> dict[str, Tensor]:
    """The state dict, without numbers, of a network that is to hold these tensors.

    Raises MsmdiffError when it is far larger than they are: a file may claim any depth.
    """
    with torch.device("meta"), _no_larger(tensors):
        state: dict[str, Tensor] = backbones.build(model, shape).state_dict()
    return state


@contextmanager
def _no_larger(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Stop the making of a network as soon as it has outgrown these tensors."""
    parameters = SPARE * len(tensors)
    room = SPARE * sum(tensor.numel() for tensor in tensors.values())

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal parameters, room
        if parameter is None:
            return
        parameters, room = parameters - 1, room - parameter.numel()
        if parameters < 0 or room < 0:
            raise MsmdiffError("the network that it describes is larger than its tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def network(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises MsmdiffError unless the tensors are exactly a network's, by name, shape and kind."""
    problems = []
    for what, names in (
        ("lacks the tensor", expected.keys() - tensors.keys()),
        ("has an unknown tensor", tensors.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            problems.append(f"{what} {min(names)}{more}")
    for name in sorted(expected.keys() & tensors.keys()):
        found, wanted = tensors[name], expected[name]
        if found.shape != wanted.shape:
            problems.append(f"has {name} of shape {list(found.shape)}, not {list(wanted.shape)}")
            break
        if found.is_floating_point() != wanted.is_floating_point():
            problems.append(f"has {name} in {found.dtype}, which is not {wanted.dtype}")
            break
    if problems:
        raise MsmdiffError(f"{path} {' and '.join(problems)} (in msmdiff's names)")
