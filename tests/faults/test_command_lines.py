"""Command lines and configurations that nobody would write end in an exit code and a sentence."""

import pytest
from children import require_calm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import require_key

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.layers import SECTIONS

COMMANDS = [
    ["train", "--dry-run"],
    ["pretrain", "--dry-run"],
    ["finetune", "--dry-run"],
    ["sample"],
    ["fid"],
    ["fid", "stats"],
    ["compare"],
    ["list"],
    ["data", "inspect"],
    ["data", "encode"],
    ["data", "pack"],
    ["weights", "show"],
    ["weights", "convert"],
    ["weights", "export"],
    ["bench", "train", "--vs"],
]
FLAGS = ["--config", "--data", "--mask", "--steps", "--set", "--run", "--ckpt", "--classes"]
FLAGS += ["--n", "--seeds", "--cfg", "--out", "--npz", "--features", "--metrics", "--plugin", "-o"]
WORDS = ["digits", "nothing", "0", "-1", "1e308", "nan", "2**9", "", "mask.ratio=x", "a.b.c=1"]
WORDS += ["train.steps=[1", "sample.steps=10,20", "mnist5k:val", "../..", "/dev/null", "é", "--"]

lines = st.tuples(
    st.sampled_from(COMMANDS),
    st.lists(st.sampled_from(FLAGS + WORDS) | st.text(max_size=6), max_size=5),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
names = st.sampled_from(sorted({key for kind in SECTIONS.values() for key in kind.model_fields}))
contents = st.dictionaries(
    st.sampled_from(list(SECTIONS)) | st.text(max_size=8),
    st.dictionaries(names | st.text(max_size=8), values, max_size=3) | values,
    max_size=3,
)


def check_lines(children, tmp_path, count):
    # `../..` is a word, too: what it names must not be what other tests have left.
    folder = tmp_path / "a" / "b" / "c" / "d"
    folder.mkdir(parents=True)

    @settings(max_examples=count, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(lines)
    def run(line):
        command, words = line
        words = [word for word in words if "\0" not in word and word.isprintable()]
        end = children.command(folder, *command, *words)
        # `fid digits digits` may look for Inception's weights, and for nothing else.
        end.seen = [each for each in end.seen if "'github.com', 443" not in each]
        require_calm(end, 0, 1, 2)

    run()


def test_some_command_lines(children, tmp_path):
    check_lines(children, tmp_path, 60)


@pytest.mark.slow
def test_many_command_lines(children, tmp_path):
    check_lines(children, tmp_path, 3000)


def check_configurations(count):
    @settings(max_examples=count, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(contents)
    def build(content):
        try:
            config = configuration.build({"model": {"name": "tiny"}}, content)
            resolved = road.resolve(config, 10)
        except MsmdiffError as error:
            require_key(str(error))
            return
        again = configuration.build(presets.parse_yaml(resolved.to_yaml(), "c.yaml"))
        assert again == resolved

    build()


def test_some_configurations():
    check_configurations(150)


@pytest.mark.slow
def test_many_configurations():
    check_configurations(7000)
