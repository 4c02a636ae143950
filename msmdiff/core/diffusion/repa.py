"""REPA (Yu et al. 2025) and iREPA: a network's hidden tokens follow the patch features that a
frozen image encoder has of the clean image.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from msmdiff.core import tensor_files
from msmdiff.core.backbones.layers import gather_tokens
from msmdiff.core.backbones.routes import Hidden
from msmdiff.core.diffusion.alignment import (
    Alignment,
    AlignmentOptions,
    Seen,
    Surroundings,
    cosine_distance,
    paired,
    projection,
)
from msmdiff.core.diffusion.codecs import Codec, to_uint8
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.registry import register

DINOV2_B = "vit_base_patch14_dinov2.lvd142m"
DECODED_AT_ONCE = 32
"""Images per pass of the codec's decoder."""


class RepaOptions(AlignmentOptions):
    encoder: str = Field(DINOV2_B, description="The image encoder: a vision transformer of timm's.")
    encoder_weights: str | None = Field(
        None, description="The file of the encoder's weights, as timm or its hub stores them."
    )
    align_width: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="The width of the projector; null takes 2048, or 4 x hidden_size where that "
        "is less.",
    )


class Encoder(nn.Module):
    """A frozen vision transformer of timm's, for a grid of as many patches as the student has
    tokens.

    Raises UsageError for a name that is no such network.
    """

    def __init__(self, name: str, grid: tuple[int, int]) -> None:
        import timm
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        self.name, self.grid = name, grid
        try:
            with torch.device("meta"):
                usual: Any = timm.create_model(name, num_classes=0)
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"objective.encoder {name} is no network of timm's: {error}, such as {DINOV2_B}"
            ) from None
        if not isinstance(usual, VisionTransformer):
            raise UsageError(
                f"objective.encoder {name} is no vision transformer, whose patches have features: "
                f"take one such as {DINOV2_B}"
            )
        patch: Any = usual.patch_embed.patch_size
        self.size = (grid[0] * patch[0], grid[1] * patch[1])
        with torch.device("meta"):
            self.network: Any = self._made()
        self.width: int = self.network.embed_dim
        described: Any = usual.default_cfg
        self.mean: Tensor
        self.deviation: Tensor
        for own, theirs in (("mean", "mean"), ("deviation", "std")):
            numbers = torch.tensor(described[theirs], device="cpu").view(3, 1, 1)
            self.register_buffer(own, numbers, persistent=False)
        self.digest = ""

    def _made(self) -> Any:
        import timm

        return timm.create_model(self.name, num_classes=0, img_size=self.size)

    def load(self, weights: str | None, device: torch.device) -> None:
        """Read the weights. Raises UsageError where there are none, and MsmdiffError where they are
        another network's.
        """
        from timm.models.vision_transformer import checkpoint_filter_fn

        if weights is None or not Path(weights).is_file():
            raise UsageError(
                f"objective.encoder_weights {weights}: give the file of {self.name}'s weights"
            )
        state = _tensors(tensor_files.read(Path(weights)), weights)
        network = self._made()
        # Positions come from another number of patches, and a head that nobody asks for.
        fitted = {k: v for k, v in state.items() if not k.startswith(("head.", "mask_token"))}
        try:
            network.load_state_dict(checkpoint_filter_fn(fitted, network))
        except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            message = f"{weights} does not hold the weights of {self.name}: {reason}"
            raise MsmdiffError(message) from None
        digest = hashlib.sha256()
        for key in sorted(fitted):
            digest.update(fitted[key].float().numpy().tobytes())
        self.digest = digest.hexdigest()[:16]
        self.network = network.requires_grad_(False)
        self.to(device).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> the features of the student's patches [B, L, E], row by row."""
        x = F.interpolate(images.float() / 255, self.size, mode="bicubic", antialias=True)
        tokens = self.network.forward_features((x.clamp(0, 1) - self.mean) / self.deviation)
        return tokens[:, self.network.num_prefix_tokens :]

    def sketch(self) -> "Encoder":
        """The same, all of it on the meta device."""
        return Encoder(self.name, self.grid).to("meta").eval().requires_grad_(False)


def _tensors(content: Any, path: str) -> dict[str, Tensor]:
    """The tensors of a network that lie in a file by name, or in its `state_dict` or `model`.

    Raises MsmdiffError where it holds something else.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise MsmdiffError(
            f"{path} holds no network's tensors by name but a {type(content).__name__}: give the "
            "file of a state dict, as timm stores it"
        )
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise MsmdiffError(
                f"{path} holds {key!r}, a {type(value).__name__}, beside or in place of a "
                "network's tensors: give the file of a state dict, as timm stores it"
            )
    return content


def decoded(codec: Codec, x0: Tensor) -> Tensor:
    """The images of x0 [B, C, H, W], uint8 [B, 3, H, W], without a wait for a GPU."""
    parts = x0.split(DECODED_AT_ONCE)
    return torch.cat([to_uint8(codec.unrounded(part), checked=False) for part in parts])


class Rehearsal(nn.Module):
    """A decoder and an encoder without numbers, and the pass of a step through them."""

    def __init__(self, codec: Codec, encoder: Encoder) -> None:
        super().__init__()
        self.codec, self.decoder, self.encoder = codec, codec.network, encoder

    @torch.no_grad()
    def forward(self, x0: Tensor) -> Tensor:
        return self.encoder(decoded(self.codec, x0))


@register("alignment", "repa", RepaOptions)
class Repa(Alignment):
    """REPA: projected tokens follow a frozen encoder's patch features, by their cosine."""

    def __init__(
        self,
        around: Surroundings,
        *,
        align_weight: float,
        align_until: float,
        align_block: int | None,
        encoder: str,
        encoder_weights: str | None,
        align_width: int | None = None,
    ) -> None:
        network = around.network
        if hasattr(network, "grids"):
            raise UsageError(
                "objective.alignment repa pairs each token with a patch of the encoder, and a "
                "wavelet network has two groups of tokens: use model.family uvit or dit"
            )
        watched = around.behind("align_block", align_block, 8)
        super().__init__(around, align_weight, align_until, (watched,))
        self.weights, self.encoder = encoder_weights, Encoder(encoder, network.grid)
        self.projector = self.make_projector(align_width)

    def make_projector(self, inner: int | None) -> nn.Module:
        return projection(self.hidden_size, inner, self.encoder.width)

    def start(
        self,
        device: torch.device,
        averages: Mapping[str, nn.Module],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().start(device, averages, autocast)
        self.autocast = autocast
        self.around.codec.load(device)
        self.encoder.load(self.weights, device)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "encoder": self.encoder.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["encoder"] != self.encoder.digest:
            raise UsageError(
                f"objective.encoder_weights {self.weights} holds other numbers than the file that "
                "this run was started with: give that file"
            )
        super().load_state_dict(state)

    def distance(self, seen: Seen) -> Tensor:
        told = self.projected(seen.hidden[self.student])
        return cosine_distance(*paired(told, Hidden(self.features(seen), None)))

    @torch.no_grad()
    def features(self, seen: Seen) -> Tensor:
        """What the encoder makes of the clean images, [B, L, E]."""
        with self.autocast():
            return self.encoder(decoded(self.around.codec, seen.x0))

    def passes(self, forward: int, masked: int) -> int:
        with FlopCounterMode(display=False) as counter:
            self.rehearsal()(torch.empty(1, *self.around.codec.shape, device="meta"))
        return counter.get_total_flops()

    def rehearsal(self) -> nn.Module:
        return Rehearsal(self.around.codec.sketch(), self.encoder.sketch())


class Convolution(nn.Module):
    """A 3x3 convolution over tokens on their grid; hidden ones are zero."""

    def __init__(self, width: int, out: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """tokens [B, L or K, D] of the ids keep [B, K] -> [B, L or K, out]."""
        if keep is not None:
            place = keep.unsqueeze(-1).expand_as(tokens)
            empty = tokens.new_zeros(len(tokens), self.grid[0] * self.grid[1], tokens.shape[-1])
            tokens = empty.scatter(1, place, tokens)
        image = tokens.mT.unflatten(-1, self.grid)
        out = self.conv(image).flatten(2).mT
        return out if keep is None else gather_tokens(out, keep)


class IRepaOptions(AlignmentOptions):
    encoder: str = Field(DINOV2_B, description="The image encoder: a vision transformer of timm's.")
    encoder_weights: str | None = Field(
        None, description="The file of the encoder's weights, as timm or its hub stores them."
    )


@register("alignment", "irepa", IRepaOptions)
class IRepa(Repa):
    """iREPA: REPA with a convolution as projector, and features without their mean over the
    image.
    """

    def make_projector(self, inner: int | None) -> nn.Module:
        return Convolution(self.hidden_size, self.encoder.width, self.encoder.grid)

    def projected(self, hidden: Hidden) -> Hidden:
        project: Any = self._project or self.projector
        return Hidden(project(hidden.tokens, hidden.keep), hidden.keep)

    def features(self, seen: Seen) -> Tensor:
        features = super().features(seen).float()
        deviation, mean = torch.std_mean(features, dim=1, keepdim=True)
        return (features - mean) / (deviation + 1e-6)
