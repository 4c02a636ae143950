"""Counts against the figures that the papers and repositories give (multiply-adds of one forward
pass).
"""

import pytest

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets
from msmdiff.core.training import cost


@pytest.mark.parametrize(
    ("name", "classes", "codec", "size", "giga"),
    [
        ("DiT-XL/2", 1000, "vae", 256, 118.6),
        ("EDT-S/2", 1000, "vae", 256, 2.67),
        ("U-ViT-H/2", 1000, "vae", 256, 133),
        ("MDTv2-XL/2", 1000, "vae", 256, 129.5),
        ("MaskDM-B/4", 0, "pixel", 256, 741.5),
    ],
)
def test_published_costs(name, classes, codec, size, giga):
    config = road.resolve(
        configuration.build(
            {
                "model": {"name": name, "num_classes": classes},
                "codec": {"name": codec},
                "data": {"image_size": size},
            }
        )
    )
    assert cost.measure(config).forward_flops / 2e9 == pytest.approx(giga, rel=0.02)


def test_ninety_percent_masked_maskdm():
    config = road.resolve(
        configuration.build(
            {
                "model": {"name": "MaskDM-B/4"},
                "data": {"image_size": 256},
                "mask": {"ratio": 0.9},
                "objective": {"name": "msm"},
            }
        )
    )
    assert cost.measure(config).masked_flops / 2e9 == pytest.approx(44.3, rel=0.02)


def test_a_network_without_a_null_class_is_counted():
    config = road.resolve(configuration.build(presets.read("uvit-imagenet64-m")))
    assert cost.measure(config).parameters == 130_940_292
