"""Timing: turns that favour neither, parts that add up, and the products that are counted."""

import json
import time

import pytest
import torch

from msmdiff.core.bench import timing
from msmdiff.core.bench.timing import Clock, Pairs, Watched

CPU = torch.device("cpu")


def test_ratios_come_from_pairs():
    """The machine halves its speed from the second pair on; the ratio stays three."""
    found = Pairs(first=[1.0, 2.0, 2.0], second=[3.0, 6.0, 6.0]).as_dict()
    assert found["ratios"] == [3.0, 3.0, 3.0]
    assert (found["median"], found["low"], found["high"], found["pairs"]) == (3.0, 3.0, 3.0, 3)


def test_who_comes_first_alternates():
    order = []
    timing.alternate(lambda: order.append("a"), lambda: order.append("b"), CPU, 2, 1, warmup=1)
    # warm-up of each, then two calls a slice, of which the first is not measured
    assert order == ["a", "b", *"aabb", *"bbaa"]


def test_watched_methods_are_timed_and_all_else_is_the_objects_own():
    class Thing:
        size = 3

        def work(self, seconds):
            time.sleep(seconds)
            return "done"

    clock = Clock(CPU)
    watched = Watched(Thing(), clock, work="part")
    assert (watched.work(0.02), watched.size) == ("done", 3)
    assert clock.seconds["part"] >= 0.02
    clock.start()
    assert clock.seconds["part"] == 0


def test_products_are_counted_by_their_shapes():
    layer = torch.nn.Linear(8, 16, device="meta")
    with timing.Products() as found, torch.no_grad():
        layer(torch.empty(4, 8, device="meta"))
        layer(torch.empty(4, 8, device="meta"))
    assert found.shapes == {(1, 4, 8, 16): 2}
    with pytest.raises(ValueError, match="no matrix products"):
        timing.products_peak(type(found.shapes)(), CPU, torch.float32)


def test_bench_train_tells_parts_that_add_up(cli):
    sets = ["--set", "train.batch_size=8", "--steps", "2"]
    done = cli("bench", "train", "--config", "digits-pretrain", *sets, "--json")
    masked, full = json.loads(done.stdout)["results"]
    assert (masked["kept"], full["kept"], full["tokens"]) == (6, 64, 64)
    for row in (masked, full):
        parts = dict(row["parts_ms"])
        whole = parts.pop("whole")
        # medians of each: they add up up to the spread
        assert sum(parts.values()) == pytest.approx(whole, rel=0.5)
        assert row["estimated_memory_bytes"] == pytest.approx(row["peak_memory_bytes"], rel=0.3)
        assert row["images_per_s"] == pytest.approx(8000 / row["ms_per_step"])
    assert full["flops_per_s"] * full["ms_per_step"] > 5 * (
        masked["flops_per_s"] * masked["ms_per_step"]
    )


def test_bench_train_compares_two_settings_in_turns(cli):
    sets = ["--set", "train.batch_size=8", "--steps", "1", "--pairs", "2"]
    configs = ["--config", "digits-pretrain", "--vs", "digits-finetune"]
    found = json.loads(cli("bench", "train", *configs, *sets, "--json").stdout)
    assert found["pairs"] == 2
    expected = [b / a for a, b in zip(found["first_seconds"], found["second_seconds"], strict=True)]
    assert found["ratios"] == pytest.approx(expected)
    assert cli("bench", "train", "--config", "nope", code=2).stderr.startswith("error: ")
