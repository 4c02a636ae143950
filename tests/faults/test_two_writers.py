"""Two processes that write one output: one of them does, the other waits or says so, and the result
is whole.
"""

import pytest
from children import Job, require_calm
from scenarios import SCENARIOS, make_inputs, numbers


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_at_once_leave_what_one_leaves(children, inputs, tmp_path, name):
    scenario = SCENARIOS[name]
    alone = scenario.prepare(inputs, tmp_path / "alone")
    require_calm(children.command(alone, *scenario.argv), 0)
    place = scenario.prepare(inputs, tmp_path / "two")
    ends = children.run(*[Job(str(place), [*scenario.argv]) for _ in range(2)])
    for end in ends:
        require_calm(end, 0, 1, 2)
    assert 0 in [end.code for end in ends], ends
    assert numbers(place) == numbers(alone)
