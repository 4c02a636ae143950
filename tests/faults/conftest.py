"""The warm process of the suite of faults."""

from collections.abc import Iterator

import pytest
from children import Children


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    started = Children(tmp_path_factory.mktemp("cache"))
    yield started
    started.close()
