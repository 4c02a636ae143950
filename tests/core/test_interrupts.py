"""Ctrl-C is answered while the main thread is inside a library that does not return."""

import signal
import subprocess
import sys
import time

BUSY = """
import ctypes
from msmdiff.core import interrupts
import signal
signal.signal(signal.SIGINT, lambda *_: None)
interrupts.listen()
with interrupts.saying(interrupts.AFTER_THIS_STEP):
    print("ready", flush=True)
    for _ in range(40):
        ctypes.CDLL(None).poll(None, 0, 60_000)  # resumed by ctypes' caller, deaf to Python
"""


def test_it_is_answered_and_a_second_one_ends_the_process():
    busy = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert busy.stdout is not None and busy.stderr is not None  # noqa: PT018
    assert busy.stdout.readline() == b"ready\n"
    busy.send_signal(signal.SIGINT)
    assert busy.stderr.readline() == b"\n"
    assert busy.stderr.readline() == b"stopping after this step; press again to quit now\n"
    time.sleep(0.1)
    busy.send_signal(signal.SIGINT)
    assert busy.wait(20) == 128 + signal.SIGINT
    assert b"quit at once; what was saved is whole" in busy.stderr.read()
