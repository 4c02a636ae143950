"""Timing: turns that favour neither, parts that add up, and the products that are counted."""

import json
import time

import pytest
import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets
from msmdiff.core.bench import growth, loading, planning, sampling, tables, timing
from msmdiff.core.bench.timing import Clock, Pairs, Watched
from msmdiff.core.errors import UsageError

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


def resolved(name, *layers):
    return road.resolve(configuration.build(presets.read(name), *layers), data_classes=10)


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [({"sampler": "ddim"}, 6), ({"sampler": "heun", "times": None}, 11), ({"cfg_scale": 2}, 6)],
)
def test_a_drawing_counts_its_evaluations(options, evaluations):
    small = {"model": {"hidden_size": 16, "num_heads": 2, "depth": 3}}
    config = resolved("digits-uvit", small, {"sample": {"steps": 6, "cfg_scale": 1, **options}})
    found = sampling.measure(config, 2, CPU, repeats=2)
    assert found.evaluations == evaluations
    per_batch = found.ms_per_evaluation * evaluations * (1 + found.beside_network)
    assert found.ms_per_batch == pytest.approx(per_batch)
    assert found.images_per_s == pytest.approx(2000 / found.ms_per_batch)


def test_waiting_is_the_share_of_what_comes_too_late(monkeypatch):
    now = 0.0

    class Clock:
        def perf_counter(self):
            return now

        def sleep(self, seconds):
            nonlocal now
            now += seconds

    monkeypatch.setattr(loading, "time", Clock())

    def slow():
        while True:
            loading.time.sleep(0.03)
            yield 1

    assert loading._waited(slow(), 0.5, 0.01) == pytest.approx(0.75)


def test_a_plan_follows_from_the_operations():
    """U-ViT-H/2 at batch 128 on an A100: the published speed and memory within a tenth."""
    layer = {"train": {"batch_size": 128, "precision": "bf16", "gradient_checkpointing": False}}
    config = resolved("uvit-imagenet256-h", layer)
    alone = planning.make(config, "a100")
    assert 1000 / alone.ms_per_step == pytest.approx(1.14, rel=0.1)
    assert alone.memory_gib * 1024 == pytest.approx(54324, rel=0.11)
    assert (alone.fits, alone.advice) == (True, "")
    assert alone.hours == pytest.approx(alone.ms_per_step * alone.steps / 3.6e6)
    eight = planning.make(config, "a100", gpus=8, share=0.7)
    assert alone.ms_per_step / eight.ms_per_step == pytest.approx(16)
    assert eight.batch_per_gpu == 16
    small = planning.make(config, "rtx4090")
    assert not small.fits
    assert "gradient_checkpointing=true would take" in small.advice


def test_a_plan_counts_every_ratio_of_the_mask():
    plain = planning.flops_per_image(resolved("digits-finetune"))
    masked = planning.flops_per_image(resolved("digits-pretrain"))
    tail = resolved("digits-pretrain", {"mask": {"tail": 0.25}})
    expected = 0.75 * masked + 0.25 * plain
    assert planning.flops_per_image(tail) == pytest.approx(expected, rel=0.05)
    again = resolved("digits-finetune", {"train": {"gradient_checkpointing": True}})
    assert planning.flops_per_image(again) == pytest.approx(plain * 4 / 3)
    second = resolved("digits-finetune", {"train": {"gradient_checkpointing": 2}})
    assert planning.flops_per_image(second) == pytest.approx(plain * 7 / 6)


def test_tables_stand_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    (found,) = tables.measure([tables.Row("digits-finetune", 4)], CPU, steps=3)
    assert (found.kept, found.tokens) == (64, 64)
    assert found.images_per_s == pytest.approx(4000 / found.ms)
    assert found.low <= found.ms <= found.high
    tables.write(page, tables.markdown([found], "A machine"))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| digits-finetune, batch 4 | 64 of 64 |") == 1
    page.write_text("nothing")
    with pytest.raises(UsageError, match=r"page\.md has no place for tables"):
        tables.write(page, "")


def test_the_rows_of_some_presets_can_be_asked_for():
    device = torch.device("cuda")
    presets_of = {row.preset for row in tables.rows(device, ["edt-xl", "mdtv2-xl"])}
    assert presets_of == {"edt-xl", "mdtv2-xl"}
    assert len(tables.rows(device)) > len(tables.rows(device, ["dit-xl"])) > 1
    with pytest.raises(UsageError, match=r"--only dit: there is no such row .* dit-xl"):
        tables.rows(device, ["dit"])


def test_the_other_benches_run(cli, tmp_path):
    found = json.loads(cli("bench", "fid", "--features", "pixel", "--json").stdout)
    assert found["features"] == "pixel-8x8"
    reading = ("--image-size", "16", "--seconds", "0.2", "--step-ms", "5", "--json")
    found = json.loads(cli("bench", "data", "digits", *reading).stdout)
    assert found["workers"] == 0
    assert 0 <= found["waited"] <= 1
    (tmp_path / "growth.png").write_bytes(b"mine")
    refused = cli("bench", "growth", "-o", "growth.png", code=2).stderr
    assert "growth.png is there already" in refused
    refused = cli("bench", "plan", "--config", "dit-xl", "--gpu", "h1000", code=2).stderr
    assert "--gpu h1000: choose one of a100," in refused


def test_what_a_step_grows_with(tmp_path):
    tiny = {"model": {"hidden_size": 16, "num_heads": 2, "depth": 3}, "train": {"batch_size": 2}}
    points = growth.measure(resolved("digits-finetune", tiny), CPU, steps=1)
    ideal = {(point.axis, point.value): point.ideal_ms for point in points}
    assert ideal["batch", 4] == pytest.approx(2 * ideal["batch", 2])
    assert ideal["ratio", 0.9] < 0.2 * ideal["ratio", 0.0]
    assert [point.value for point in points if point.axis == "tokens"] == [16, 64, 256]
    growth.draw(points, "title", tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
