"""How threads wait is said before torch is there, and only where the user has not said it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msmdiff.core import machine
from msmdiff.core.errors import UsageError

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


@pytest.mark.parametrize(
    ("seen", "device", "chosen"),
    [
        (None, "cuda:5", "5"),
        ("4,7", "cuda:1", "7"),
        ("GPU-a, GPU-b", "cuda:1", "GPU-b"),
        ("4,7", "cuda", "4,7"),
        ("4,7", "cpu", ""),
    ],
)
def test_a_gpu_is_counted_among_those_that_are_seen(monkeypatch, seen, device, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "to be given back after the test")
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    machine.use(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


@pytest.mark.parametrize(
    ("seen", "device", "there"),
    [
        ("0,1", "cuda:5", "cuda:0, cuda:1"),
        ("3,-1,5", "cuda:2", "cuda:0"),
        ("", "cuda:0", "no GPU"),
        ("-1", "cuda:0", "no GPU"),
    ],
)
def test_a_gpu_that_a_scheduler_hid_is_refused(monkeypatch, seen, device, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    with pytest.raises(UsageError, match=rf"{device}: .*={seen} leaves this process {there}"):
        machine.use(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_a_system_without_what_only_posix_has_trains_and_samples(tmp_path):
    child = Path(__file__).with_name("without_posix.py")
    done = subprocess.run(
        [sys.executable, child, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["done 2"], done.stderr
