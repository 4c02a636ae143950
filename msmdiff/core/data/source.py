"""What a data set is: images, or encoded ones, by index."""

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from msmdiff.core.condition import text_shape
from msmdiff.core.config import Config
from msmdiff.core.data.images import Decoding, require_beginning
from msmdiff.core.errors import UsageError
from msmdiff.core.files import reading

PROBES = 16
"""Images, evenly spaced, whose content tells data from others of the same names."""


class Source:
    """Images by index, with labels where there are any.

    Attributes:
        spec: what the user wrote.
        labels: [N] int64 class indices, or None.
        class_names: a name per class, in the order of the indices.
        decoding: how images become 8-bit RGB where their files leave that open.
        left_out: files and folders that lie among the images and are not read.
        unlabelled: why there are no labels, where most images could have some.
    """

    priority: ClassVar[int] = 1
    """Sources of higher priority are asked first whether they open a spec."""
    named_by_place: ClassVar[bool] = False
    """Whether the names of its images hold the place where they lie."""
    brings_labels: ClassVar[bool] = True
    """Whether its labels are its own: else the constructor takes a rule for them."""
    verified: bool = False
    """Whether its images are in memory and whole: none has to be decoded to know."""

    spec: str
    labels: np.ndarray | None = None
    class_names: Sequence[str] = ()
    decoding: Decoding = Decoding()
    left_out: Sequence[str] = ()
    unlabelled: str | None = None

    @classmethod
    def opens(cls, spec: str) -> bool:
        """Whether this kind of source is what the user wrote."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """The image at `index` as 8-bit RGB; may raise anything where it is damaged."""
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        """The image at `index` as 8-bit RGB. Raises Unreadable, which names it."""
        with reading(f"{self.name(index)} in {self.spec}", "an image"):
            return self.read(index)

    def glance(self, index: int) -> None:
        """Look whether there is an image at `index`, as far as that is quickly seen: at the
        beginning of its file, or else at all of it. Raises Unreadable.
        """
        head = self.beginning(index)
        if head is None:
            self.image(index)
            return
        with reading(f"{self.name(index)} in {self.spec}", "an image"):
            require_beginning(head)

    def beginning(self, index: int) -> bytes | None:
        """The first BEGINNING bytes of the image's file; None where that is no quicker than all of
        it. Raises Unreadable.
        """
        return None

    def content(self, index: int) -> bytes | None:
        """The image's file as it is; None where there are no files. Raises Unreadable."""
        return None

    def caption_file(self, index: int) -> bytes | None:
        """The `.txt` file beside the image, None where there is none. Raises Unreadable."""
        return None

    def describe(self, index: int) -> str:
        """The image at `index` for fingerprints: its name, and what changes when the file does."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The image at `index` for messages."""
        return self.describe(index)

    def sight(self, index: int) -> bytes:
        """What tells the image at `index` from another of its name: its file, else its pixels.

        Raises Unreadable.
        """
        content = self.content(index)
        return content if content is not None else self.image(index).tobytes()

    def identity(self) -> str:
        """sha256 that says, wherever the data lie, whether they are the same: another one makes it
        another training. Of all names and classes in their order, and of a few images' content.

        Raises Unreadable for an image that is looked at and cannot be read.
        """
        names = "" if self.named_by_place else self._names()
        digest = self._of_classes(f"{len(self)}\n{names}")
        for index in sorted({i * len(self) // PROBES for i in range(PROBES)}):
            digest.update(hashlib.sha256(self.sight(index)).digest())
        return digest.hexdigest()

    def listing(self) -> str:
        """What checkpoints kept before they had `identity`: names and classes only."""
        return self._of_classes(self._names()).hexdigest()

    def _names(self) -> str:
        return "\n".join(map(self.name, range(len(self))))

    def _of_classes(self, names: str) -> Any:
        digest = hashlib.sha256(names.encode(errors="surrogateescape"))
        digest.update(repr(list(self.class_names)).encode())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest

    @property
    def num_classes(self) -> int | None:
        """How many classes there are: 0 without labels, None where only the single files know."""
        return len(self.class_names)

    @property
    def class_counts(self) -> list[int]:
        """How many images each class has; empty without labels."""
        if self.labels is None or not len(self.class_names):
            return []
        return np.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def check(self, config: Config) -> None:
        """Raise UsageError unless a resolved configuration can be trained on this data."""
        if wanted := text_shape(config.model):
            raise UsageError(
                f"the network draws from captions ({wanted[0]} tokens of width {wanted[1]}), "
                f"{self.spec} has none: "
                "encode them with `msmdiff data encode --captions`"
            )
