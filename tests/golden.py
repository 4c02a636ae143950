"""Reads a case of golden data: its description, its tensors, and its checkpoint as one of our
networks.
"""

import json
import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from msmdiff.core.config import section
from msmdiff.core.diffusion import process
from msmdiff.core.weights import published

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("MSMDIFF_GOLDEN", ROOT.parent / "shared" / "golden"))


class Case:
    """One folder of golden data."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.data = json.loads((folder / "case.json").read_text())
        self.family: str | None = self.data.get("family")
        self.hyper: dict[str, Any] = self.data.get("hyper_parameters", {})
        self.calls: dict[str, dict[str, Any]] = {
            call["name"]: call for call in self.data.get("calls", [])
        }

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / self.data["io"]["file"])

    def inputs(self, call: dict[str, Any], known: set[str]) -> dict[str, Tensor]:
        """The call's inputs, but for those it sets to null; fails on an input that the runner does
        not use.
        """
        assert not (odd := set(call["inputs"]) - known), f"unknown inputs {odd}"
        return {name: self.tensors[at] for name, at in call["inputs"].items() if at is not None}

    @property
    def given(self) -> dict[str, Any]:
        """What no shape tells, and the user states."""
        heads = self.hyper.get("num_heads", self.hyper.get("encoder_heads"))
        given: dict[str, Any] = {"num_heads": heads} if isinstance(heads, int) else {}
        if self.family == "mdtv1":
            given["decode_layers"] = self.hyper["decode_layer"]
        if self.hyper.get("class_dropout_prob") == 0:
            given["null_class"] = False
        if "num_clip_token" in self.hyper:
            given["context_tokens"] = self.hyper["num_clip_token"]
        return given

    @lru_cache(maxsize=2)  # noqa: B019 (cases live as long as the tests)
    def published(self, average: bool = False) -> published.Published:
        path = self.folder / self.data["checkpoint"]["file"]
        if average and "training_folder" in self.data:
            path = self.folder / self.data["training_folder"]["folder"]
        return published.read(path, self.given, average)

    def process(self, **changes: Any) -> process.Process:
        """The process that the checkpoint was recognised to use."""
        return process.build(section("process", **self.published().sections["process"] | changes))


@lru_cache
def cases() -> list[Case]:
    return (
        [Case(path.parent) for path in sorted(FOLDER.glob("*/case.json"))]
        if FOLDER.is_dir()
        else []
    )


def compare(call: dict[str, Any], case: Case, got: dict[str, Tensor]) -> None:
    """Every output of the call within its own tolerance: |got - expected| <= atol + rtol
    |expected|.
    """
    atol, rtol = call["tolerance"]["atol"], call["tolerance"]["rtol"]
    assert not (missing := set(call["outputs"]) - set(got)), f"not computed: {missing}"
    for name, at in call["outputs"].items():
        expected = case.tensors[at]
        assert got[name].shape == expected.shape, (
            f"{name}: {tuple(got[name].shape)} != {tuple(expected.shape)}"
        )
        gap = (got[name].detach().to(expected.dtype) - expected).abs()
        worst = (gap - rtol * expected.abs()).max().item()
        assert worst <= atol, (
            f"{name}: off by {gap.max().item():.3g}, {worst:.3g} beyond rtol, atol {atol:.3g}"
        )


def gradients(case: Case, network: Any) -> dict[str, Tensor]:
    """Gradients under the published names; zeros where none arrived."""
    read = case.published()
    ours = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in network.named_parameters()
    }
    theirs = published.export(ours, read.model, read.shape, read.notes["layout"])
    return {name: tensor for name, tensor in theirs.items() if tensor.is_floating_point()}


def compare_norms(case: Case, got: dict[str, Tensor]) -> None:
    """The norm of every parameter's gradient; null stands for none, which for us may be zeros."""
    table = case.data["gradient_norms"]
    atol, rtol = table["tolerance"]["atol"], table["tolerance"]["rtol"]
    assert set(table["norms"]) == set(got)
    for name, expected in table["norms"].items():
        gap = abs(got[name].norm().item() - (expected or 0.0))
        assert gap <= atol + rtol * (expected or 0.0), f"gradient of {name}: norm off by {gap:.3g}"
