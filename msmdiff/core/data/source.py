"""What a data set is: images, or encoded ones, by index."""

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from PIL import Image

from msmdiff.core.condition import text_shape
from msmdiff.core.config import Config
from msmdiff.core.errors import UsageError


class Source:
    """Images by index, with labels where there are any.

    Attributes:
        spec: what the user wrote.
        labels: [N] int64 class indices, or None.
        class_names: a name per class, in the order of the indices.
    """

    priority: ClassVar[int] = 1
    """Sources of higher priority are asked first whether they open a spec."""
    brings_labels: ClassVar[bool] = True
    """Whether its labels are its own: else the constructor takes a rule for them."""

    spec: str
    labels: np.ndarray | None = None
    class_names: Sequence[str] = ()

    @classmethod
    def opens(cls, spec: str) -> bool:
        """Whether this kind of source is what the user wrote."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """The image at `index` as 8-bit RGB; raises one of `images.UNREADABLE` where damaged."""
        raise NotImplementedError

    def content(self, index: int, suffix: str | None = None) -> bytes | None:
        """The image's file as it is, or the one beside it with another suffix; None where there are
        no files.
        """
        return None

    def describe(self, index: int) -> str:
        """The image at `index` for fingerprints: its name, and what changes when the file does."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The image at `index` for messages."""
        return self.describe(index)

    def identity(self) -> str:
        """sha256 of the images' names and classes in their order: another one makes it another
        training.
        """
        digest = hashlib.sha256(
            "\n".join(map(self.name, range(len(self)))).encode(errors="surrogateescape")
        )
        digest.update(repr(list(self.class_names)).encode())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()

    @property
    def num_classes(self) -> int | None:
        """How many classes there are: 0 without labels, None where only the single files know."""
        return len(self.class_names)

    def check(self, config: Config) -> None:
        """Raise UsageError unless a resolved configuration can be trained on this data."""
        if wanted := text_shape(config.model):
            raise UsageError(
                f"the network draws from captions ({wanted[0]} tokens of width {wanted[1]}), "
                f"{self.spec} has none: "
                "encode them with `msmdiff data encode --captions`"
            )
