"""One thing of each kind from a file outside the package, used through the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msmdiff.core import backbones, registry
from msmdiff.core.errors import UsageError
from msmdiff.core.sections import ModelConfig

PLUGIN = '''
"""One of everything."""

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from msmdiff.core.backbones.dit import DiT
from msmdiff.core.backbones.family import family
from msmdiff.core.backbones.routes import Route
from msmdiff.core.data.source import Source
from msmdiff.core.diffusion.alignment import Alignment, AlignmentOptions
from msmdiff.core.diffusion.codecs import Codec, to_uint8, to_unit
from msmdiff.core.diffusion.masking import Mask
from msmdiff.core.diffusion.objectives import Dsm
from msmdiff.core.diffusion.predictions import Eps
from msmdiff.core.diffusion.process import uniform
from msmdiff.core.diffusion.schedules import VpSde
from msmdiff.core.diffusion.time_sampling import Uniform
from msmdiff.core.metrics.features import Features
from msmdiff.core.metrics.scores import Metric, score
from msmdiff.core.registry import Options, register
from msmdiff.core.samplers.times import FreeOptions
from msmdiff.core.weights.layout import Network


class GainOptions(Options):
    gain: float = Field(1.0, gt=0, description="brightness")


@register("codec", "bright", GainOptions)
class Bright(Codec):
    """Pixels, brighter."""

    def __init__(self, image_size, *, gain):
        self.shape, self.gain = (3, image_size, image_size), gain

    def encode(self, packed, generator=None):
        return to_unit(packed) * self.gain

    def decode(self, z, rounding="half_even"):
        return to_uint8(z / self.gain, rounding)


class BetaOptions(Options):
    beta_max: float = Field(20.0, gt=0, description="of the last time")


@register("schedule", "steep", BetaOptions)
class Steep(VpSde):
    """The SDE with another end."""

    def __init__(self, timesteps, *, beta_max):
        super().__init__(timesteps)
        self.BETA_MAX = beta_max


class SignOptions(Options):
    sign: float = Field(-1.0, description="of the output")


@register("prediction", "signed", SignOptions)
class Signed(Eps):
    """The noise, times a sign."""

    def __init__(self, schedule, *, sign):
        super().__init__(schedule)
        self.sign = sign

    def target(self, x0, eps, t):
        return self.sign * eps

    def split(self, output, x_t, t):
        return super().split(output / self.sign, x_t, t)


class ScaleOptions(Options):
    loss_scale: float = Field(2.0, gt=0, description="of every loss")


@register("weighting", "scaled", ScaleOptions)
def scaled(*, loss_scale):
    """Every loss times a number."""
    return lambda schedule, prediction, t: loss_scale * torch.ones_like(t)


class SpanOptions(Options):
    earliest: float = Field(0.1, description="first time")


@register("time_sampling", "late", SpanOptions)
class Late(Uniform):
    """Late times only."""

    def __init__(self, schedule, *, earliest):
        super().__init__(schedule)
        self.earliest = earliest

    def draw(self, n, draw):
        t, importance = super().draw(n, draw)
        return t.clamp(min=self.earliest), importance


class StripeOptions(Options):
    stripe: int = Field(2, ge=1, description="every so many columns are kept")


@register("mask", "stripes", StripeOptions)
class Stripes(Mask):
    """Whole columns."""

    def __init__(self, grid, ratio, *, stripe):
        self.columns = [c for c in range(grid[1]) if c % stripe == 0]
        super().__init__(grid, grid[0] * len(self.columns))

    def chosen(self, batch, generator):
        rows = torch.arange(self.grid[0], device=generator.device)[:, None] * self.grid[1]
        columns = torch.tensor(self.columns, device=generator.device)
        return (rows + columns).flatten().expand(batch, -1)


class LateEntryOptions(Options):
    first: int = Field(1, ge=1, description="block before which hidden tokens leave")


@register("route", "shortcut", LateEntryOptions)
class Shortcut:
    """Hidden tokens skip the middle blocks."""

    fill = "own"

    def __init__(self, section, mask, network, *, first):
        self.mask, self.first = mask, first
        self.leave = network.trunk.symmetric_leave(first, first)

    def draw(self, batch, draw):
        keep = self.mask.draw(batch, draw("mask"))
        return None if keep is None else Route(keep, self.first, self.leave, "own", "all")


class TwiceOptions(Options):
    rounds: int = Field(2, ge=1, description="passes")


@register("objective", "twice", TwiceOptions)
class Twice(Dsm):
    """The plain pass, several times."""

    def __init__(self, *, rounds=2):
        self.rounds = rounds

    def settle(self, config, backbone):
        return []

    def passes(self, setting):
        return {f"pass{i}": setting.route(setting.section.route) for i in range(self.rounds)}


class StillOptions(AlignmentOptions):
    stillness: float = Field(0.1, ge=0, description="of early tokens")


@register("alignment", "still", StillOptions)
class Still(Alignment):
    """Small early tokens."""

    def __init__(self, around, *, align_weight, align_until, align_block, stillness):
        block = around.behind("align_block", align_block, 8)
        super().__init__(around, align_weight, align_until, (block,))
        self.stillness = stillness

    def distance(self, seen):
        tokens = seen.hidden[self.student].tokens
        return self.stillness * tokens.square().flatten(1).mean(1)


@family("slim", {"slim/4": dict(patch_size=4, hidden_size=16, depth=4, num_heads=2)})
class Slim(DiT):
    """DiT under another name."""


class HalfOptions(Options):
    damping: float = Field(1.0, gt=0, description="of each step")


@register("sampler", "damped", HalfOptions)
def damped(denoise, schedule, x, times, noise, *, damping):
    """DDIM without noise."""
    alpha, sigma = schedule.alpha_sigma(times)
    for i, t in enumerate(times[:-1]):
        estimate = denoise(x, t)
        x = alpha[i + 1].item() * estimate.x0 + damping * sigma[i + 1].item() * estimate.eps
    return x


@register("times", "cubic", FreeOptions)
def cubic(schedule, intervals, start, end):
    """Evenly spaced in the cube root of t."""
    return torch.linspace(start ** (1 / 3), end ** (1 / 3), intervals + 1).double() ** 3


class StepOptions(Options):
    switch: float = Field(0.5, description="from where on")


@register("guidance", "step", StepOptions)
def step(scale, *, switch):
    """None, then all."""
    return lambda left: torch.where(left > switch, scale, 1.0)


class MomentumOptions(Options):
    momentum: float = Field(0.9, ge=0, lt=1, description="of the update")


@register("optimiser", "sgd", MomentumOptions)
def sgd(parameters, *, momentum, lr, eps, weight_decay):
    """Plain gradient descent."""
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)


class ToneOptions(Options):
    power: float = Field(1.0, gt=0, description="of the values")


@register("features", "tones", ToneOptions)
class Tones(Features):
    """The mean colour."""

    prefix, name, width, resize = "tones", "tones-3", 3, "mean"
    metric, title, suffix = "fd_tones", "tone distance", " over tones"

    def __init__(self, weights=None, device="cpu", *, power, spatial=False):
        self.power, self.device = power, torch.device(device)

    def __call__(self, images):
        return (images.float() / 255).mean((2, 3)) ** self.power, None


class GapOptions(Options):
    gap_power: int = Field(1, ge=1, description="of the difference")


@register("metric", "gap", GapOptions)
class Gap(Metric):
    """How far the means are apart."""

    def scores(self, a, b, features):
        value = float((a.pooled.mean - b.pooled.mean).abs().max()) ** self.options["gap_power"]
        return [score("gap", "gap", value, sets=(a, b), features=features)]


class ShadeOptions(Options):
    shades: int = Field(12, ge=2, description="how many images")


@register("source", "shades", ShadeOptions)
class Shades(Source):
    """Grey squares in two classes."""

    class_names = ("dark", "light")

    @classmethod
    def opens(cls, spec):
        return spec == "shades"

    def __init__(self, spec, *, shades=12):
        self.spec, self.shades = spec, shades
        self.labels = np.arange(shades) * 2 // shades

    def __len__(self):
        return self.shades

    def read(self, index):
        return Image.new("RGB", (20, 20), (index * 255 // self.shades,) * 3)

    def describe(self, index):
        return f"shade {index}"


class Prefixed:
    """U-ViT's tensors behind a prefix."""

    HOLDS = frozenset({"uvit"})

    def matches(self, names):
        return "mine.pos_embed" in names

    def describe(self, tensors, given):
        width = tensors["mine.pos_embed"].shape[-1]
        fields = dict(patch_size=4, hidden_size=width, depth=3, num_heads=2)
        return Network("uvit", (3, 16, 16), 0, fields)

    def to_ours(self, tensors, network):
        return {name.removeprefix("mine."): tensor for name, tensor in tensors.items()}

    def to_published(self, tensors, network):
        return {f"mine.{name}": tensor for name, tensor in tensors.items()}

    def sections(self, network, buffers):
        return {"data": {"image_size": 16}, "codec": {"name": "pixel"}}


register("layout", "prefixed")(Prefixed())
'''
CHOSEN = [
    "data.kind=shades",
    "data.shades=16",
    "codec.name=bright",
    "codec.gain=1.5",
    "model.name=slim/4",
    "process.schedule=steep",
    "process.beta_max=15",
    "process.prediction=signed",
    "process.sign=-2",
    "process.weighting=scaled",
    "process.loss_scale=0.5",
    "process.time_sampling=late",
    "process.earliest=0.2",
    "mask.ratio=0.5",
    "mask.kind=stripes",
    "mask.stripe=2",
    "mask.route=shortcut",
    "mask.first=1",
    "objective.name=twice",
    "objective.rounds=2",
    "optim.name=sgd",
    "optim.momentum=0.5",
    "sample.sampler=damped",
    "sample.damping=0.9",
    "sample.times=cubic",
    "sample.end=0.01",
    "sample.cfg_schedule=step",
    "sample.switch=0.3",
    "sample.steps=3",
]


def sets(items: list[str]) -> list[str]:
    return [word for item in items for word in ("--set", item)]


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(PLUGIN)
    return "mine.py"


def test_one_of_each_kind_is_trained_sampled_and_scored_with(cli, plugin, tmp_path):
    common = ["--plugin", plugin, "--data", "shades", "--image-size", "16", "--batch-size", "4"]
    train = ["train", *common, "--conditional", "--run", "r", *sets(CHOSEN)]
    cli(*train, "--steps", "2")
    assert "resuming" in cli(*train, "--steps", "3").stdout
    lines = (tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert {"pass0_loss", "pass1_loss"} <= set(last)
    assert last["mask_ratio"] == 0.5

    cli("sample", "r", "--plugin", plugin, "--n", "4", "--cfg", "1.5", "--npz", "s.npz")
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (4, 16, 16, 3)
    cli("sample", "r", "--plugin", plugin, "--n", "4", "--sampler", "heun", "--out", "heun")

    score = ["fid", "samples/r", "shades", "--crop", "16", "--plugin", plugin, "--json", "-"]
    found = cli(
        *score, "--features", "tones", "--metrics", "fid,gap", "--set", "metric.gap_power=2"
    )
    content = json.loads(found.stdout)
    assert set(content["scores"]) == {"fd_tones", "gap"}
    assert content["settings"]["gap_power"] == 2
    assert content["scores"]["gap"]["value"] >= 0

    shown = cli("list", "samplers", "damped", "--plugin", plugin).stdout
    assert "damping" in shown
    assert "of each step" in shown
    assert "mine" in cli("list", "plugins", "--plugin", plugin).stdout
    backbones = cli("list", "backbones", "--plugin", plugin).stdout
    assert backbones.count("(plugin mine)") == 1, "what a plugin imports does not become its own"
    report = json.loads(cli("data", "inspect", "shades", "--plugin", plugin, "--json").stdout)
    assert report["classes"] == {"dark": 6, "light": 6}


def test_a_plugin_holds_every_kind_that_there_is():
    registered = set(re.findall(r'register\("(\w+)"', PLUGIN))
    assert registered | {"backbone", "size"} == set(registry.KINDS)
    assert "@family(" in PLUGIN  # which registers those two


def test_checkpoints_of_a_layout_from_outside_are_opened_and_written(cli, plugin, tmp_path):
    fields = dict(patch_size=4, hidden_size=16, depth=3, num_heads=2)
    model = backbones.resolve(ModelConfig(name=None, family="uvit", **fields))
    tensors = backbones.build(model, (3, 16, 16)).state_dict()
    save_file({f"mine.{k}": v.contiguous() for k, v in tensors.items()}, tmp_path / "m.safetensors")
    assert "prefixed" in cli("weights", "show", "m.safetensors", "--plugin", plugin).stdout
    assert "prefixed" not in cli("weights", "show", "m.safetensors", code=1).stdout
    cli("weights", "convert", "m.safetensors", "-o", "ours.safetensors", "--plugin", plugin)
    back = load_file(tmp_path / "ours.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    cli("sample", "ours.safetensors", "--n", "2", "--steps", "2")


def test_a_configuration_names_its_plugins_itself(cli, plugin, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "plugins: [mine.py]\noptim: {name: sgd, momentum: 0.1}\ntrain: {steps: 2, batch_size: 4}\n"
        "objective: {alignment: still, stillness: 0.2}\n"
    )
    cli("train", "--config", "c.yaml", "--run", "r")
    last = json.loads((tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] == pytest.approx(last["mse"] + last["alignment"], rel=1e-5)
    assert last["alignment"] > 0
    assert "momentum: 0.1" in (tmp_path / "runs/r/config.yaml").read_text()


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("optim.momentum=2", "optim.momentum = 2: input should be less than 1"),
        (
            "optim.momentun=0.5",
            "unknown configuration key 'optim.momentun'; did you mean 'momentum'",
        ),
        (
            "optim.no_prox=true",
            "optim.no_prox True has no effect on the optimiser sgd, only on adan",
        ),
        ("process.shift_size=8", "no effect on the schedule steep, only on shifted_cosine"),
        ("sample.eta=1", "sample.eta 1 has no effect on the sampler damped, only on ddim"),
    ],
)
def test_a_wrong_option_is_refused_like_a_built_in_one(cli, plugin, item, words):
    chosen = ["optim.name=sgd", "process.schedule=steep", "sample.sampler=damped", item]
    done = cli("train", "--plugin", plugin, "--dry-run", *sets(chosen), code=2)
    assert words in done.stderr


def test_a_checkpoint_is_refused_by_the_name_of_the_plugin_it_needs(cli, plugin, tmp_path):
    chosen = sets(["optim.name=sgd", "sample.steps=2"])
    cli("train", "--plugin", plugin, "--run", "r", "--steps", "1", "--batch-size", "4", *chosen)
    refused = cli("sample", "r", "--n", "2", code=2).stderr
    assert (
        "runs/r/weights.safetensors needs the plugin mine: name the file with --plugin" in refused
    )
    again = ["train", "--run", "r", "--steps", "2", "--batch-size", "4"]
    assert "needs the plugin mine" in cli(*again, code=2).stderr
    cli("sample", "r", "--plugin", plugin, "--n", "2")


def test_nothing_is_imported_that_nobody_named(cli, tmp_path):
    for folder in (tmp_path, tmp_path / "runs"):
        folder.mkdir(exist_ok=True)
        (folder / "mine.py").write_text("raise SystemExit('imported')")
    cli("train", "--steps", "1", "--batch-size", "4", "--run", "r")
    cli("sample", "r", "--n", "2", "--set", "sample.steps=2")


@pytest.mark.parametrize(
    ("content", "words", "code"),
    [
        (None, "--plugin p.py: there is no such file", 2),
        ("import nowhere_at_all", "the plugin p.py cannot be imported: ModuleNotFoundError", 1),
        ("def broken(:", "the plugin p.py cannot be imported: SyntaxError", 1),
        (
            "from msmdiff.core.registry import register\nregister('sampler', 'ddim')(print)",
            "the plugin p registers the sampler 'ddim', which msmdiff itself has already",
            2,
        ),
    ],
)
def test_a_plugin_that_does_not_load_is_one_sentence(cli, tmp_path, content, words, code):
    if content is not None:
        (tmp_path / "p.py").write_text(content)
    assert words in cli("list", "samplers", "--plugin", "p.py", code=code).stderr


def test_an_installed_plugin_is_loaded_by_its_name_only(cli, tmp_path):
    (tmp_path / "site" / "helper-1.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "helper.py").write_text(PLUGIN)
    about = tmp_path / "site" / "helper-1.dist-info"
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: helper\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[msmdiff.plugins]\nhelping = helper\n")
    path = str(tmp_path / "site")
    assert "helping" in cli("list", "plugins", PYTHONPATH=path).stdout
    assert "damped" not in cli("list", "samplers", PYTHONPATH=path).stdout
    assert "damped" in cli("list", "samplers", "--plugin", "helping", PYTHONPATH=path).stdout
    assert "installed: helping" in cli("list", "--plugin", "x", code=2, PYTHONPATH=path).stderr


HEAD = "from msmdiff.core.registry import Options, register\nfrom pydantic import BaseModel\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("register('samplers', 'x')(print)", r"the kind 'samplers'; did you mean 'sampler'"),
        ("register('metric', 'bare')(object)", r"the metric 'bare' must be a subclass of Metric"),
        ("register('sampler', 's')(lambda x: x)", r"must take the arguments \(denoise, schedule, "),
        (
            "class O(BaseModel):\n    a: int = 1\n"
            "register('sampler', 's', O)(lambda d, s, x, t, n, *, a: x)",
            r"has options O, not a subclass of Options",
        ),
        (
            "class O(Options):\n    steps: int = 1\n"
            "register('sampler', 's', O)(lambda d, s, x, t, n, *, steps: x)",
            r"has an option steps, which is a key of its section already",
        ),
        (
            "class O(Options):\n    a: int = 1\n"
            "register('sampler', 's', O)(lambda d, s, x, t, n: x)",
            r"must take the arguments .*\* ?, ?a\)|must take the arguments .*a\)",
        ),
    ],
)
def test_what_could_not_be_used_is_refused_when_it_is_registered(tmp_path, content, words):
    path = tmp_path / f"wrong{abs(hash(content))}.py"
    path.write_text(HEAD + content)
    with pytest.raises(UsageError, match=words):
        registry.load_plugin(str(path))


def test_every_built_in_could_be_registered_from_outside():
    for kind in registry.KINDS:
        for entry in registry.entries(kind).values():
            assert not registry._wrong_base(kind, entry.make), (kind, entry.name)
            assert not registry._wrong_call(kind, entry.make, entry.options), (kind, entry.name)


def test_an_error_in_a_plugins_code_names_it_and_the_line(cli, tmp_path):
    (tmp_path / "p.py").write_text(
        HEAD + "@register('sampler', 'z')\ndef z(d, s, x, t, n):\n    return 1 / 0\n"
    )
    cli("train", "--steps", "1", "--batch-size", "4", "--run", "r")
    draw = ("sample", "r", "--n", "2", "--plugin", "p.py", "--sampler", "z", "--out", "o")
    assert "the plugin p failed: ZeroDivisionError: division by zero (p.py, line 5)" in (
        cli(*draw, code=1).stderr
    )
    (tmp_path / "p.py").write_text(
        HEAD + "@register('sampler', 'z')\ndef z(d, s, x, t, n):\n    return x[:, :2]\n"
    )
    assert "the sampler z gave [2, 2, 16, 16], not images of the noise's shape" in (
        cli(*draw, code=1).stderr
    )


def test_a_sources_options_reach_it_and_no_other(cli, plugin, tmp_path):
    report = cli(
        "data", "inspect", "shades", "--plugin", plugin, "--set", "data.shades=6", "--json"
    )
    assert json.loads(report.stdout)["images"] == 6
    common = ["train", "--plugin", plugin, "--steps", "1", "--batch-size", "2", "--run", "r"]
    common += ["--set", "data.shades=6", "--image-size", "16"]
    refused = cli(*common, "--data", "digits", code=2).stderr
    assert "data.shades 6 has no effect" in refused
    assert not (tmp_path / "runs" / "r" / "config.yaml").exists()
    cli(*common, "--data", "shades")
    assert "needs the plugin mine" in cli("sample", "r", "--n", "1", code=2).stderr
