"""Whatever ends a command early, the same command ends with the same bits: kills at any instant,
and every operation on a file failed once.
"""

import random
from pathlib import Path

import pytest
from children import Children, End, require_calm
from scenarios import SCENARIOS, Scenario, make_inputs, numbers


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


def assert_rerun_ends_alike(
    children: Children, scenario: Scenario, folder: Path, bits: dict[str, str], told: str
) -> None:
    end = children.command(folder, *scenario.argv)
    assert (end.code, "Traceback" in end.err) == (0, False), f"{told}\n{end.out}\n{end.err}"
    found = numbers(folder)
    assert found.keys() == bits.keys(), told
    different = [name for name in bits if found[name] != bits[name]]
    assert not different, f"{told}: {different}"


def instants(count: int, few: int, name: str) -> list[int]:
    """Some numbers of operations; with `few` 0 all."""
    every = list(range(count))
    return random.Random(name).sample(every, min(few, count)) if few else every


def names_the_file(end: End, operation: str) -> bool:
    """Whether the sentence names what the operation was on, or a folder above it."""
    path = Path(operation.split("\t")[1])
    own = [path.name.removeprefix(".").removesuffix(".npy").removesuffix(".part")]
    return any(part in end.err for part in [*own, *path.parts[:-1]])


def fail_at(children, inputs, undisturbed, folder, name, kind, few):
    """Fail, or kill at, some operations of a scenario, and run it again after each."""
    scenario = SCENARIOS[name]
    bits, operations, _ = undisturbed.of(name)
    known = operations["all" if kind == "EIO" else "writes"]
    for at in instants(len(known), few, name + kind):
        place = scenario.prepare(inputs, folder / str(at))
        end = children.command(place, *scenario.argv, fault=kind, at=at)
        told = f"{name}: {kind} at {at}, {known[at]}"
        if kind == "kill":
            assert end.code == -9, f"{told}: {end}"
            assert end.seen == []
        else:
            try:
                require_calm(end, 0, 1, 2)
                assert end.code == 0 or names_the_file(end, known[at]), end.err
            except AssertionError as error:
                raise AssertionError(f"{told}: {error}") from None
            if end.code == 0:
                # What was passed over had no part in what is left.
                missing = bits.keys() - numbers(place).keys()
                assert not missing, f"{told}: exit code 0 without {missing}\n{end.out}{end.err}"
        assert_rerun_ends_alike(children, scenario, place, bits, told)


KINDS = ("kill", "ENOSPC", "EIO")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_few_operations(children, inputs, undisturbed, tmp_path, name, kind):
    fail_at(children, inputs, undisturbed, tmp_path, name, kind, few=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_operation(children, inputs, undisturbed, tmp_path, name, kind):
    fail_at(children, inputs, undisturbed, tmp_path, name, kind, few=0)


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
        assert_rerun_ends_alike(children, scenario, place, bits, f"{name}, the {i}th")


@pytest.mark.parametrize("name", ["train", "sample"])
def test_kills_at_a_few_random_instants(children, inputs, undisturbed, tmp_path, name):
    kill_at_random(children, inputs, undisturbed, tmp_path, name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_kills_at_many_random_instants(children, inputs, undisturbed, tmp_path, name):
    kill_at_random(children, inputs, undisturbed, tmp_path, name, 20)
