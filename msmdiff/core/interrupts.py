"""Ctrl-C is answered at once, whatever the main thread is busy with: Python's own handlers wait for
the end of what a library computes, which may be minutes.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from msmdiff.core import systems

ANSWER_AFTER = 0.5
"""Seconds; what has ended by then needs no answer."""
GRACE = 1.5
"""Seconds that a process has to end by itself after it was asked twice."""

STOPPING = "stopping; press again to quit now"
AFTER_THIS_STEP = "stopping after this step; press again to quit now"
QUIT = "quit at once; what was saved is whole, and the same command goes on from there"

_words = STOPPING
_ear: socket.socket | None = None


@contextmanager
def saying(words: str) -> Iterator[None]:
    """Inside, the first interruption is answered so."""
    global _words
    before, _words = _words, words
    try:
        yield
    finally:
        _words = before


def listen() -> None:
    """Answer SIGINT and SIGTERM on stderr from now on, and end a process that was asked twice.

    For the command line only: it may end the whole process. To be called in the main thread, once.
    """
    global _ear
    if _ear is not None or threading.current_thread() is not threading.main_thread():
        return
    _ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    signal.set_wakeup_fd(mouth.detach(), warn_on_full_buffer=False)
    # A child would write its own signals into the same pair.
    systems.after_fork(_forget)
    threading.Thread(target=_attend, args=(_ear,), daemon=True, name="interrupts").start()


def _forget() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


def _attend(ear: socket.socket) -> None:
    asked = 0
    while heard := ear.recv(1):
        if heard[0] not in (signal.SIGINT, signal.SIGTERM):
            continue
        if asked and heard[0] == signal.SIGTERM:
            continue  # a scheduler and a launcher tell each process the same: nobody is impatient
        asked += 1
        if asked == 1:
            threading.Timer(ANSWER_AFTER, _say, [_words]).start()
            continue
        time.sleep(GRACE)
        _say(QUIT)
        os._exit(128 + heard[0])


def _say(words: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
        os.write(2, f"\n{words}\n".encode())
