"""`bench`: how fast a training step is, with and without the mask; and the other speeds that people
decide by, as commands of their own.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def register(app: typer.Typer) -> None:
    """Add the command, which works without a sub-command too."""
    group = typer.Typer(invoke_without_command=True, rich_markup_mode="markdown")
    group.callback(
        epilog="Examples: `msmdiff bench` · `msmdiff bench --model MaskDM-S/4 --image-size 64 "
        "--batch-size 16` · "
        "`msmdiff bench --config digits-pretrain --mask 0.5 --mask 0.9 --json` · "
        "`msmdiff bench train --config digits-pretrain --vs digits-finetune`"
    )(bench)
    group.command("train")(train)
    group.command(
        "sample", epilog="Example: `msmdiff bench sample --config dit-xl --batch-size 16`"
    )(sample)
    group.command(
        "data", epilog="Example: `msmdiff bench data photos/ --image-size 256 --step-ms 120`"
    )(data)
    group.command("tables", epilog="Example: `msmdiff bench tables --into docs/benchmarks.md`")(
        tables
    )
    group.command(
        "growth", epilog="Example: `msmdiff bench growth --config digits-finetune -o growth.png`"
    )(growth)
    group.command("fid", epilog="Example: `msmdiff bench fid --weights inception.pth`")(fid)
    group.command(
        "plan",
        epilog="Example: `msmdiff bench plan --config dit-xl --gpu h100 --gpus 8` · `msmdiff "
        "bench plan --config maskdm-celebahq-90p --gpu rtx4090 --set train.batch_size=64`",
    )(plan)
    app.add_typer(group, name="bench")


def bench(
    context: typer.Context,
    config: Annotated[str | None, typer.Option(help="A preset's name or a YAML file.")] = None,
    model: Annotated[str | None, typer.Option(help="A size by its name.")] = None,
    image_size: Annotated[int | None, typer.Option(help="The images' side in pixels.")] = None,
    codec: Annotated[str | None, typer.Option(help="The space. See `list codecs`.")] = None,
    mask: Annotated[
        list[float] | None,
        typer.Option(help="A ratio to compare with no mask; may be repeated."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps that are measured, after two others.")
    ] = 10,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"] | None,
        typer.Option(help="By default the configuration's."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set any other key: `--set train.compile=true`."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON, on stdout.")] = False,
) -> None:
    """Time whole training steps on random images, without a mask and with each of the given ones.

    Without --mask it takes 0.9, or the two passes of MDT and EDT.
    """
    if context.invoked_subcommand is not None:
        return
    from msmdiff.cli.console import Console, print_json
    from msmdiff.core import config as configuration
    from msmdiff.core import presets

    flags: dict[str, Any] = {
        "model.name": model,
        "data.image_size": image_size,
        "codec.name": codec,
        "train.batch_size": batch_size,
        "train.precision": precision,
    }
    preset = presets.read(config) if config else {}
    layers = [preset, configuration.nest(flags), configuration.parse_sets(sets or [])]
    report = _measure(layers, mask, steps)
    if as_json:
        print_json(report)
        return
    peak = report["matmul_peak_flops_per_s"]
    title = (
        f"{report['model']}, {report['image_size']} px, batch {report['batch_size']}, "
        f"{report['precision']}, {report['device']}, matrix peak {peak / 1e12:.2f} TFLOP/s"
    )
    header = ("tokens seen", "images/s", "ratio", "ms/step", "TFLOP/s", "of peak", "memory")
    rows = report["results"]
    Console().table(title, header, [_row(row, rows[0]) for row in rows])


def _measure(layers: list[dict[str, Any]], masks: list[float] | None, steps: int) -> dict[str, Any]:
    """Every asked step of a configuration, without a mask first, and on what it was measured."""

    from msmdiff.core import backbones
    from msmdiff.core import build as road
    from msmdiff.core import config as configuration
    from msmdiff.core.bench import training as timing
    from msmdiff.core.bench.timing import matmul_peak
    from msmdiff.core.training.launch import choose_precision

    device = _device()
    rows: list[timing.Timing] = []
    peak = 0.0
    asked: list[tuple[float, str]] = [(0.0, "dsm")]
    for ratio, objective in asked:
        masked = {"mask": {"ratio": ratio}, "objective": {"name": objective}}
        chosen = configuration.build(*layers[:-1], masked, layers[-1])
        chosen = road.resolve(chosen, data_classes=10)
        if not rows:  # MDT and EDT have masks of their own
            own = backbones.network_class(chosen.model).published_objective is not None
            asked += [(r, "auto") for r in masks or [0.0 if own else 0.9]]
        chosen.train.precision = choose_precision(chosen, device.type)
        peak = peak or matmul_peak(device, timing.dtype_of(chosen))
        rows.append(timing.training_step(chosen, steps, peak))
    return {
        **_machine(),
        "model": chosen.model.name,
        "image_size": chosen.data.image_size,
        "precision": chosen.train.precision,
        "batch_size": chosen.train.batch_size,
        "matmul_peak_flops_per_s": peak,
        "results": [row.as_dict() for row in rows],
    }


def _row(row: dict[str, Any], first: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['kept']} of {row['tokens']}",
        f"{row['images_per_s']:,.1f}",
        f"{row['images_per_s'] / first['images_per_s']:.2f}",
        f"{row['ms_per_step']:,.1f}",
        f"{row['flops_per_s'] / 1e12:.3f}",
        f"{row['peak_fraction']:.0%}",
        f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
    )


def train(
    config: Annotated[str, typer.Option(help="A preset's name or a YAML file.")] = (
        "digits-pretrain"
    ),
    vs: Annotated[
        str | None, typer.Option(help="Another preset or file: both are timed in alternation.")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps that are measured, with --vs in a slice.")
    ] = 5,
    pairs: Annotated[int, typer.Option(min=2, help="How many pairs of slices --vs times.")] = 10,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set any key, of both: `--set train.batch_size=8`."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON, on stdout.")] = False,
) -> None:
    """Show where a training step's time goes, with the configuration's route and without.

    With --vs, two configurations are timed in alternation and compared pair by pair.
    """

    from msmdiff.cli.console import print_json
    from msmdiff.core.bench import timing
    from msmdiff.core.bench import training as trainings

    first = _resolved(config, sets)
    device = _device()
    if vs is not None:
        second = _resolved(vs, sets)
        works = [trainings.Training(chosen) for chosen in (first, second)]
        found = timing.alternate(works[0], works[1], device, pairs, steps)
        report = {"first": config, "second": vs, **found.as_dict()}
        print_json(report) if as_json else _show_pairs(report)
        return
    peak = timing.matmul_peak(device, trainings.dtype_of(first))
    rows = {"as configured": trainings.full_report(trainings.Training(first), steps, peak)}
    plain = trainings.without_route(first)
    if rows["as configured"]["kept"] < rows["as configured"]["tokens"]:
        rows["every token"] = trainings.full_report(trainings.Training(plain), steps, peak)
    report = {"config": config, "matmul_peak_flops_per_s": peak, "results": list(rows.values())}
    print_json(report) if as_json else _show_parts(config, rows)


Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Set any key: `--set train.batch_size=8`.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Only JSON, on stdout.")]


def sample(
    config: Annotated[str, typer.Option(help="A preset's name or a YAML file.")] = "digits-uvit",
    batch_size: Annotated[int, typer.Option(min=1, help="How many images are drawn at once.")] = 64,
    repeats: Annotated[int, typer.Option(min=2, help="How many drawings are timed.")] = 3,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Show how fast a configuration's sampler draws images, and what it costs beside the network.

    The network is a fresh one: speed does not depend on what it has learned.
    """
    from msmdiff.core.bench import sampling

    chosen = _resolved(config, sets)
    found = sampling.measure(chosen, batch_size, _device(), repeats).as_dict()
    report = {"config": config, **_machine(), "batch_size": batch_size, **found}
    options = chosen.sample
    rows = [
        ("sampler, evaluations", f"{options.sampler}, {found['evaluations']}"),
        ("images/s, without decoding", f"{found['images_per_s']:,.1f}"),
        ("ms a batch", f"{found['ms_per_batch']:,.1f}"),
        ("ms an evaluation of the bare network", f"{found['ms_per_evaluation']:,.2f}"),
        ("the sampler beside it", f"{found['beside_network']:+.1%}"),
    ]
    _show(f"Drawing {batch_size} images at once", config, rows, report, as_json)


def data(
    source: Annotated[str, typer.Argument(help="The images, as `--data` takes them.")],
    image_size: Annotated[int, typer.Option(min=1, help="The images' side in pixels.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="The images of one step.")] = 64,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to read.")] = 10.0,
    step_ms: Annotated[
        float | None,
        typer.Option(min=0.0, help="Also read beside steps of so many milliseconds."),
    ] = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Show how fast images are read as in training, and how long a network would wait for them."""
    from msmdiff.cli.console import Console
    from msmdiff.core import config as configuration
    from msmdiff.core.bench import loading
    from msmdiff.core.data.checking import open_training

    flags = {"source": source, "image_size": image_size}
    chosen = configuration.build({"data": flags}, configuration.parse_sets(sets or [])).data
    images = open_training(chosen, Console().note)
    found = loading.measure(images, chosen, batch_size, seconds, step_ms).as_dict()
    report = {"source": source, "image_size": image_size, "batch_size": batch_size, **found}
    rows = [
        ("images", f"{len(images):,}"),
        ("decoding processes", f"{found['workers']}"),
        ("seconds until the first batch", f"{found['first_s']:.2f}"),
        ("images/s", f"{found['images_per_s']:,.0f}"),
    ]
    if step_ms is not None:
        rows.append((f"waiting, beside steps of {step_ms:g} ms", f"{found['waited']:.1%}"))
    _show(f"Reading at {image_size} pixels", source, rows, report, as_json)


def fid(
    features: Annotated[str, typer.Option(help="A feature network (`list features`).")] = (
        "inception"
    ),
    weights: Annotated[
        Path | None, typer.Option(help="Its weights; by default cached or downloaded.")
    ] = None,
    image_size: Annotated[int, typer.Option(min=8, help="The images' side in pixels.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per network pass.")] = 50,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Of features: `--set features.precision=bf16`")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how fast a feature network reads images, and how long a distance takes."""
    from msmdiff.core import config as configuration
    from msmdiff.core.bench import scoring
    from msmdiff.core.errors import UsageError
    from msmdiff.core.metrics import features as networks

    options = configuration.parse_sets(sets or [])
    if set(options) - {"features"}:
        raise UsageError(f"--set: only keys of features apply here, not {', '.join(options)}")
    device = _device()
    network = networks.build(features, weights, device, **options.get("features", {}))
    found = scoring.measure(network, image_size, batch_size, device).as_dict()
    report = {**_machine(), "image_size": image_size, "batch_size": batch_size, **found}
    rows = [
        ("images/s", f"{found['images_per_s']:,.1f}"),
        ("seconds a distance", f"{found['frechet_s']:.2f}"),
        ("minutes for 50,000 images", f"{found['minutes_for_50k']:.1f}"),
    ]
    _show(f"Measuring images of {image_size} pixels", found["features"], rows, report, as_json)


def tables(
    steps: Annotated[int, typer.Option(min=3, help="Timed steps of each training.")] = 15,
    only: Annotated[
        list[str] | None, typer.Option(help="Time this preset's rows only; may be repeated.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="A page with two marks, between which the table is put.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time training steps of the papers' networks on this device, as a table for a page.

    On a GPU those are the XL networks with torch.compile, some minutes; on a CPU three small ones.
    """
    import platform

    from msmdiff.cli.console import Console, print_json
    from msmdiff.core.bench import tables as measuring

    device = _device()
    where = _machine()
    machine = f"{where['device']}, Python {platform.python_version()}, torch {where['torch']}"
    found = []
    for row in measuring.measure(measuring.rows(device, only or []), device, steps):
        found.append(row)
        if not as_json:
            Console().note(f"{row.title}: {row.ms:,.1f} ms a step, {row.of_peak:.0%} of peak")
        if into is not None:  # after every row: what was measured is kept, whatever comes
            measuring.write(into, measuring.markdown(found, machine))
    if as_json:
        print_json({**where, "results": [row.as_dict() for row in found]})
    elif into is None:
        Console().note(measuring.markdown(found, machine))


def growth(
    out: Annotated[Path, typer.Option("-o", "--out", help="The picture, a PNG.")],
    config: Annotated[str, typer.Option(help="A preset's name or a YAML file, without a mask.")] = (
        "digits-finetune"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each setting.")] = 7,
    sets: Sets = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there already.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how a step's time and memory grow with the mask, the batch and the tokens.

    Beside them stands what the counted operations alone would ask for.
    """
    from msmdiff.core.bench import growth as measuring
    from msmdiff.core.errors import UsageError

    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: give a name that ends in .png")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out} is there already: give another name, or --overwrite")
    points = measuring.measure(_resolved(config, sets), _device(), steps)
    where = _machine()
    measuring.draw(points, f"{config}, {where['device']}, torch {where['torch']}", out)
    report = {"config": config, **where, "points": [point.as_dict() for point in points]}
    rows = [
        (f"{p.axis} {p.value:g}", f"{p.ms:,.1f} ms, {p.gib:.2f} GiB, ideal {p.ideal_ms:,.1f} ms")
        for p in points
    ]
    _show("A step as one thing changes", config, rows, report, as_json)


def plan(
    config: Annotated[str, typer.Option(help="A preset's name or a YAML file.")],
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, rtx4090, ...")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, max=65536, help="How many of them.")] = 1,
    share: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1.0, help="Of the data sheet's bf16 products a second; default: 0.35."
        ),
    ] = None,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="Divide weights and optimiser among them (FSDP).")
    ] = False,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Show what a training would cost on other GPUs: memory, milliseconds a step, hours.

    The operations are counted; the share of the data sheet's speed is assumed. Published trainings
    of U-ViT-H/2 and DiT-XL/2 lie within a tenth of it (docs/benchmarks.md).
    """
    from msmdiff.core.bench import planning

    chosen = _resolved(config, sets, "cuda")
    share = planning.SHARE if share is None else share
    report = planning.make(chosen, gpu, gpus, share, sharded).as_dict()
    rows = [
        ("batch on each", f"{report['batch_per_gpu']:,}"),
        ("memory of each, GiB", f"{report['memory_gib']:.1f}"),
        ("ms a step", f"{report['ms_per_step']:,.0f}"),
        ("images/s", f"{report['images_per_s']:,.0f}"),
        ("steps", f"{report['steps']:,}"),
        ("hours", f"{report['hours']:,.1f}"),
        ("GPU-hours", f"{report['gpu_hours']:,.0f}"),
    ]
    if not report["fits"]:
        rows.append(("does not fit", report["advice"]))
    title = f"{gpus} x {report['gpu']}, {share:.0%} of its data sheet"
    _show(title, config, rows, {"config": config, **report}, as_json)


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _machine() -> dict[str, str]:
    """What a figure was measured on."""
    import torch

    from msmdiff.core import machine

    return {"device": machine.name_of(_device()), "torch": torch.__version__}


def _show(
    title: str, what: str, rows: list[tuple[str, str]], report: dict[str, Any], as_json: bool
) -> None:
    from msmdiff.cli.console import Console, print_json

    print_json(report) if as_json else Console().table(title, ("", what), rows)


def _resolved(name: str, sets: list[str] | None, device: str | None = None) -> Any:
    """A preset or a file, resolved for ten classes, with its precision chosen."""
    from msmdiff.core import build as road
    from msmdiff.core import config as configuration
    from msmdiff.core import presets
    from msmdiff.core.training.launch import choose_precision

    layers = [presets.read(name), configuration.parse_sets(sets or [])]
    chosen = road.resolve(configuration.build(*layers), data_classes=10)
    chosen.train.precision = "bf16" if device else choose_precision(chosen, _device().type)
    return chosen


def _show_pairs(report: dict[str, Any]) -> None:
    from msmdiff.cli.console import Console

    rows = [
        (str(i + 1), f"{1000 * a:,.1f}", f"{1000 * b:,.1f}", f"{b / a:.2f}")
        for i, (a, b) in enumerate(
            zip(report["first_seconds"], report["second_seconds"], strict=True)
        )
    ]
    header = ("pair", f"{report['first']}, ms", f"{report['second']}, ms", "ratio")
    Console().table("Steps of two trainings, in alternation", header, rows)
    Console().note(
        f"{report['first']} is {report['median']:.2f} times as fast as {report['second']} "
        f"(quartiles {report['low']:.2f} to {report['high']:.2f}, {report['pairs']} pairs)"
    )


def _show_parts(config: str, reports: dict[str, dict[str, Any]]) -> None:
    from msmdiff.cli.console import Console

    parts = list(next(iter(reports.values()))["parts_ms"])
    rows = [(part, *(f"{r['parts_ms'][part]:,.2f}" for r in reports.values())) for part in parts]
    for title, show in (
        ("ms a step", lambda r: f"{r['ms_per_step']:,.1f}"),
        ("images/s", lambda r: f"{r['images_per_s']:,.0f}"),
        ("TFLOP/s", lambda r: f"{r['flops_per_s'] / 1e12:.3f}"),
        ("of a large product's peak", lambda r: f"{r['peak_fraction']:.0%}"),
        ("of its own products' peak", lambda r: f"{r['own_peak_fraction']:.0%}"),
        ("peak memory, GiB", lambda r: f"{r['peak_memory_bytes'] / 2**30:.2f}"),
        ("estimated memory, GiB", lambda r: f"{r['estimated_memory_bytes'] / 2**30:.2f}"),
    ):
        rows.append((title, *(show(r) for r in reports.values())))
    header = (config, *(f"{name}: {r['kept']} of {r['tokens']}" for name, r in reports.items()))
    Console().table("A training step; its parts in ms, medians", header, rows)
