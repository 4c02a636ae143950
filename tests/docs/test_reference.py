"""The reference pages say everything that can be chosen and set, and come from the registry."""

import re
import sys

import pages
import pytest

sys.path.insert(0, str(pages.ROOT / "docs"))

import reference


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return {name: write() for name, write in reference.PAGES.items()}


def test_every_key_and_every_choice_is_there(written):
    from msmdiff.core import presets, registry
    from msmdiff.core.layers import SECTIONS

    for section, model in SECTIONS.items():
        for key in model.model_fields:
            assert f"| `{section}.{key}` |" in written["keys"]
    for kind in registry.KINDS:
        page = written["models" if kind == "size" else "choices"]
        for name in registry.entries(kind):
            assert f"| `{name}` |" in page, f"{kind} {name}"
    for name in presets.names():
        assert f"| `{name}` |" in written["presets"], name
    assert "a plain and a masked pass in every step. |" in written["presets"]  # two lines long


def test_every_key_is_described_in_a_sentence():
    from msmdiff.core import registry
    from msmdiff.core.layers import SECTIONS

    models: dict = dict(SECTIONS)
    for kind in registry.KINDS:
        for entry in registry.entries(kind).values():
            models[f"{kind} {entry.name}"] = entry.options
    for name, model in models.items():
        for key, field in model.model_fields.items():
            about = field.description or ""
            assert about[:1].isupper(), f"{name} {key}: {about}"
            assert about.endswith("."), f"{name} {key}: {about}"


def test_options_of_a_choice_stand_beside_their_key(written):
    assert "| `dpm_solver` | `sample.order` | `2` |" in written["keys"]
    assert "| `loss_second_moment`" not in written["keys"]  # it has none


def test_every_command_has_its_options(written):
    assert "## msmdiff data encode\n" in written["commands"]
    assert "| `--conditional` `--unconditional` |" in written["commands"]
    assert "| `--save-stats` `-o` `--out` |" in written["commands"]


def test_tables_keep_their_columns(written):
    for page in written.values():
        for line in page.splitlines():
            if line.startswith("|"):
                assert line.replace("\\|", "").count("|") in (3, 4, 5), line


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    text = (pages.ROOT / name).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        assert (pages.ROOT / link).exists(), link
