import contextlib
import re
from pathlib import Path

import pytest

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets, registry
from msmdiff.core.errors import UsageError
from msmdiff.core.layers import SECTIONS


def test_precedence_defaults_preset_flags_sets():
    config = configuration.build(
        {"train": {"steps": 1, "seed": 1, "batch_size": 1}},
        {"train": {"steps": 2, "seed": 2}},
        configuration.nest({"train.steps": 3, "train.seed": None}),
        configuration.parse_sets(["train.steps=4"]),
    )
    assert (config.train.steps, config.train.seed, config.train.batch_size) == (4, 2, 1)


def test_yaml_1_2_scalars():
    values = presets.parse_yaml(
        "{a: no, b: 1e-4, c: 3, d: true, e: null, f: 1e3, g: .5, h: -2.5e+1}", "here"
    )
    assert values == {
        "a": "no",
        "b": 1e-4,
        "c": 3,
        "d": True,
        "e": None,
        "f": 1000.0,
        "g": 0.5,
        "h": -25.0,
    }
    assert configuration.build({"train": {"steps": 1e3}}).train.steps == 1000


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"mask": {"ration": 0.5}}, r"'mask\.ration'; did you mean 'ratio'"),
        ({"trian": {}}, r"'trian'; did you mean 'train'"),
        ({"train": {"steps": 0, "seed": -1}}, r"train\.steps = 0.*; train\.seed = -1"),
        ({"train": {"compile": "yes"}}, r"train\.compile = 'yes'.*boolean"),
        ({"train": {"steps": 1.5}}, r"train\.steps = 1\.5"),
        ({"mask": 3}, "mask must be a mapping"),
    ],
)
def test_bad_values_are_named_together(layer, message):
    with pytest.raises(UsageError, match=message):
        configuration.build(layer)


@pytest.mark.parametrize("item", ["steps=3", "train.steps", "train.steps=[1"])
def test_malformed_set(item):
    with pytest.raises(UsageError, match=re.escape(item)):
        configuration.parse_sets([item])


def test_resolve_reports_every_problem():
    config = configuration.build(
        {
            "model": {"num_classes": -1},
            "objective": {"name": "dsm"},
            "mask": {"ratio": 0.5},
            "train": {"batch_size": 10, "micro_batch_size": 4},
        }
    )
    with pytest.raises(UsageError) as caught:
        road.resolve(config)
    for part in (
        "model.num_classes -1",
        "micro_batch_size 4; the nearest valid values are 8 and 12",
        "'msm'",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"data": {"image_size": 18}, "codec": {"name": "dwt"}},
            "18 does not divide by 4 .* are 16 and 20",
        ),
        (
            {"data": {"image_size": 15}},
            "15 does not divide by 2 = model.patch_size; .* are 14 and 16",
        ),
        (
            {"codec": {"name": "dwt", "wavelet": "harr"}},
            "'harr' is not a discrete PyWavelets filter; did you mean 'haar'",
        ),
        ({"codec": {"name": "dwt", "wavelet": "dmey"}}, "'dmey' does not invert exactly"),
        (
            {"objective": {"name": "msm"}, "mask": {"ratio": 0.5, "kind": "block", "block": 3}},
            r"mask.block 3 does not divide the 8x8 token grid; use one of \[1, 2, 4, 8\]",
        ),
        (
            {"model": {"name": "tiny", "num_heads": 5}},
            "hidden_size 64 does not divide by model.num_heads 5",
        ),
        ({"model": {"name": "tiny", "depht": 5}}, "'model.depht' .* did you mean 'depth'"),
        (
            {"model": {"name": None, "family": "uvit", "depth": 2}},
            "model.patch_size: field required",
        ),
    ],
)
def test_cross_checks(layers, message):
    with pytest.raises(UsageError, match=message):
        road.resolve(configuration.build(layers))


LARGE = [-1, 0, 1e308, 10**30, float("nan"), float("inf"), 2**62]
FAMILIES = ["DiT-S/8", "MDT-S/2", "EDT-S/2", "U-ViT-S/2", "tiny"]


def every_key():
    """(a layer that makes a choice, section, key) of every key that there is."""
    for name, kind in SECTIONS.items():
        yield from (({}, name, key) for key in kind.model_fields)
        for choice, registered in kind.CHOICES.items():
            for entry in registry.entries(registered).values():
                made = {name: {choice: entry.name}}
                yield from ((made, name, key) for key in entry.options.model_fields)
    for size in FAMILIES:
        family = registry.entries("size")[size].make["family"]
        options = registry.entries("backbone")[family].options
        yield from (({"model": {"name": size}}, "model", key) for key in options.model_fields)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("section", SECTIONS)
def test_no_number_is_too_large_for_a_sentence(section):
    """Every key with useless numbers, alone and in a list: accepted, or refused with its name."""
    for made, name, key in every_key():
        if name != section:
            continue
        for number in LARGE:
            for value in (number, [number, number]):
                layer = {**made, name: {**made.get(name, {}), key: value}}
                with contextlib.suppress(UsageError):
                    road.resolve(configuration.build(layer))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"model": {"depth": 10**6}}, "model.depth = 1000000: input should be less than or equal"),
        ({"model": {"num_heads": 0}}, "model.num_heads = 0: input should be greater than or equal"),
        ({"model": {"mlp_ratio": -1}}, "model.mlp_ratio = -1: input should be greater"),
        ({"data": {"image_size": 4 * 10**6}}, "data.image_size = 4000000: input should be less"),
        ({"process": {"timesteps": 10**11}}, "process.timesteps = 100000000000: input should be"),
        ({"codec": {"name": "dwt", "level": 10**10}}, "codec.level = 10000000000: input should"),
        ({"train": {"seed": 2**64}}, "train.seed = 18446744073709551616: the number is too large"),
        ({"sample": {"cfg_scale": 1e308}}, r"sample.cfg_scale = 1e\+308: input should be less"),
        ({"optim": {"lr": float("inf")}}, "optim.lr = inf: input should be a finite number"),
        ({"sample": {"steps": "9" * 5000}}, "sample.steps = .*: give a number, or ADM's spacing"),
    ],
)
def test_numbers_out_of_bounds_are_named(layer, message):
    with pytest.raises(UsageError, match=message):
        road.resolve(configuration.build(layer))


def test_another_size_drops_the_old_dimensions():
    first = road.resolve(configuration.build({"model": {"name": "MaskDM-B/4", "num_classes": 7}}))
    second = road.resolve(configuration.build(first.as_dict(), {"model": {"name": "tiny"}}))
    assert second.model.model_dump()["hidden_size"] == 64
    assert second.model.num_classes == 7


def test_difference_ignores_what_may_change():
    a = configuration.build({})
    b = configuration.build(
        {"train": {"steps": 7, "log_every": 3, "seed": 5}, "sample": {"steps": 9}}
    )
    assert configuration.difference(a, b) == {"train.seed": (0, 5)}


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_valid_and_complete(name):
    content = presets.read(name)
    config = road.resolve(configuration.build(content), data_classes=10)
    assert configuration.build(presets.parse_yaml(config.to_yaml(), name)) == config
    assert {"data", "model", "process", "mask", "objective", "optim", "ema", "train"} <= set(
        content
    )
    text = (presets.folder() / f"{name}.yaml").read_text()
    assert text.startswith("#"), "a preset says what it is"


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(UsageError, match="digits-pretrain"):
        presets.read("digits-pretrian")


def test_configs_lie_beside_the_package():
    assert (presets.folder() / "digits-pretrain.yaml").is_file()
    assert Path(presets.folder()).name == "configs"


def test_another_optimiser_drops_the_old_ones_betas():
    config = road.resolve(
        configuration.build(
            {"optim": {"name": "adamw", "betas": [0.9, 0.99]}}, {"optim": {"name": "adan"}}
        )
    )
    assert config.optim.betas == [0.98, 0.92, 0.99]
    kept = configuration.build({"optim": {"betas": [0.9, 0.99]}}, {"optim": {"name": "adamw"}})
    assert kept.optim.betas == [0.9, 0.99]


def test_a_value_that_fits_no_alternative_is_told_by_its_key_alone():
    with pytest.raises(UsageError, match=r"^model\.num_classes = 1000000000000: input sho") as told:
        configuration.build({"model": {"num_classes": 10**12}})
    assert "constrained" not in str(told.value)
    with pytest.raises(UsageError, match=r"^ema\.decays\.1 = 'x': input should be a valid number"):
        configuration.build({"ema": {"decays": [0.9, "x"]}})
