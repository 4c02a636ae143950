"""Files of tensors: whatever a checkpoint holds is read, nothing of it runs, and nothing larger
than the file is made.
"""

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msmdiff.core import tensor_files
from msmdiff.core.errors import MsmdiffError

TENSORS = {
    "plain": torch.arange(12.0).view(3, 4),
    "turned": torch.arange(6).half().view(2, 3).T,
    "empty": torch.zeros(0, 3),
    "flag": torch.tensor(True),
    "bf16": torch.ones(2, dtype=torch.bfloat16),
    "wide": torch.tensor([2**40]),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_all_that_trainings_save_is_read(tmp_path: Path, zipped: bool):
    content = {
        "model": collections.OrderedDict(TENSORS),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "args": argparse.Namespace(results=pathlib.PosixPath("/x"), model="DiT-XL/2", lr=1e-4),
        "loss": np.float64(0.1),
        "curve": np.ones(3),
        "when": datetime.datetime(2026, 1, 1),
        "opt": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "param_groups": [{"betas": (0.9, 0.99)}],
        },
        "counts": collections.defaultdict(int, a=1),
        "kinds": [torch.float16, torch.Size([2]), torch.device("cpu"), {1, 2}, 2**70, None],
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = tensor_files.read(tmp_path / "a.pt")
    for name, tensor in TENSORS.items():
        assert torch.equal(read["model"][name], tensor)
        assert read["model"][name].dtype == tensor.dtype
    assert torch.equal(read["parameter"], torch.ones(2))
    assert read["args"].state["model"] == "DiT-XL/2"
    assert read["opt"]["state"][0]["step"] == 3
    assert read["opt"]["param_groups"] == [{"betas": (0.9, 0.99)}]
    assert read["counts"] == {"a": 1}
    assert read["kinds"][0] == torch.float16
    assert read["kinds"][4] == 2**70
    # Of the classes that it does not know, nothing is made.
    assert all(isinstance(read[name], tensor_files.Shell) for name in ("loss", "curve", "when"))


class Call:
    """A pickle of this calls something."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "call",
    [Call(os.system, "true"), Call(getattr, "a", "upper"), Call(np.load, "x"), Call(exec, "")],
)
def test_whatever_is_called_is_refused(tmp_path: Path, call: Call, zipped: bool):
    torch.save([call], tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(MsmdiffError, match=r"a\.pt asks to run code .*nothing was executed"):
        tensor_files.read(tmp_path / "a.pt")


def refused(path: Path) -> str:
    with pytest.raises(MsmdiffError) as caught:
        tensor_files.read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def repacked(source: Path, target: Path, compression: int, **replaced: bytes) -> Path:
    """A torch file's zip, written anew."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, replaced.get(Path(name).stem, old.read(name)))
    return target


@pytest.mark.parametrize("zipped", [True, False])
def test_no_tensor_is_larger_than_what_the_file_holds(tmp_path: Path, zipped: bool):
    path = tmp_path / "a.pt"
    huge = {"a": torch.zeros(1).expand(10**6, 10**6)}
    torch.save(huge, path, _use_new_zipfile_serialization=zipped)
    assert "claims more numbers than its 4 bytes hold" in refused(path)


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path: Path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "a.pt")
    bomb = repacked(tmp_path / "a.pt", tmp_path / "b.pt", zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**5
    assert "is a compressed zip, which torch does not write" in refused(bomb)


def test_a_storage_that_is_not_as_long_as_its_pickle_says_is_refused(tmp_path: Path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    pickled = zipfile.ZipFile(tmp_path / "a.pt").read("a/data.pkl")
    longer = pickled.replace(b"M\xe8\x03", b"M\xe9\x03")  # 1000 -> 1001
    assert longer != pickled
    changed = repacked(tmp_path / "a.pt", tmp_path / "b.pt", zipfile.ZIP_STORED, data=longer)
    assert "said to hold 1,001 numbers" in refused(changed)

    torch.save({"a": torch.zeros(1000)}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f"))
    assert "claim more than its" in refused(tmp_path / "c.pt")


def test_a_number_in_a_pickle_allocates_nothing(tmp_path: Path):
    stack = io.BytesIO()
    stack.write(pickle.PROTO + b"\x05" + pickle.BYTEARRAY8 + (2**40).to_bytes(8, "little"))
    (tmp_path / "a.pt").write_bytes(stack.getvalue())
    assert "not a checkpoint of torch's" in refused(tmp_path / "a.pt")
    memo = pickle.PROTO + b"\x02" + pickle.NONE + pickle.LONG_BINPUT + b"\xff" * 4 + pickle.STOP
    (tmp_path / "a.pt").write_bytes(memo)
    assert "does not begin as torch's files do" in refused(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_and_changed_files_are_read_or_refused_in_a_sentence(tmp_path: Path, zipped: bool):
    path = tmp_path / "a.pt"
    torch.save(
        {"model": TENSORS, "args": argparse.Namespace(a=1)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for i in range(300):
        changed = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            changed[place] = rng.integers(256)
        path.write_bytes(changed[: rng.integers(1, len(whole))] if i % 3 == 0 else changed)
        with suppress(MsmdiffError):
            tensor_files.read(path)


def test_what_is_written_is_what_the_library_writes_and_others_may_read_it(tmp_path: Path):
    before = os.umask(0o022)
    try:
        tensor_files.write(tmp_path / "new" / "a.safetensors", TENSORS, {"b": "text"})
        tensor_files.write_torch(tmp_path / "new" / "a.pt", TENSORS)
    finally:
        os.umask(before)
    save_file({name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / "b", {"b": "text"})
    assert (tmp_path / "new" / "a.safetensors").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(load_file(tmp_path / "b")["plain"], TENSORS["plain"])
    for path in (tmp_path / "new").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644


def test_an_interrupt_passes_through_torchs_writer(tmp_path: Path):
    class Interrupted(io.BytesIO):
        writes = 0

        def write(self, data: Any) -> int:
            self.writes += 1
            if self.writes != 2:
                return super().write(data)
            super().write(bytes(data)[: len(data) // 2])
            raise KeyboardInterrupt

    # At its end torch's writer complains of what is missing, and its complaint comes on top.
    def through() -> None:
        tensor_files.write_torch(tmp_path / "a.pt", {"a": torch.zeros(10_000)})

    watched = tensor_files._Watched(Interrupted())
    with (
        mock.patch.object(tensor_files, "_Watched", return_value=watched),
        pytest.raises(KeyboardInterrupt),
    ):
        through()
    assert list(tmp_path.iterdir()) == []


def test_torchs_words_for_a_failed_write_are_not_passed_on(tmp_path: Path, monkeypatch):
    def full(self: object, data: bytes) -> int:
        self.failure = OSError(28, "No space left on device")  # type: ignore[attr-defined]
        raise self.failure  # type: ignore[attr-defined]

    monkeypatch.setattr(tensor_files._Watched, "write", full)
    with pytest.raises(MsmdiffError, match=r"a\.pt cannot be written: No space left on device"):
        tensor_files.write_torch(tmp_path / "a.pt", TENSORS)
    assert list(tmp_path.iterdir()) == []
