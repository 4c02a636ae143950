"""Single images: decoding to 8-bit RGB, ADM's crops, and grids of pictures to look at."""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from msmdiff.core import files

FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "TIFF", "JPEG2000", "BMP", "DIB", "PPM", "TGA"
)  # fmt: skip
"""What is decoded. Not everything that Pillow opens: EPS starts another program. TGA has no mark
that it could be known by, and is tried last.
"""


# What Pillow warns of, it reads or refuses all the same; the lines name no file of the user's.
warnings.filterwarnings("ignore", module=r"PIL\.")


def _known() -> tuple[list[str], frozenset[str]]:
    """Those of FORMATS that this Pillow has, and the suffixes of their files."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    found = Image.registered_extensions().items()
    return formats, frozenset(suffix for suffix, name in found if name in formats)


KNOWN, SUFFIXES = _known()

LARGEST_PIXELS = 2 * 89_478_485
"""Pillow's own limit to the pixels of an image."""
FREE_PIXELS, PIXELS_PER_BYTE = 2**24, 10_000
"""Larger images than the first need a byte for so many pixels: fewer bytes hold no such image."""

LARGEST_ENLARGED = 2**26
"""Pixels of an image that is resized whole before a square is cut from it."""


@dataclass(frozen=True)
class Decoding:
    """How pixels become 8-bit RGB, where a file leaves that open.

    Attributes:
        float_range: what is white in images of floats, and of 32-bit integers.
        alpha: what becomes of transparency: laid on `white`, `black`, a colour RRGGBB or a
            `checker` board, or left out (`drop`), as pytorch-fid, ADM's evaluator, torch-fidelity
            and clean-fid do.
    """

    float_range: float = 1.0
    alpha: str = "white"


def read_rgb(file: Path | bytes, decoding: Decoding = Decoding()) -> Image.Image:
    """Decode a whole image file to 8-bit RGB.

    EXIF rotation is applied; 16-bit greys, and floats by `decoding`, are scaled to 8 bits; CMYK,
    palette and grey images are converted; of an animation the first frame is taken. Raises
    Unreadable where a path's file is damaged, and nearly anything where bytes are.
    """
    if isinstance(file, Path):
        # Read whole: a decoder that reads itself may take the disk's fault for the file's.
        with files.reading(file, "an image"):
            return read_rgb(files.read_bytes(file), decoding)
    try:
        opened = Image.open(io.BytesIO(file), formats=KNOWN)
    except UnidentifiedImageError:
        raise ValueError(f"{len(file):,} bytes that begin as no {', '.join(KNOWN)}") from None
    with opened as image:
        _require_plausible(image.size, len(file))
        wide_grey = image.mode == "I" and image.format in ("PPM", "PNG")  # 16 bits in 32
        image.load()
        upright = _upright(image)
        if wide_grey:
            upright = _grey(np.asarray(upright, np.float32) / 257)
        return to_rgb(upright, decoding)


BEGINNING = 32
"""Bytes by which a format knows its files."""


def require_beginning(head: bytes) -> None:
    """Raises ValueError unless an image file may begin with these bytes."""
    accepts = [Image.OPEN[name][1] for name in KNOWN]
    known = any(accept is not None and accept(head) is True for accept in accepts)
    if not known and not _may_be_tga(head):
        raise ValueError(f"it begins as no {', '.join(KNOWN)}")


def _may_be_tga(head: bytes) -> bool:
    """TGA has no mark: the kinds of its colour map and of its pixels, and their bits."""
    kinds = (1, 2, 3, 9, 10, 11)
    return len(head) > 16 and head[1] < 2 and head[2] in kinds and head[16] in (1, 8, 16, 24, 32)


def _require_plausible(size: tuple[int, int], length: int) -> None:
    """Raises ValueError for sizes that a file of this length does not hold."""
    pixels = size[0] * size[1]
    if not 0 < pixels <= LARGEST_PIXELS:
        raise ValueError(f"it is {size[0]}x{size[1]}; images have 1 to {LARGEST_PIXELS:,} pixels")
    if pixels > max(FREE_PIXELS, PIXELS_PER_BYTE * length):
        raise ValueError(f"it claims {size[0]}x{size[1]} pixels in {length:,} bytes")


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientations, and what sets them upright."""


def _upright(image: Image.Image) -> Image.Image:
    # Pillow's own exif_transpose writes all tags anew, and fails at those of a wrong type.
    try:
        orientation: Any = image.getexif().get(0x0112)
        turn = TURNS.get(orientation)
    except Exception:  # tags that are no tags say nothing of how the pixels lie
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, decoding: Decoding = Decoding()) -> Image.Image:
    """Any Pillow mode -> RGB, by the rules of `read_rgb`. Raises ValueError for numbers that are
    not finite, or far from the range of floats.
    """
    if image.mode.startswith("I;16"):
        image = _grey(np.asarray(image, np.float32) / 257)  # 65535 -> 255
    elif image.mode in ("I", "F"):
        image = _grey(_scaled(np.asarray(image, np.float32), decoding.float_range))
    if decoding.alpha != "drop" and image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(_ground(decoding.alpha, rgba.size), rgba)
    return image.convert("RGB")


def _ground(kind: str, size: tuple[int, int]) -> Image.Image:
    """What transparent images are laid on. A checker board has 8 squares along the shorter side, in
    two greys.
    """
    if kind != "checker":
        colour = kind if kind in ("white", "black") else f"#{kind}"
        return Image.new("RGBA", size, colour)
    square = max(1, min(size) // 8)
    rows, columns = np.ogrid[: size[1], : size[0]]
    light = (rows // square + columns // square) % 2 == 0
    grey = np.where(light, 204, 153).astype(np.uint8)
    return Image.fromarray(grey).convert("RGBA")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _scaled(values: np.ndarray, white: float) -> np.ndarray:
    """Floats -> 0..255. A little beyond the range, as filters leave it, is cut off."""
    if not np.isfinite(values).all():
        raise ValueError("it holds numbers that are not finite")
    low, high = float(values.min()), float(values.max())
    if low < -white / 2 or high > 2 * white:
        raise ValueError(
            f"it holds numbers from {low:g} to {high:g}, where 0 is black and {white:g} white: "
            "data.float_range says otherwise, such as 255"
        )
    return values * (255 / white)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's resize and centre crop to uint8 [size, size, 3]: halve by boxes, then bicubic, then
    cut.

    Images smaller than `size` are enlarged.
    """
    image = _halved(image, size)
    width, height = _scaled_size(image, size)
    return _window(image, (width, height), ((width - size) // 2, (height - size) // 2), size)


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """ADM's random crop to uint8 [size, size, 3]: the window's side is 80 to 100 % of the shorter
    side.
    """
    shorter = int(rng.integers(size, math.ceil(size / 0.8) + 1))
    image = _halved(image, shorter)
    width, height = _scaled_size(image, shorter)
    top, left = (int(rng.integers(0, extent - size + 1)) for extent in (height, width))
    return _window(image, (width, height), (left, top), size)


def _halved(image: Image.Image, shorter: int) -> Image.Image:
    """An image whose shorter side is less than twice what is wanted."""
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _scaled_size(image: Image.Image, shorter: int) -> tuple[int, int]:
    scale = shorter / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def _window(
    image: Image.Image, scaled: tuple[int, int], corner: tuple[int, int], size: int
) -> np.ndarray:
    """A square of an image resized to `scaled`, from (left, top) on: uint8 [size, size, 3]."""
    left, top = corner
    if math.prod(scaled) <= LARGEST_ENLARGED:
        pixels = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))
        return pixels[top : top + size, left : left + size]
    # The whole of a very long image could be gigabytes. Pillow's box has only single precision, so
    # that a pixel may differ by a grey level.
    x, y = image.width / scaled[0], image.height / scaled[1]
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))


def grid(images: np.ndarray, columns: int | None = None, tile: int = 48) -> Image.Image:
    """uint8 images [N, H, W, 3] -> one picture in rows; small images are enlarged to about `tile`
    pixels.
    """
    n, height, width = images.shape[:3]
    columns = columns or math.ceil(math.sqrt(n))
    zoom = max(1, math.ceil(tile / max(height, width)))
    gap = 2
    rows = math.ceil(n / columns)
    picture = np.full(
        (rows * (height * zoom + gap) + gap, columns * (width * zoom + gap) + gap, 3), 255, np.uint8
    )
    for i, image in enumerate(images):
        top = gap + i // columns * (height * zoom + gap)
        left = gap + i % columns * (width * zoom + gap)
        picture[top : top + height * zoom, left : left + width * zoom] = image.repeat(
            zoom, 0
        ).repeat(zoom, 1)
    return Image.fromarray(picture)


def labelled(
    picture: Image.Image,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """A picture of `grid` with names left of its rows and over its columns, cut to their room, and
    a line over all; as it is where there are none.
    """
    if not (any(rows) or any(columns) or title):
        return picture
    font = ImageFont.load_default(11)
    left = max((math.ceil(font.getlength(name)) + 6 for name in rows), default=0)
    lines = _broken(title, left + picture.width, font) if title else []
    top = 15 * len(lines) + (15 if any(columns) else 0)
    whole = Image.new("RGB", (left + picture.width, top + picture.height), "white")
    whole.paste(picture, (left, top))
    pen = ImageDraw.Draw(whole)
    for i, line in enumerate(lines):
        pen.text((3, 1 + 15 * i), line, "black", font)
    for i, name in enumerate(columns):
        room = picture.width / len(columns)
        pen.text((left + 2 + i * room, top - 15), _cut(name, room - 2, font), "black", font)
    for i, name in enumerate(rows):
        pen.text((3, top + (i + 0.5) * picture.height / len(rows) - 7), name, "black", font)
    return whole


def _cut(name: str, room: float, font: Any) -> str:
    """As much of a name as there is room for, with a sign of what is missing."""
    if font.getlength(name) <= room:
        return name
    while name and font.getlength(f"{name}…") > room:
        name = name[:-1]
    return f"{name.rstrip(' -')}…" if name else ""


def _broken(text: str, room: float, font: Any) -> list[str]:
    """A text in lines that there is room for, broken at words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > room - 6:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
