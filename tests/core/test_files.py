"""The one way to files: sentences for damage, outputs that are whole or not there, one writer."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from msmdiff.core import files
from msmdiff.core.errors import MsmdiffError, UsageError


def fails_at(error: BaseException, path: str = "a.png") -> MsmdiffError:
    """What a user sees of an error that a decoder raised."""
    with pytest.raises(MsmdiffError) as caught, files.reading(path, "an image"):
        raise error
    return caught.value


@pytest.mark.parametrize("raised", [ValueError("odd"), KeyError("a"), RecursionError(), EOFError()])
def test_whatever_a_decoder_raises_becomes_one_sentence_about_the_file(raised):
    error = fails_at(raised)
    assert "a.png is not an image that can be read" in str(error)
    assert not files.passing(error)


def test_a_fault_of_the_disk_may_pass_and_damage_does_not():
    assert files.passing(fails_at(OSError(errno.EIO, "Input/output error")))
    assert not files.passing(fails_at(OSError("image file is truncated")))


def test_a_pipe_is_refused_before_it_is_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(MsmdiffError, match=r"pipe\.png is a pipe"):
        files.require_regular(tmp_path / "pipe.png")


def test_a_failed_write_leaves_what_was_there_and_nothing_over(tmp_path: Path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files, "fsync", mock.Mock(side_effect=full))
    with pytest.raises(MsmdiffError, match=r"a\.txt cannot be written: No space left"):
        files.write_text(tmp_path / "a.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_two_processes_do_not_write_one_file(tmp_path: Path):
    second = (
        "import sys; from pathlib import Path; from msmdiff.core import files\n"
        "files.write_text(Path(sys.argv[1]), 'second')"
    )
    with files.atomic(tmp_path / "a.txt") as part:
        part.write_text("first")
        done = subprocess.run(
            [sys.executable, "-c", second, str(tmp_path / "a.txt")], capture_output=True, text=True
        )
    assert "another process is writing" in done.stderr
    assert (tmp_path / "a.txt").read_text() == "first"


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path):
    lock = files.Lock(tmp_path / ".lock", "held")
    with pytest.raises(MsmdiffError, match="held"):
        files.Lock(tmp_path / ".lock", "held")
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        there.send(b"1")  # forked, and past what runs in a forked child
        there.recv(1)  # lives on until the parent says so
        os._exit(0)
    try:
        here.recv(1)
        lock.close()  # as the kernel does at the parent's death
        files.Lock(tmp_path / ".lock", "held").close()
    finally:
        here.send(b"1")
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_told_once(tmp_path: Path, monkeypatch, caplog):
    unsupported = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(files.systems.fcntl, "flock", mock.Mock(side_effect=unsupported))
    monkeypatch.setattr(files, "_unlocked", set())
    for name in ("a.txt", "b.txt"):
        files.write_text(tmp_path / name, "text")
    (told,) = [record.getMessage() for record in caplog.records]
    assert "has no locks: let no other process write there" in told


def test_what_this_tool_did_not_write_is_not_replaced(tmp_path: Path):
    files.require_ours(tmp_path / "new", ours=False)
    (tmp_path / "theirs").write_text("thesis")
    with pytest.raises(UsageError, match="was not written by msmdiff"):
        files.require_ours(tmp_path / "theirs", ours=False)
    files.require_ours(tmp_path / "theirs", ours=False, overwrite=True)


def test_text_is_read_in_what_it_was_written_in(tmp_path: Path):
    marked = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1")
    unmarked = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    for encoding in (*marked, *unmarked):
        (tmp_path / "a.txt").write_bytes("un café".encode(encoding))
        assert files.read_text(tmp_path / "a.txt") == "un café"
    for encoding in unmarked:
        for text in ("一只猫\n两只狗\n", "一一一\n"):
            (tmp_path / "a.txt").write_bytes(text.encode(encoding))
            assert files.read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize(
    "content", [b"a cat\0", b"\0\0", b"cat \x81", b"caf\xe9 \x02", bytes(range(256))]
)
def test_bytes_that_are_no_text_are_refused_by_name(tmp_path: Path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(MsmdiffError, match=r"a\.txt is not a text that can be read: .* save it as"):
        files.read_text(tmp_path / "a.txt")


def test_what_is_larger_than_it_may_be_is_not_read(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(bytes(11))
    with pytest.raises(MsmdiffError, match=r"a\.png has 11 bytes, more than 10"):
        files.read_bytes(tmp_path / "a.png", limit=10)
