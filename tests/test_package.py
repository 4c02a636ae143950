"""The house rules that a machine can check: one-way imports, and nothing that unpickles freely."""

import ast
from pathlib import Path

import msmdiff

ROOT = Path(msmdiff.__file__).parent
LAYERS = [
    {"errors", "systems"},
    {"interrupts", "machine"},
    {"seeding", "registry", "sections", "files", "hub", "npy_header", "zips"},
    {"layers", "tensor_files", "figure_files"},
    {"presets"},
    {"config", "condition"},
    {"backbones"},
    {"diffusion"},
    {"samplers"},
    {"build"},
    {"model", "data"},
    {"weights"},
    {"metrics"},
    {"training"},
    {"bench", "gallery", "report"},
    {"compare"},
    {"cli"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def part_of(module: str) -> str | None:
    names = module.split(".")
    if names[:2] == ["msmdiff", "core"] and len(names) > 2:
        return names[2]
    return "cli" if names[:2] == ["msmdiff", "cli"] else None


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                [f"{node.module}.{a.name}" for a in node.names]
                if node.module == "msmdiff.core"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_run_one_way():
    checked = 0
    for path in ROOT.rglob("*.py"):
        here = part_of(".".join(path.relative_to(ROOT.parent).with_suffix("").parts))
        if here is None or here == "__init__":
            continue
        for module in imports(path):
            there = part_of(module)
            if there is not None:
                assert RANK[there] <= RANK[here], f"{path.relative_to(ROOT)} imports {module}"
                checked += 1
    assert checked > 50


def test_samplers_know_nothing_of_backbones_and_backbones_nothing_of_processes():
    for folder, forbidden in (("samplers", "backbones"), ("backbones", "diffusion")):
        for path in (ROOT / "core" / folder).glob("*.py"):
            assert not [m for m in imports(path) if f".{forbidden}" in m], path


def test_everything_torch_loads_is_weights_only():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(
                    k.arg == "weights_only" and ast.unparse(k.value) == "True"
                    for k in node.keywords
                ), path
