"""How threads wait is said before torch is there, and only where the user has not said it."""

import os
import subprocess
import sys

import pytest

SHOW = (
    "import os, sys, msmdiff; assert 'torch' not in sys.modules; "
    "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"
)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "1000 0"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None None"),
        ({"KMP_BLOCKTIME": "200"}, "None 200"),
    ],
)
def test_waiting_threads_sleep_soon_unless_the_user_said_otherwise(said, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
    rest = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env={**rest, **said},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
