"""Single images: decoding to 8-bit RGB, ADM's crops, and grids of pictures to look at."""

import math
import struct
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}

# What Pillow raises on a damaged file, depending on the format and on where the damage is.
UNREADABLE = (
    OSError,
    UnidentifiedImageError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)


def read_rgb(file: Path | IO[bytes]) -> Image.Image:
    """Decode a whole image file to 8-bit RGB.

    EXIF rotation is applied; transparency is laid on white; 16-bit greys, and floats of 0..1, are
    scaled to 8 bits; CMYK, palette and grey images are converted; of an animation the first frame
    is taken. Raises one of UNREADABLE for a damaged file.
    """
    with Image.open(file) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, by the rules of `read_rgb`."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values = values / 257  # 65535 -> 255
        elif image.mode == "F" and 0 < values.max(initial=0) <= 1:
            values = values * 255  # scientific images hold 0..1
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's resize and centre crop to uint8 [size, size, 3]: halve by boxes, then bicubic, then
    cut.

    Images smaller than `size` are enlarged.
    """
    pixels = np.asarray(_shrink_to(image, size, size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """ADM's random crop to uint8 [size, size, 3]: the window's side is 80 to 100 % of the shorter
    side.
    """
    shorter = int(rng.integers(size, math.ceil(size / 0.8) + 1))
    pixels = np.asarray(_shrink_to(image, shorter, shorter))
    top, left = (int(rng.integers(0, extent - size + 1)) for extent in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def _shrink_to(image: Image.Image, shorter: int, floor: int) -> Image.Image:
    while min(image.size) >= 2 * floor:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    return image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )


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
