"""The commands in README and docs: the fenced blocks of a page, and the small settings with which
a test runs them.

A block without a language, or of `bash`, is run as it stands. A block is only checked, not run,
where it says so itself: by a line that starts with `# needs ` or `#SBATCH`. A block of `python` or
`yaml` whose first line is `# NAME.py` or `# NAME.yaml` is written to that file.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^ *(`{3,})([a-z]*)[^\n`]*\n(.*?)^ *\1 *$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"^(# needs |#SBATCH)", re.MULTILINE)
NAMED = re.compile(r"# (\S+\.(?:py|yaml|sh))\n")

# What makes a published network small: it keeps its family, its patches and its options.
NARROW = {
    "dit": ["hidden_size=32", "depth=4", "num_heads=2"],
    "uvit": ["hidden_size=32", "depth=3", "num_heads=2"],
    "maskdwt": ["hidden_size=32", "depth=3", "num_heads=2"],
    "mdt": ["hidden_size=32", "depth=6", "num_heads=2"],
    "mdtv2": ["hidden_size=32", "depth=6", "num_heads=2", "decode_layers=2"],
    "edt": ["hidden_size=24", "stage_widths=[24,32,40,32,24]", "stage_heads=[2,2,2,2,2]"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return not NEEDS.search(self.text)

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, where it is one."""
        named = NAMED.match(self.text.removeprefix("#!/bin/bash\n"))
        return named[1] if named else None


def pages() -> list[Path]:
    """README and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text[: match.start()].count("\n") + 1
        indent = len(match[0]) - len(match[0].lstrip(" "))
        body = re.sub(rf"^ {{{indent}}}", "", match[3], flags=re.MULTILINE) if indent else match[3]
        found.append(Block(str(page.relative_to(ROOT)), line, match[2], body))
    return found


def command_lines(script: str) -> Iterator[list[str]]:
    """The arguments of every `msmdiff` in a script, without what launches it."""
    for line in script.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||[|;]", line):
            words = shlex.split(part, comments=True)
            names = [i for i, word in enumerate(words) if Path(word).name == "msmdiff"]
            if names and words[0] not in ("cd", "pip", "git"):
                yield words[names[0] + 1 :]


def small(arguments: list[str]) -> list[str]:
    """A command with settings behind it that make it cheap. The later of two settings counts."""
    verb = arguments[0] if arguments else ""
    if verb in ("train", "pretrain", "finetune"):
        return arguments + _small_training(arguments)
    if verb == "sample":
        return _few_seeds(arguments) + _given("sample.steps=2")
    if verb == "fid":
        return _cheap_features(arguments)
    if verb == "compare" and arguments[1].endswith(".yaml"):
        return [verb, _small_spec(arguments[1]), *arguments[2:]]
    if arguments[:2] == ["data", "features"]:
        return [*arguments, "--steps", "10"]
    if verb == "bench":
        return arguments + _small_bench(arguments)
    if verb == "quickstart" and "--help" not in arguments:
        return ["quickstart", "--help"]  # a test of its own runs it
    return arguments


def _small_training(arguments: list[str]) -> list[str]:
    sets = ["train.steps=2", "train.batch_size=4", "train.preview_every=0", "eval.n=4"]
    sets += ["train.threads=1", "data.workers=0", "sample.steps=2", "eval.heldout_n=4"]
    if any("train.micro_batch_size" in word for word in arguments):
        sets.append("train.micro_batch_size=2")
    return _given(*sets, *_narrow(arguments))


def _small_bench(arguments: list[str]) -> list[str]:
    timed = ["--steps", "1"] + (["--pairs", "2"] if arguments[1:2] == ["train"] else [])
    return timed + _given("train.batch_size=2", *_narrow(arguments))


def _narrow(arguments: list[str]) -> list[str]:
    """The settings that make the network narrow, where the command names a published one."""
    from msmdiff.core import presets, registry

    name = _value(arguments, "--model")
    if (
        name is None
        and (config := _value(arguments, "--config"))
        and not config.startswith("digits")
    ):
        name = presets.read(config).get("model", {}).get("name")
    size = registry.entries("size").get(name or "tiny")
    if size is None or size.name == "tiny":  # a plugin's own is small already
        return []
    return [f"model.{setting}" for setting in NARROW[size.summary.partition(":")[0]]]


def _few_seeds(arguments: list[str]) -> list[str]:
    few = list(arguments)
    if "--seeds" in few:
        place = few.index("--seeds") + 1
        first, dash, _ = few[place].partition("-")
        few[place] = f"{first}-{int(first) + 3}" if dash else first
        return few
    return [*few, "--n", "4"]


def _cheap_features(arguments: list[str]) -> list[str]:
    """Few samples, and a random Inception in place of the published one."""
    drawn = ["--n", "4"] if "--n" in arguments else []
    named = {"--features", "--weights"} & {*arguments}
    return [*arguments, *drawn, *([] if named else ["--weights", "inception.pth"])]


def _small_spec(path: str) -> str:
    """A comparison with the same arms, one seed and a tiny budget."""
    from msmdiff.core import presets

    found = Path(path) if Path(path).is_file() else ROOT / path  # written here, or the project's
    spec = presets.parse_yaml(found.read_text(), path)
    small = {"batch_size": 8, "threads": 1}
    spec |= {"budget": {"images": 32}, "seeds": [0], "slice": 60}
    spec["common"] = {**spec.get("common", {}), "train": small, "sample": {"steps": 2}}
    spec["common"]["eval"] = {"heldout_every": 0}
    spec["measure"] = {**spec.get("measure", {}), "points": 1, "n": 8}
    Path("small.yaml").write_text(presets.dump_yaml(spec))
    return "small.yaml"


def _given(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _value(arguments: list[str], option: str) -> str | None:
    return arguments[arguments.index(option) + 1] if option in arguments[:-1] else None
