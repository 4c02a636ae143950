"""Encoded data sets: images that went through `Codec.pack` once, and the caches that other projects
made.

A packed set is a folder. `packed.json` describes it; `entries.npy` holds all entries [N, ...] in
one array that is memory-mapped, so that a shuffled batch is one gather; `labels.npy` [N];
`captions.npy` [M + 1, tokens, width] the text features of all captions and, last, of the empty one,
those of entry i between `offsets.npy` [i] and [i + 1]; `names.txt` a name per entry; `shards.txt` a
line per finished shard, so that a killed encoding goes on where it was.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msmdiff.core import files, registry
from msmdiff.core.condition import text_shape
from msmdiff.core.config import Config
from msmdiff.core.data import npy
from msmdiff.core.data.names import hidden
from msmdiff.core.data.source import Source
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.registry import register

FORMAT_VERSION = 1

HEADER = {
    "count": int,
    "shard": int,
    "shape": list,
    "dtype": str,
    "codec": dict,
    "image_size": int | None,
    "labelled": bool,
    "class_names": list,
    "text": dict | None,
    "mirrored": bool,
}
"""What packed.json says beside its version and its `source`."""


class Latents(Source):
    """Encoded images by index: moments (posterior mean, then standard deviation, unscaled), or
    uint8 pixels.

    Attributes:
        shape: of an entry: (2C, h, w) moments or (3, H, W) pixels, with a 2 in front where
            mirrored.
        mirrored: every entry holds the image's, then the mirrored image's.
        codec: what made them: `name` (vae, or pixel, which serves dwt too) and, where known, `vae`,
            `sha256`, ...
        image_size: side of the images in pixels; None for a cache, which does not tell.
        text: the captions' `encoder`, `sha256` and `shape` (tokens, width), or None.
        null_context: the empty caption's features, float32 [tokens, width], or None.
    """

    brings_labels = False

    shape: tuple[int, ...]
    codec: dict[str, Any]
    mirrored = False
    image_size: int | None = None
    text: dict[str, Any] | None = None
    null_context: Tensor | None = None
    captioned = False
    """Whether training reads captions instead of labels: set by `check`, where the network draws
    from text.
    """

    @property
    def moments(self) -> bool:
        """Whether entries are means and deviations instead of pixels."""
        return self.codec["name"] != "pixel"

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Entries [B, *shape] and their labels int64 [B], or None, at int64 indices [B]."""
        raise NotImplementedError

    def context(self, indices: np.ndarray, rng: np.random.Generator) -> Tensor:
        """The features of one of each entry's captions, drawn from `rng`: float32 [B, tokens,
        width].
        """
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        if self.moments:
            raise UsageError(f"{self.spec} holds latents, not images")
        entry = self.gather(np.array([index]))[0][0]
        return Image.fromarray((entry[0] if self.mirrored else entry).permute(1, 2, 0).numpy())

    def sight(self, index: int) -> bytes:
        return self.gather(np.array([index]))[0].numpy().tobytes()

    def check(self, config: Config) -> None:
        """Complete `codec.vae` and `codec.text`, and raise UsageError unless the configuration fits
        these entries.
        """
        data, codec = config.data, config.codec
        kind = registry.find("codec", codec.name, "codec.name").make
        made_by = self.codec["name"]
        fits: dict[str, tuple[Any, Any]] = {"data.crop": (data.crop, "center")}
        if self.image_size is not None:
            fits["data.image_size"] = (data.image_size, self.image_size)
        if kind.packs == made_by:
            kind.complete(codec, self.codec)
            fits |= kind.fits(codec, data.image_size, self.shape)
        else:
            suited = [e.name for e in registry.entries("codec").values() if e.make.packs == made_by]
            fits = {"codec.name": (codec.name, " or ".join(suited) or made_by)}
        if wanted := text_shape(config.model):
            if self.text is None:
                super().check(config)
            fits["model.context_tokens and context_width"] = (
                wanted,
                tuple((self.text or {})["shape"]),
            )
            codec.text, self.captioned = codec.text or (self.text or {}).get("encoder"), True
        problems = [
            f"{key} is {have}, not {needed}"
            for key, (have, needed) in fits.items()
            if have != needed
        ]
        if self.moments and data.hflip and not self.mirrored:
            problems.append(
                "data.hflip needs mirrored latents: encode with --mirror, or set it to 0"
            )
        if problems:
            raise UsageError(f"the configuration does not fit {self.spec}: {'; '.join(problems)}")


@register("source", "packed", summary="a packed set, as `data encode` writes it")
class Packed(Latents):
    """A packed set. Raises UsageError for one that is not finished, and MsmdiffError for a damaged
    one.
    """

    @classmethod
    def opens(cls, spec: str) -> bool:
        return (Path(spec) / "packed.json").is_file()

    def __init__(self, spec: str, labels: str = "auto") -> None:
        self.spec, path = spec, Path(spec)
        header = read_header(path)
        shards = -(-header["count"] // header["shard"])
        done = sum(number < shards for number in finished(path))
        if done < shards:
            raise UsageError(
                f"{spec} is not finished ({done} of {shards} shards): run the same `data "
                "encode` again"
            )
        self.shape, self.mirrored = tuple(header["shape"]), header["mirrored"]
        self.codec, self.image_size, self.header = header["codec"], header["image_size"], header
        self._entries = torch.from_numpy(npy.mapped(path / "entries.npy"))
        self._labels = None
        if header["labelled"] and labels != "none":
            self.labels = npy.load(path / "labels.npy").astype(np.int64)
            self._labels = torch.from_numpy(self.labels)
        self.text = header["text"]
        if self.text:
            self._captions = torch.from_numpy(npy.mapped(path / "captions.npy"))
            self._offsets = npy.load(path / "offsets.npy").astype(np.int64)
            self.null_context = self._captions[-1].float()
        with files.reading(path / "names.txt", "a list of names"):
            text = (path / "names.txt").read_bytes().decode(errors="surrogateescape")
            self.names = text.removesuffix("\n").split("\n")
        if wrong := self._inconsistent():
            raise MsmdiffError(f"{spec} is damaged: {wrong}: encode it again")
        if self.labels is not None:
            most = int(self.labels.max()) + 1
            self.class_names = header["class_names"] or [str(i) for i in range(most)]

    def _inconsistent(self) -> str | None:
        """What the files of the set say against each other. Before anything is sized by them."""
        count = self.header["count"]
        kept = (tuple(self._entries.shape), f"{self._entries.dtype}")
        if kept != ((count, *self.shape), f"torch.{self.header['dtype']}"):
            return "entries.npy has not the shape that packed.json says"
        if self.labels is not None:
            most = len(self.header["class_names"]) or MOST_CLASSES
            if self.labels.shape != (count,):
                return f"labels.npy has the shape {list(self.labels.shape)}, not [{count}]"
            if not 0 <= self.labels.min() <= self.labels.max() < most:
                return f"labels.npy holds classes outside 0 to {most - 1}"
        if self.text:
            steps = np.diff(self._offsets, prepend=0, append=len(self._captions) - 1)
            fits = tuple(self._captions.shape[1:]) == tuple(self.text["shape"])
            if not fits or len(self._offsets) != count + 1 or steps.min() < 0:
                return "captions.npy and offsets.npy do not belong together"
        if len(self.names) != count:
            return f"names.txt has {len(self.names)} lines for {count} entries"
        return None

    def __len__(self) -> int:
        return len(self._entries)

    def describe(self, index: int) -> str:
        return self.names[index]

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        chosen = torch.from_numpy(indices)
        entries = self._entries.index_select(0, chosen)
        self._require_numbers(entries, indices, "entries")
        return entries, None if self._labels is None else self._labels[chosen]

    def context(self, indices: np.ndarray, rng: np.random.Generator) -> Tensor:
        first, last = self._offsets[indices], self._offsets[indices + 1]
        captions = self._captions[torch.from_numpy(rng.integers(first, last))]
        self._require_numbers(captions, indices, "captions")
        return captions.float()

    def _require_numbers(self, values: Tensor, indices: np.ndarray, what: str) -> None:
        """Refuse values [B, ...] that are not finite: `data encode` writes none, but a disk may,
        and earlier versions did.
        """
        if not values.is_floating_point() or values.isfinite().all():
            return
        bad = int(indices[int((~values.isfinite()).flatten(1).any(1).nonzero()[0])])
        raise MsmdiffError(
            f"{self.spec}: the {what} of {self.names[bad]} (shard {bad // self.header['shard']}) "
            "hold numbers that are not finite: encode the set again"
        )


def read_header(path: Path) -> dict[str, Any]:
    """The content of a set's packed.json. Raises MsmdiffError when it is damaged or from a newer
    version.
    """
    with files.reading(path / "packed.json", "the description of a packed set"):
        header = json.loads((path / "packed.json").read_text(encoding="utf-8"))
        version = int(header["msmdiff_packed"])
        wrong = [key for key, kind in HEADER.items() if not isinstance(header.get(key, ...), kind)]
        if version <= FORMAT_VERSION and (wrong or min(header["count"], header["shard"]) < 1):
            raise ValueError(f"its {' and '.join(wrong) or 'count'} cannot be")
    if version > FORMAT_VERSION:
        raise MsmdiffError(
            f"{path} was packed by a newer msmdiff; this one reads format "
            f"{FORMAT_VERSION}: upgrade it"
        )
    return header


def finished(path: Path) -> set[int]:
    """A set's finished shards; a line of shards.txt that a kill cut short does not count."""
    place = path / "shards.txt"
    text = place.read_text(encoding="utf-8", errors="replace") if place.is_file() else ""
    return {int(n) for n in re.findall(r"^(\d{1,12}) done$", text, re.MULTILINE)}


# ------------------------------------------------------------------ one file per image: the caches

FAST_DIT_SCALE = 0.18215

MOST_CLASSES = 1_000_000
"""A label beyond is damage: a network has a row for every class."""


@register("source", "cache", summary="latents of fast-DiT, EDT or U-ViT, a file each")
class Cache(Latents):
    """One `.npy` per image, as fast-DiT, EDT and U-ViT extract them, read as they are; `data
    encode` packs them.

    fast-DiT and EDT: `*_features/I.npy` (1, C, h, w), one posterior sample times 0.18215,
    `*_labels/I.npy`, in the order of the sorted names. U-ViT: `I.npy` (2C, h, w), mean and
    log-variance, alone or as a pickled pair with the label (which is decoded, not unpickled); with
    captions `I_J.npy` beside it, and the empty one in `empty_context.npy` there or one folder up.
    """

    codec = {"name": "vae"}  # noqa: RUF012

    @classmethod
    def opens(cls, spec: str) -> bool:
        return bool(_folders(Path(spec)))

    def __init__(self, spec: str, rule: str = "auto") -> None:
        self.spec, root = spec, Path(spec)
        self._features = _folders(root)[0]
        self._labels = next(iter(_shown(root, "*_labels")), None)
        if self._features == root:
            self._labels = None
        names = {p.name for p in _shown(self._features, "*.npy")} - {"empty_context.npy"}
        captions = [m for name in names if (m := re.fullmatch(r"(\d+)_\d+\.npy", name))]
        self.names = sorted(
            names - {m.string for m in captions}, key=lambda n: n if self._labels else (len(n), n)
        )
        if self._labels and (
            missing := set(self.names) - {p.name for p in self._labels.glob("*.npy")}
        ):
            raise UsageError(
                f"{self._labels} lacks {len(missing)} of the features' labels, such as "
                f"{min(missing)}"
            )
        self._captions: dict[str, list[str]] = {}
        for match in captions:
            self._captions.setdefault(f"{match[1]}.npy", []).append(match.string)
        self._classes = 0
        self.shape = ()
        entry, label = self._entry(0)
        self.shape, self._labelled = tuple(entry.shape), label is not None and rule != "none"
        if self._captions:
            places = [p / "empty_context.npy" for p in (self._features, self._features.parent)]
            if not (empty := [p for p in places if p.is_file()]):
                raise UsageError(
                    f"{spec} has captions but no empty_context.npy, here or one folder up"
                )
            self.null_context = self._alike(empty[0], _features(empty[0]), ())
            self.text = {"encoder": None, "sha256": None, "shape": list(self.null_context.shape)}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int | None:
        return None if self._labelled else 0

    def check(self, config: Config) -> None:
        super().check(config)
        self._classes = int(config.model.num_classes)

    def describe(self, index: int) -> str:
        return self.names[index]

    def gather(self, indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        entries, labels = zip(*(self._entry(int(i)) for i in indices), strict=True)
        if self._labelled and self._classes and max(labels) >= self._classes:
            raise MsmdiffError(
                f"{self.spec} has class {max(labels)}, model.num_classes is {self._classes}"
            )
        return torch.stack(entries), torch.tensor(labels) if self._labelled else None

    def context(self, indices: np.ndarray, rng: np.random.Generator) -> Tensor:
        counts = [self.caption_count(int(i)) for i in indices]
        return torch.stack(
            [
                self.caption(int(i), int(rng.integers(n)))
                for i, n in zip(indices, counts, strict=True)
            ]
        )

    def caption_count(self, index: int) -> int:
        """How many captions an entry has. Raises MsmdiffError for none."""
        if not (names := self._captions.get(self.names[index])):
            raise MsmdiffError(f"{self.spec}: {self.names[index]} has no captions")
        return len(names)

    def caption(self, index: int, number: int) -> Tensor:
        """The features of one of an entry's captions: float32 [tokens, width]."""
        path = self._features / f"{self.names[index].removesuffix('.npy')}_{number}.npy"
        assert self.text is not None
        return self._alike(path, _features(path), tuple(self.text["shape"]))

    def _entry(self, index: int) -> tuple[Tensor, int | None]:
        """One entry's moments, and its label where the file or its neighbour has one."""
        path = self._features / self.names[index]
        array, label = npy.load_pair(path)
        if self._labels is not None:
            label = npy.load_whole(self._labels / self.names[index])
        if label is not None and not 0 <= label < MOST_CLASSES:
            raise MsmdiffError(f"{path} has the label {label}: classes are 0 to {MOST_CLASSES - 1}")
        values = torch.from_numpy(array.astype(np.float32))
        if values.ndim == 4 and len(values) == 1:
            mean = values[0] / FAST_DIT_SCALE
            moments = torch.cat([mean, torch.zeros_like(mean)])
        elif values.ndim == 3 and len(values) and len(values) % 2 == 0:
            mean, logvar = values.chunk(2)
            moments = torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30, 20))])
        else:
            raise MsmdiffError(
                f"{path} is {list(array.shape)}: neither (1, C, h, w) latents nor (2C, "
                "h, w) moments"
            )
        return self._alike(path, moments, self.shape), label

    def _alike(self, path: Path, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Values of this shape, where one is known, which are numbers."""
        if shape and tuple(values.shape) != shape:
            raise MsmdiffError(
                f"{path} holds {list(values.shape)}, the first file of {self.spec} {list(shape)}"
            )
        if not values.isfinite().all():
            raise MsmdiffError(f"{path} holds numbers that are not finite: encode it again")
        return values


def _folders(root: Path) -> list[Path]:
    """Where a cache's entries may lie: folders with a first one."""
    return [f for f in (*_shown(root, "*_features"), root) if (f / "0.npy").is_file()]


def _shown(folder: Path, pattern: str) -> list[Path]:
    """What matches in a folder, in order, without what every other source passes over, too."""
    return sorted(path for path in folder.glob(pattern) if not hidden(path.name))


def _features(path: Path) -> Tensor:
    """A caption's features in a file: float32 [tokens, width]."""
    features = torch.from_numpy(npy.load(path).astype(np.float32))
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2:
        raise MsmdiffError(f"{path} is {list(features.shape)}: not (tokens, width) features")
    return features
