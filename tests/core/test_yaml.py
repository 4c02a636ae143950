"""One reader and one writer of YAML 1.2."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msmdiff.core import config as configuration
from msmdiff.core import presets
from msmdiff.core.errors import UsageError

WORDS = [
    "2024-photos",
    "2024-01-01",
    "2024-13-45",
    "1e5",
    "1_000",
    "0o17",
    "0x1f",
    "010",
    "no",
    "on",
    "y",
    "null",
    "~",
    ".inf",
    ".nan",
    "=",
    "<<",
    "-",
    "?",
    "12:30:45",
    "10,20,30",
    "+1",
    "true",
    "# c",
    "a: b",
    "*a",
    "&a",
    "!x",
    "%x",
    "@x",
    "`x",
    "'",
    '"',
    "[",
    "{",
    " lead",
    "trail ",
    "\t",
    "x\ny",
    "é\x07\x85",
]
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12
)


@pytest.mark.parametrize("word", ["", *WORDS])
def test_a_string_stays_a_string(word):
    content = {"key": word, word: [word]}
    assert presets.parse_yaml(presets.dump_yaml(content), "here") == content


@pytest.mark.parametrize("word", ["\x85", "\u2028", "a\x85b", "\ufeff", "\x00"])
def test_what_does_not_show_is_kept(word):
    assert presets.parse_yaml(presets.dump_yaml({"key": word}), "here") == {"key": word}


def test_equal_lists_are_written_out():
    shared = [1, 2]
    assert presets.parse_yaml(presets.dump_yaml({"a": shared, "b": shared}), "here")["b"] == [1, 2]


@given(values)
def test_plain_values_survive_the_round_trip(value):
    assert presets.parse_yaml(presets.dump_yaml({"v": value}), "here") == {"v": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-photos", "2024-photos"),
        ("2024-01-01", "2024-01-01"),
        ("10,20,30", "10,20,30"),
        ("1e-4", 1e-4),
        ("no", "no"),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        (".inf", math.inf),
        ("'5'", "5"),
        ("[1, .5, x]", [1, 0.5, "x"]),
    ],
)
def test_what_set_reads(text, value):
    assert configuration.parse_sets([f"a.b={text}"]) == {"a": {"b": value}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1", "is not valid YAML"),
        ("{a: 1, a: 2}", "twice"),
        ("&a [*a, *a]", "alias"),
        ("!!python/object:os.system x", "tag"),
        ("{[1]: 2}", "is not valid YAML"),
        ("!!python/object:x {}", "tag"),
        ("!!str 1", "tag"),
        ("a: 1\n---\nb: 2", "several documents"),
        ("'x", "is not valid YAML"),
        ("9" * 5000, "is not valid YAML"),
        ("0x" + "f" * 5000, "too many digits"),
        ("[" * 5000, "is not valid YAML"),
    ],
)
def test_what_is_no_plain_value_is_one_sentence(text, words):
    with pytest.raises(UsageError, match=words) as caught:
        presets.parse_yaml(text, "here")
    assert "\n" not in str(caught.value)


def test_a_base_is_laid_under_a_file_and_a_circle_is_named(tmp_path):
    (tmp_path / "low.yaml").write_text("optim: {name: adamw, betas: [0.9, 0.9], lr: 0.1}\n")
    (tmp_path / "high.yaml").write_text("base: low.yaml\noptim: {name: adan}\n")
    read = presets.read(str(tmp_path / "high.yaml"))
    assert read == {"optim": {"name": "adan", "lr": 0.1}}, "another optimiser's betas do not apply"
    (tmp_path / "low.yaml").write_text("base: high.yaml\n")
    with pytest.raises(UsageError, match="its base leads back to itself"):
        presets.read(str(tmp_path / "high.yaml"))
    (tmp_path / "low.yaml").write_text("base: nowhere\n")
    with pytest.raises(UsageError, match=r"low.yaml: base nowhere: no such file"):
        presets.read(str(tmp_path / "high.yaml"))


def test_a_run_of_a_name_like_a_number_resumes(cli, tmp_path, photos):
    photos.rename(tmp_path / "2024-photos")
    train = ["train", "--data", "2024-photos", "--image-size", "16", "--run", "r"]
    train += ["--batch-size", "4", "--set", "train.preview_every=0"]
    cli(*train, "--steps", "1")
    assert "resuming" in cli(*train, "--steps", "2").stdout
