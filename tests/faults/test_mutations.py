"""Files whose bytes were changed open, or are refused in one sentence that names them; nothing in
them runs, and memory stays bounded.
"""

import pytest
from children import require_calm
from mutations import OPENERS

MEGABYTES = 400


def check(children, folder, name, count, first=0):
    given = {"folder": str(folder), "name": name, "count": count, "first": first}
    end = children.call(folder, ("mutations", "attack"), given, megabytes=MEGABYTES)
    require_calm(end, 0)
    assert end.result["problems"] == []
    assert end.result["opened"] < count


@pytest.mark.parametrize("name", OPENERS)
def test_a_few_mutations(children, tmp_path, name):
    check(children, tmp_path, name, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPENERS)
def test_a_thousand_mutations(children, tmp_path, name):
    check(children, tmp_path, name, 1000, first=40)
