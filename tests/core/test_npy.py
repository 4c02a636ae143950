"""`.npy` files are read without running anything, and written without holes."""

import io
import pickle
import random
import struct
import tracemalloc

import numpy as np
import pytest

from msmdiff.core.data import npy
from msmdiff.core.errors import MsmdiffError


def pair(label=3):
    """An array and a label as U-ViT stores them."""
    both = np.empty(2, object)
    both[:] = [np.arange(32, dtype=np.float32).reshape(8, 2, 2), label]
    return both


def of_objects(pickled: bytes) -> bytes:
    """A `.npy` file with this pickle."""
    buffer = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + pickled


def with_header(header: str, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


@pytest.mark.parametrize("kind", ["f2", "f4", ">f8", "i8", "<u2", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, kind, order):
    path = tmp_path / "a.npy"
    array = np.asarray(np.arange(24).reshape(2, 3, 4).astype(kind), order=order)
    np.save(path, array)
    assert np.array_equal(npy.load(path), array)
    assert npy.load(path).dtype.isnative
    if array.dtype.isnative:
        assert np.array_equal(npy.mapped(path), array)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("label", [3, np.int64(3), np.array(3)])
def test_pickled_pairs_of_every_protocol_are_decoded(tmp_path, protocol, label):
    path = tmp_path / "0.npy"
    path.write_bytes(of_objects(pickle.dumps(pair(label), protocol=protocol)))
    array, found = npy.load_pair(path)
    assert np.array_equal(array, pair()[0])
    assert found == 3
    with pytest.raises(MsmdiffError, match=r"0.npy is not .* it holds Python objects"):
        npy.load(path)


class Asks:
    """Asks an unpickler for something."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (of_objects(pickle.dumps(Asks(exec, "1"))), "asks for builtins.exec"),
        (of_objects(pickle.dumps(Asks(np.load, "x"))), "asks for numpy.load"),
        # A type with a state that NumPy would follow as pointers.
        (
            of_objects(pickle.dumps(np.array([np.zeros(2, [("a", "O")]), 1], object))),
            "pickle does more than hold an array and a label",
        ),
        (of_objects(pickle.dumps(pair("three"))), "is not .* a .npy file|holds Python objects"),
        (of_objects(pickle.dumps(pair(2.5))), "pickle does more|not a whole number"),
        (of_objects(pickle.dumps([1, 2])), "not a pair of an array and a label"),
        (of_objects(b"\x80\x04" + b"]" * 5000 + b"."), "its pickle has no end"),
        (of_objects(pickle.dumps(pair())[:-40]), "is not a .npy file"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**9,)}"), "damaged"),
        (
            with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,)}"),
            "its header speaks of 4,000,000,000 bytes, it has 0",
        ),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}"), "shape"),
        (with_header("{'descr': '<M8[s]', 'fortran_order': False, 'shape': ()}"), "plain numbers"),
        (with_header("(" * 5000), "its header is damaged"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f", "its header has 2,147,483,647 bytes"),
        (b"", "it does not begin as one"),
    ],
)
def test_everything_else_is_refused_in_a_sentence(tmp_path, content, words):
    path = tmp_path / "0.npy"
    path.write_bytes(content)
    with pytest.raises(MsmdiffError, match=words) as caught:
        npy.load_pair(path)
    assert "0.npy" in str(caught.value)


def test_mutated_files_give_sentences_and_take_no_memory(tmp_path):
    wholes = [of_objects(pickle.dumps(pair(), protocol=p)) for p in (2, 4, 5)]
    np.save(tmp_path / "a.npy", pair()[0])
    wholes.append((tmp_path / "a.npy").read_bytes())
    rng, path, refused = random.Random(0), tmp_path / "0.npy", 0
    tracemalloc.start()
    for _ in range(1000):
        content = bytearray(rng.choice(wholes))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content))
            if rng.random() < 0.5:
                content[place] = rng.randrange(256)
            else:
                del content[place : place + rng.randint(1, 20)]
        path.write_bytes(content)
        for read in (npy.load, npy.load_pair, npy.mapped, npy.load_whole):
            try:
                read(path)
            except MsmdiffError:
                refused += 1
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 2000
    assert most < 5_000_000
