"""Whatever ends a command early, the same command ends with the same bits: kills at any instant,
and every operation on a file failed once.
"""

import random
import shutil
import signal
from pathlib import Path
from signal import SIGINT

import pytest
from children import Children, End, Job, require_calm
from scenarios import SCENARIOS, make_inputs, numbers

from msmdiff.cli import console


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class Undisturbed:
    """How each scenario ends when nothing happens to it: the bits, its file operations for each
    kind of fault, and how long it takes.
    """

    def __init__(self, children: Children, inputs: Path, folder: Path) -> None:
        self._children, self._inputs, self._folder = children, inputs, folder
        self._known: dict[str, tuple[dict[str, str], dict[str, list[str]], float]] = {}

    def of(self, name: str) -> tuple[dict[str, str], dict[str, list[str]], float]:
        if name not in self._known:
            scenario, bits, operations, took = SCENARIOS[name], {}, {}, 0.0
            for kind in ("writes", "all"):
                folder = scenario.prepare(self._inputs, self._folder / name / kind)
                # No operation has this number.
                fault = "none" if kind == "writes" else "EIO"
                end = self._children.command(folder, *scenario.argv, fault=fault, at=-1)
                require_calm(end, 0)
                again = numbers(folder)
                assert not bits or bits == again
                bits, operations[kind], took = again, end.operations, end.took
            self._known[name] = bits, operations, took
        return self._known[name]


@pytest.fixture(scope="module")
def undisturbed(children, inputs, tmp_path_factory) -> Undisturbed:
    return Undisturbed(children, inputs, tmp_path_factory.mktemp("undisturbed"))


def assert_same_bits(folder: Path, bits: dict[str, str]) -> None:
    """A folder holds what an undisturbed command leaves, number for number, and nothing else."""
    found = numbers(folder)
    assert found.keys() == bits.keys(), f"other files: {found.keys() ^ bits.keys()}"
    different = [name for name in bits if found[name] != bits[name]]
    assert not different, f"other bits in {different}"


def instants(operations: list[str], few: int, name: str) -> list[int]:
    """Some numbers of operations; with `few` 0 all, but of equal ones in a row (a long file is
    written in many parts) the first and the last.
    """
    around = [None, *operations, None]
    ends = [i for i, each in enumerate(operations) if not around[i] == each == around[i + 2]]
    return random.Random(name).sample(ends, min(few, len(ends))) if few else ends


def names_the_file(end: End, operation: str) -> bool:
    """Whether the sentence names what the operation was on, or a folder above it."""
    path = Path(operation.split("\t")[1])
    own = [path.name.removeprefix(".").removesuffix(".npy").removesuffix(".part")]
    return any(part in end.err for part in [*own, *path.parts[:-1]])


AT_ONCE = 2
"""Commands that run side by side, each in a folder of its own."""


def fail_at(children, inputs, undisturbed, folder, name, kind, few):
    """Fail, or kill at, some operations of a scenario, and run it again after each."""
    scenario = SCENARIOS[name]
    bits, operations, _ = undisturbed.of(name)
    problems = []
    chosen = instants(operations["all" if kind == "EIO" else "writes"], few, name + kind)
    for some in (chosen[i : i + AT_ONCE] for i in range(0, len(chosen), AT_ONCE)):
        places = {at: scenario.prepare(inputs, folder / str(at)) for at in some}
        hit = [Job(str(places[at]), scenario.argv, fault=kind, at=at) for at in some]
        failed = dict(zip(some, children.run(*hit), strict=True))
        # An old checkpoint that could not be removed stops no training: the next start removes it.
        stopped = [
            at for at in some if failed[at].code or numbers(places[at]).keys() != bits.keys()
        ]
        again = children.run(*[Job(str(places[at]), scenario.argv) for at in stopped])
        reruns = dict(zip(stopped, again, strict=True))
        for at, end in failed.items():
            # Threads do not always read in the same order.
            operation = end.operations[at] if at < len(end.operations) else "none\tnone"
            try:
                assert_failed_well(end, kind, operation)
                if at in reruns:
                    assert_ran_again(reruns[at])
                assert_same_bits(places[at], bits)
            except AssertionError as error:
                problems.append(f"{name}: {kind} at {at}, {operation}: {error}")
            shutil.rmtree(places[at])
    assert not problems, "\n\n".join([f"{len(problems)} problems", *problems])


def assert_failed_well(end: End, kind: str, hit: str) -> None:
    """What is asked of a command that was killed or interrupted, or whose operation failed."""
    if kind == "kill":
        assert end.code == -9, end
        assert end.seen == []
        return
    if kind == "SIGINT":
        require_calm(end, 0, 128 + SIGINT)
        return
    require_calm(end, 0, 1, 2)
    assert end.code == 0 or names_the_file(end, hit), end.err


def assert_ran_again(end: End) -> None:
    """The same command ends well, or says that what it makes was there already."""
    require_calm(end, 0, 2)
    assert end.code == 0 or "is there already" in end.err, end.err


KINDS = ("kill", "ENOSPC", "EIO", "SIGINT")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_few_operations(children, inputs, undisturbed, tmp_path, name, kind):
    fail_at(children, inputs, undisturbed, tmp_path, name, kind, few=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "SIGINT"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_operation(children, inputs, undisturbed, tmp_path, name, kind):
    fail_at(children, inputs, undisturbed, tmp_path, name, kind, few=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_many_interrupts(children, inputs, undisturbed, tmp_path, name):
    fail_at(children, inputs, undisturbed, tmp_path, name, "SIGINT", few=20)


def kill_at_random(children, inputs, undisturbed, folder, name, times):
    """Kill a scenario at random instants, several times on the way to one end."""
    scenario, draw = SCENARIOS[name], random.Random(name)
    bits, _, took = undisturbed.of(name)
    for i in range(times):
        place = scenario.prepare(inputs, folder / str(i))
        for _ in range(3):
            after = draw.uniform(0, took)
            end = children.command(place, *scenario.argv, kill_after=after)
            assert end.code in (0, -9), f"{end.code}\n{end.out}\n{end.err}"
            if end.code == 0:
                break
        else:
            assert_ran_again(children.command(place, *scenario.argv))
        assert_same_bits(place, bits)


@pytest.mark.parametrize("name", ["train", "sample"])
def test_kills_at_a_few_random_instants(children, inputs, undisturbed, tmp_path, name):
    kill_at_random(children, inputs, undisturbed, tmp_path, name, 1)


def interrupt_twice() -> None:
    """In a child: what cleans up after the first Ctrl-C never ends."""
    console.heed_the_second_interrupt()
    try:
        signal.raise_signal(SIGINT)
    except KeyboardInterrupt:
        signal.raise_signal(SIGINT)


def test_a_second_interrupt_ends_at_once(children, tmp_path):
    end = children.call(tmp_path, (Path(__file__).stem, "interrupt_twice"))
    assert end.code == 128 + SIGINT
    said = "quit at once; what was saved is whole, and the same command goes on from there"
    assert end.err == f"error: {said}\n"


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ("mkdir\truns/r", "interrupted before the first step: nothing was saved yet"),
        ("open\truns/r/metrics.jsonl", "interrupted at image 8 and saved: the same command resu"),
    ],
)
def test_an_interrupted_training_says_what_it_saved(
    children, inputs, undisturbed, tmp_path, operation, said
):
    bits, operations, _ = undisturbed.of("train")
    argv = SCENARIOS["train"].argv
    place, at = (
        SCENARIOS["train"].prepare(inputs, tmp_path / "r"),
        operations["writes"].index(operation),
    )
    end = children.command(place, *argv, fault="SIGINT", at=at)
    require_calm(end, 128 + SIGINT)
    assert said in end.out
    assert_ran_again(children.command(place, *argv))
    assert_same_bits(place, bits)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_kills_at_many_random_instants(children, inputs, undisturbed, tmp_path, name):
    kill_at_random(children, inputs, undisturbed, tmp_path, name, 20)
