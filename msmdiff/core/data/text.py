"""Captions: where they come from, and the features that a text encoder makes of them."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from msmdiff.core import files, hub
from msmdiff.core.condition import text_shape
from msmdiff.core.config import Config
from msmdiff.core.data.latents import Cache
from msmdiff.core.data.source import Source
from msmdiff.core.diffusion.codecs.vae import checksum
from msmdiff.core.errors import MsmdiffError, UsageError


class TextEncoder:
    """CLIP's text encoder (Radford et al. 2021) as U-ViT and Stable Diffusion use it: the last
    hidden states.

    Attributes:
        about: `encoder` (a folder or hub id), `sha256` of its numbers, `shape` (tokens, width) of a
            text's features.

    Raises MsmdiffError when it cannot be loaded.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        try:
            from transformers import CLIPTextModel, CLIPTokenizer, logging
        except ImportError:
            raise MsmdiffError("captions need transformers: pip install 'msmdiff[text]'") from None
        # It would list the image encoder's tensors, which are not used.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with hub.loading(source, "text encoder", "give a folder (codec.text, --text)"):
                self._tokenizer = CLIPTokenizer.from_pretrained(source)
                loaded: Any = CLIPTextModel.from_pretrained(source, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise MsmdiffError(
                f"{source} cannot be loaded as a CLIP text encoder: {reason}"
            ) from None
        network, loading = loaded
        if missing := loading["missing_keys"]:
            raise MsmdiffError(
                f"text encoder {source} lacks {len(missing)} of the network's tensors"
            )
        self._network, self._device = network.eval().to(device), device
        self.shape = (network.config.max_position_embeddings, network.config.hidden_size)
        self.about = {
            "encoder": source,
            "sha256": checksum(network.state_dict()),
            "shape": list(self.shape),
        }

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> features float32 [N, tokens, width] on the CPU; longer texts are cut."""
        parts = []
        for start in range(0, len(texts), 64):
            rule: Any = dict(
                padding="max_length", truncation=True, max_length=self.shape[0], return_tensors="pt"
            )
            ids = self._tokenizer(list(texts[start : start + 64]), **rule).input_ids
            parts.append(self._network(ids.to(self._device)).last_hidden_state.float().cpu())
        return torch.cat(parts)


@dataclass
class Captions:
    """The captions of a data set: how many each image has, and the features of those of some
    images.

    `features` takes indices of images and returns [all their captions, tokens, width]; `null`
    [tokens, width] is the empty caption's; `about` describes the encoder.
    """

    counts: list[int]
    features: Callable[[range], Tensor]
    null: Tensor
    about: dict[str, Any]

    @classmethod
    def read(cls, source: Source, spec: str, encoder: TextEncoder) -> "Captions":
        """Those of `read_captions`."""
        texts = read_captions(source, spec)

        def features(chosen: range) -> Tensor:
            return encoder([text for i in chosen for text in texts[i]])

        return cls([len(each) for each in texts], features, encoder([""])[0], encoder.about)

    @classmethod
    def of_cache(cls, cache: Cache) -> "Captions":
        """Those that another project stored beside its latents."""
        assert cache.null_context is not None
        assert cache.text is not None
        counts = [cache.caption_count(i) for i in range(len(cache))]

        def features(chosen: range) -> Tensor:
            return torch.stack([cache.caption(i, k) for i in chosen for k in range(counts[i])])

        return cls(counts, features, cache.null_context, cache.text)


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises UsageError where there are none."""
    try:
        lines = files.read_text(path).splitlines()
    except MsmdiffError as error:
        raise UsageError(f"--prompts {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {path} holds no prompts: write one a line")
    return prompts


def features(config: Config, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What a text-to-image network samples from: the prompts' features float16 [N, tokens, width],
    the empty one's.

    Raises UsageError unless the network of the resolved configuration and `codec.text` go with
    prompts.
    """
    wanted, source = text_shape(config.model), config.codec.text
    if wanted is None:
        raise UsageError("--prompts: this network does not draw from text")
    if not prompts:
        raise UsageError("this network draws from text: give --prompts FILE, one prompt a line")
    if source is None:
        raise UsageError("--prompts needs the text encoder: --set codec.text=FOLDER, or a hub id")
    encoder = TextEncoder(source, "cuda" if torch.cuda.is_available() else "cpu")
    if encoder.shape != wanted:
        raise UsageError(
            f"codec.text {source} makes {encoder.shape} tokens and width, the network "
            f"takes {wanted}"
        )
    return encoder(prompts).half(), encoder([""])[0]


def read_captions(source: Source, spec: str) -> list[list[str]]:
    """Every image's captions: of `NAME.txt` beside it, one a line (spec `txt`), or of a JSON file.

    The file is MS-COCO's annotations, or maps file names to a list of captions. Raises UsageError
    when an image has none.
    """
    names, table = (
        [source.name(i) for i in range(len(source))],
        {} if spec == "txt" else _read_json(spec),
    )
    captions = []
    for i, name in enumerate(names):
        found = table.get(name) or table.get(name.rpartition("/")[2], [])
        if spec == "txt":
            with files.reading(f"the caption of {name}", "a text"):
                found = files.decoded(source.caption_file(i) or b"").splitlines()
        captions.append([text.strip() for text in found if text.strip()])
    if without := [name for name, texts in zip(names, captions, strict=True) if not texts]:
        count = f"{len(without)} of {len(names)}"
        problem = f"{count} images in {source.spec} have no caption, such as {without[0]}"
        raise UsageError(f"--captions {spec}: {problem}")
    return captions


def _read_json(path: str) -> dict[str, list[str]]:
    """Captions by file name."""
    try:
        with files.reading(path, "`txt`, nor a JSON file of captions,"):
            content = json.loads(files.read_text(path))
            table = _coco(content) if "annotations" in content else _by_name(content)
            odd = [name for name, texts in table.items() if not all(map(_is_text, texts))]
            if odd:
                raise ValueError(f"the captions of {odd[0]} are not text")
            return table
    except MsmdiffError as error:
        raise UsageError(f"--captions {error}") from None


def _coco(content: dict[str, Any]) -> dict[str, list[str]]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    table: dict[str, list[str]] = defaultdict(list)
    for note in content["annotations"]:
        table[names[note["image_id"]]].append(note["caption"])
    return table


def _by_name(content: dict[str, Any]) -> dict[str, list[str]]:
    found = content.items()
    return {name: [texts] if isinstance(texts, str) else list(texts) for name, texts in found}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
