"""LSUN's container: LMDB's `data.mdb`, read page by page.

LMDB's own library maps the file and follows what stands in it, so that a file that is cut short or
damaged ends the process. Here every place is checked against the file's length first. The format
is that of LMDB 0.9 on 64-bit little-endian machines.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from msmdiff.core.files import reading

WHAT = "an LMDB of LSUN's kind"

PAGE_HEADER = struct.Struct("<QHHHH")  # number, pad, flags, end of the pointers, begin of the nodes
NODE_HEADER = struct.Struct("<HHHH")  # size (low, high), flags, length of the key
META = struct.Struct("<II16x" + "IHH40x" + "IHH24xQQ" + "QQ")
"""After a page header: magic and version; the list of free pages, whose pad is the page size; the
main tree with its entries and root; last page, transaction.
"""
MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF = 1, 2
ELSEWHERE = 1
"""A node's flag: the value has pages of its own. Other flags are of databases within databases."""
NO_PAGE = 2**64 - 1


@dataclass
class Entry:
    """A key, and where its value lies in the file."""

    key: bytes
    start: int
    length: int


class Pages:
    """One `data.mdb`, opened for each access: nothing is shared with forked processes.

    Raises Unreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[Entry]:
        """Keys in their order, and where the values are."""
        with reading(self.path, WHAT), self.path.open("rb") as file:
            place = file.fileno()
            size, root = _root(place)
            found: list[Entry] = []
            seen = bytearray(os.fstat(place).st_size // size + 1)
            waiting = [] if root == NO_PAGE else [root]
            while waiting:
                number = waiting.pop()
                page = _read(place, number * size, size)
                if seen[number]:
                    raise ValueError(f"page {number} is in the tree twice")
                seen[number] = 1
                below = _add_nodes(page, number * size, size, found)
                waiting += reversed(below)
            return found

    def value(self, entry: Entry) -> bytes:
        """What is stored under a key."""
        with reading(self.path, WHAT), self.path.open("rb") as file:
            return _read(file.fileno(), entry.start, entry.length)


def _read(place: int, start: int, length: int) -> bytes:
    there = os.fstat(place).st_size
    if start + length > there:
        raise ValueError(f"it is cut short: {there:,} bytes, at least {start + length:,} belong")
    return os.pread(place, length, start)


def _root(place: int) -> tuple[int, int]:
    """The page size, and the number of the tree's first page, by the newer of the two metas."""
    metas = []
    start = 0
    for _ in range(2):
        content = META.unpack(_read(place, start + PAGE_HEADER.size, META.size))
        magic, version, size, *_, root, _, transaction = content
        if (magic, version) != (MAGIC, VERSION) or not 512 <= size <= 2**16:
            raise ValueError("it does not begin as LMDB's files do")
        metas.append((transaction, size, root))
        start = size
    return max(metas)[1:]


def _add_nodes(page: bytes, start: int, size: int, found: list[Entry]) -> list[int]:
    """Add a leaf's entries to `found`, or return the pages below a branch."""
    _, _, flags, lower, _ = PAGE_HEADER.unpack_from(page)
    if flags & 0xF not in (BRANCH, LEAF):
        raise ValueError(f"page {start // size} is neither a branch nor a leaf")
    pointers = struct.unpack_from(f"<{max(0, lower - PAGE_HEADER.size) // 2}H", page, 16)
    below = []
    for pointer in pointers:
        low, high, flags_of_node, key_length = NODE_HEADER.unpack_from(page, pointer)
        if flags & 0xF == BRANCH:
            below.append(low | high << 16 | flags_of_node << 32)
            continue
        key_start = pointer + NODE_HEADER.size
        value = key_start + key_length
        if value > size or flags_of_node & ~ELSEWHERE:
            raise ValueError(f"page {start // size} holds other things than keys and values")
        at = start + value
        if flags_of_node & ELSEWHERE:
            at = struct.unpack_from("<Q", page, value)[0] * size + PAGE_HEADER.size
        found.append(Entry(page[key_start:value], at, low | high << 16))
    return below
