"""Bad images: every format that is read, cut, blotted, and with fields that lie."""

import io
import random
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msmdiff.core.data.images import KNOWN, read_rgb
from msmdiff.core.errors import MsmdiffError

SECONDS = 10
"""Longer than any image here may take, on a busy machine."""


def wholes() -> dict[str, bytes]:
    """One good file of each kind, by its name."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
    grey, floats = colour.convert("L"), colour.convert("L").convert("F")
    deep = Image.fromarray(rng.integers(0, 65535, (24, 32), np.uint16))
    clear = colour.convert("RGBA")
    clear.putalpha(grey)
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "colour.png": (colour, "PNG", {}),
        "palette.png": (colour.convert("P"), "PNG", {"transparency": 3}),
        "deep.png": (deep, "PNG", {}),
        "clear.png": (clear, "PNG", {}),
        "bits.png": (colour.convert("1"), "PNG", {}),
        "colour.jpg": (colour, "JPEG", {"exif": colour.getexif()}),
        "progressive.jpg": (colour, "JPEG", {"progressive": True}),
        "print.jpg": (colour.convert("CMYK"), "JPEG", {}),
        "plain.tif": (colour, "TIFF", {}),
        "packed.tif": (colour, "TIFF", {"compression": "tiff_lzw"}),
        "floats.tif": (floats.point(lambda v: v / 255), "TIFF", {}),
        "moving.gif": (grey, "GIF", {"save_all": True, "append_images": [grey, colour]}),
        "lossy.webp": (colour, "WEBP", {}),
        "lossless.webp": (clear, "WEBP", {"lossless": True}),
        "moving.webp": (colour, "WEBP", {"save_all": True, "append_images": [clear]}),
        "colour.bmp": (colour, "BMP", {}),
        "palette.bmp": (colour.convert("P"), "BMP", {}),
        "colour.ppm": (colour, "PPM", {}),
        "colour.tga": (colour, "TGA", {"compression": "tga_rle"}),
        "colour.jp2": (colour, "JPEG2000", {}),
        "colour.avif": (colour, "AVIF", {}),
    }
    found = {}
    for name, (image, kind, how) in made.items():
        if kind in KNOWN:
            buffer = io.BytesIO()
            image.save(buffer, kind, **how)
            found[name] = buffer.getvalue()
    return found


def corpus() -> dict[str, bytes]:
    """All the bad ones, by names that say what is wrong."""
    found = {}
    for name, content in wholes().items():
        for how, bad in _damaged(content, random.Random(name)):
            found[f"{how}-{name}"] = bad
    for part in (_png_headers(), _png_chunks(), _sizes(), _exif_blocks(80)):
        found |= dict(part)
    return found


def _damaged(content: bytes, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    size = len(content)
    for share in (0, 1, 8, size // 4, size // 2, size - 1):
        yield f"cut{share}", content[:share]
    middle = size // 2
    yield "zeros", bytes(size)
    yield "zero-head", bytes(16) + content[16:]
    yield "zero-middle", content[:middle] + bytes(16) + content[middle + 16 :]
    yield "ones-head", content[:12] + b"\xff" * 12 + content[24:]
    yield "twice", content + content
    yield "late", b"\n\n" + content
    for i in range(6):
        bad = bytearray(content)
        for _ in range(1 + i * 4):
            bad[draw.randrange(min(size, 64) if i % 2 else size)] = draw.randrange(256)
        yield f"blots{i}", bytes(bad)


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in chunks:
        check = struct.pack(">I", zlib.crc32(name + content))
        parts.append(struct.pack(">I", len(content)) + name + content + check)
    return b"".join(parts)


def _header(width: int = 4, height: int = 4, depth: int = 8, kind: int = 2, laced: int = 0):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, laced)


PIXELS = b"IDAT", zlib.compress(bytes(4 * (1 + 4 * 3)))
END = b"IEND", b""


def _png_headers() -> Iterator[tuple[str, bytes]]:
    for width, height in ((0, 4), (4, 0), (2**31 - 1, 1), (2**32 - 1, 2**32 - 1), (10**6, 10**4)):
        yield f"side-{width}-{height}.png", _png(_header(width, height), PIXELS, END)
    for depth in (0, 1, 2, 3, 16, 32, 255):
        for kind in (0, 1, 2, 3, 4, 5, 6, 7):
            yield f"depth{depth}-kind{kind}.png", _png(_header(4, 4, depth, kind), PIXELS, END)
    yield "interlaced.png", _png(_header(laced=1), PIXELS, END)
    yield "interlaced-oddly.png", _png(_header(laced=9), PIXELS, END)


def _png_chunks() -> Iterator[tuple[str, bytes]]:
    bomb = zlib.compress(bytes(100 * 2**20), 1)
    extras = {
        "text-bomb": (b"zTXt", b"a\0\0" + bomb),
        "profile-bomb": (b"iCCP", b"a\0\0" + bomb),
        "international-bomb": (b"iTXt", b"a\0\1\0\0\0" + bomb),
        "profile": (b"iCCP", b"a\0\0" + b"not a profile"),
        "exif": (b"eXIf", b"MM\0*\xff\xff\xff\xff"),
        "animation": (b"acTL", b"\xff" * 8),
        "transparency": (b"tRNS", b"\1"),
        "gamma": (b"gAMA", b""),
        "physical": (b"pHYs", b"\0"),
        "time": (b"tIME", b"\0" * 3),
        "unknown": (b"ABCD", b"critical"),
        "palette-empty": (b"PLTE", b""),
        "palette-odd": (b"PLTE", b"\1\2\3\4"),
    }
    for name, chunk in extras.items():
        yield f"chunk-{name}.png", _png(_header(), chunk, PIXELS, END)
    yield "pixel-bomb.png", _png(_header(), (b"IDAT", bomb), END)
    yield "no-pixels.png", _png(_header(), END)
    yield "no-palette.png", _png(_header(kind=3), PIXELS, END)
    yield "no-header.png", _png(PIXELS, END)
    yield "two-headers.png", _png(_header(), _header(9, 9), PIXELS, END)
    whole = _png(_header(), PIXELS, END)
    yield "length.png", whole[:8] + b"\xff\xff\xff\xff" + whole[12:]
    yield "crc.png", whole[:29] + b"\0\0\0\0" + whole[33:]


def _sizes() -> Iterator[tuple[str, bytes]]:
    """Width and height where each format keeps them."""
    good = wholes()
    places = {"colour.bmp": (18, "<i"), "moving.gif": (6, "<H"), "colour.tga": (12, "<H")}
    for name, (place, form) in places.items():
        for value in (0, 1, 0x7FFF, -1 if form == "<i" else 0xFFFF, 2**31 - 1):
            if form == "<i" or value < 2**16:
                field = struct.pack(form, value) * 2
                content = good[name]
                yield (
                    f"sides{value}-{name}",
                    (content[:place] + field + content[place + len(field) :]),
                )
    frame = good["colour.jpg"].index(b"\xff\xc0") + 5
    for side in (0, 1, 0x7FFF, 0xFFFF):
        content = good["colour.jpg"]
        yield (
            f"sides{side}.jpg",
            content[:frame] + struct.pack(">HH", side, side) + content[frame + 4 :],
        )
    for text in (
        "P6 0 0 255 ",
        "P6 99999999 99999999 255 ",
        "P6 -4 4 255 ",
        "P6 4 4 99999 ",
        "P6 ",
    ):
        yield f"{text.strip().replace(' ', '_')}.ppm", text.encode() + bytes(48)


def _exif_blocks(count: int) -> Iterator[tuple[str, bytes]]:
    """JPEGs whose tags have wrong types, counts and places, beside an orientation."""
    plain = wholes()["colour.jpg"]
    for i in range(count):
        draw = random.Random(i)
        tags = [(0x0112, 3, 1, draw.randrange(10))]
        for _ in range(draw.randint(1, 8)):
            tag = draw.choice(
                [0x0112, 0x010F, 0x011A, 0x8769, 0x8825, 0xA005, draw.randrange(2**16)]
            )
            count_of = draw.choice([0, 1, 2, 100, 2**31 - 1, 2**32 - 1])
            tags.append((tag, draw.randrange(15), count_of, draw.randrange(2**32)))
        draw.shuffle(tags)
        body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
        listed = len(tags) if draw.random() < 0.8 else draw.randrange(2**16)
        block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", listed) + body + bytes(4)
        segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
        yield f"exif{i}.jpg", plain[:2] + segment + plain[2:]


# ------------------------------------------------------------------ in a child


def write(folder: str) -> int:
    """All bad images into a folder. Returns how many there are."""
    found = corpus()
    for name, content in found.items():
        (Path(folder) / name).write_bytes(content)
    return len(found)


def read_all(folder: str) -> dict[str, Any]:
    """Read every file of a folder: how many are images, and what went wrong otherwise than by a
    sentence with the file's name.
    """
    read, problems = 0, []
    for path in sorted(Path(folder).iterdir()):
        print(path.name, flush=True)
        began = time.monotonic()
        try:
            image = read_rgb(path)
            good = image.mode == "RGB" and np.asarray(image).shape == (*image.size[::-1], 3)
            read += 1
            if not good:
                problems.append(f"{path.name}: {image}")
        except MsmdiffError as error:
            if path.name not in str(error) or "more memory" in str(error) or "\n" in str(error):
                problems.append(f"{path.name}: {error}")
        except BaseException as error:
            problems.append(f"{path.name}: {error!r}")
        if time.monotonic() - began > SECONDS:
            problems.append(f"{path.name}: {time.monotonic() - began:.1f} s")
    return {"read": read, "problems": problems}
