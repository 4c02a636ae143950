"""Classes by number, by name, and in the data's proportions."""

from collections import Counter

import pytest

from msmdiff.core.condition import Classes, Unconditional, describe
from msmdiff.core.errors import UsageError

NAMES = ["Animals", "Flags", "Signs, red"]


def named(counts=(5, 300, 95)):
    condition = Classes(3)
    describe(condition, NAMES, list(counts))
    return condition


@pytest.mark.parametrize(
    ("wish", "dealt"),
    [
        ("Flags", [1, 1, 1, 1]),
        ("Flags,Animals", [1, 0, 1, 0]),
        ("Signs, red", [2, 2, 2, 2]),
        ("0-1,Flags", [0, 1, 1, 0]),
        ("2", [2, 2, 2, 2]),
        (None, [0, 1, 2, 0]),
    ],
)
def test_classes_are_dealt_by_number_and_name(wish, dealt):
    assert named().deal(wish, range(4)).tolist() == dealt


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"no such class; did you mean 'Flags'.*Animals, Flags"):
        named().deal("Flag", range(4))
    with pytest.raises(UsageError, match="do not name their classes"):
        Classes(3).deal("Flags", range(4))


def test_in_the_proportions_of_the_data():
    condition = named()
    dealt = condition.deal("data", range(4000)).tolist()
    found = Counter(dealt)
    # 5, 300 and 95 of 400 images: within four deviations of a binomial of 4,000 draws.
    for label, share in enumerate((0.0125, 0.75, 0.2375)):
        deviation = (4000 * share * (1 - share)) ** 0.5
        assert abs(found[label] - 4000 * share) < 4 * deviation
    assert condition.deal("data", [7, 3]).tolist() == [dealt[7], dealt[3]]  # by the seed alone
    with pytest.raises(UsageError, match="do not say how many images"):
        Classes(3).deal("data", range(4))


def test_values_take_names_and_more_names_than_classes_say_nothing():
    assert named().values(["Flags", 0]).tolist() == [1, 0]
    fewer = Classes(2)
    describe(fewer, NAMES, [1, 2, 3])
    assert fewer.names == ()
    describe(Unconditional(), NAMES, [1, 2, 3])
