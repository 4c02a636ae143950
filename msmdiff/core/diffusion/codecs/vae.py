"""Latents of an autoencoder."""

import copy
import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, StrictBool
from torch import Tensor

from msmdiff.core import files, hub, tensor_files
from msmdiff.core.diffusion.codecs import Codec, to_uint8, to_unit
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.registry import Options, register


class VaeOptions(Options):
    vae: str | None = Field(
        None,
        description="The folder, file or hub id of an AutoencoderKL; null takes the one that "
        "packed data was encoded with.",
    )
    vae_sha256: str | None = Field(
        None,
        description="The checksum of the VAE that the latents were made with: another VAE is "
        "refused. Null takes the packed data's, and `any` does not look.",
    )
    vae_config: str | None = Field(
        None,
        description="For a single file, the folder or hub id with its config.json; null takes "
        "Stable Diffusion's.",
    )
    scale: float = Field(
        0.18215, gt=0, description="The factor of latents: x0 = scale (latent - mean) / std."
    )
    mean: list[float] | None = Field(
        None, description="The mean of each latent channel; null takes 0."
    )
    std: list[float] | None = Field(
        None, description="The standard deviation of each latent channel; null takes 1."
    )
    channels: int = Field(4, ge=1, le=4096, description="The number of channels of a latent.")
    factor: int = Field(8, ge=1, le=1024, description="Pixels per latent along a side.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="The precision of the autoencoder."
    )
    tile: StrictBool = Field(
        False,
        description="Encode and decode large images in tiles, which takes less memory and gives "
        "slightly other latents.",
    )


@register("codec", "vae", VaeOptions)
class VaeCodec(Codec):
    """Latents of a diffusers AutoencoderKL, brought to about unit scale: x0 = scale (latent - mean)
    / std.

    The network is loaded when it is first used, so that a denoiser's shape is known without it.

    Args:
        image_size: side of the images in pixels; must divide by the network's factor.
        options: where the network is, and one `mean` and `std` per channel.

    Raises UsageError for an indivisible size or a wrong number of statistics, and, on use,
    MsmdiffError when the network cannot be had or is not of these channels and this factor.
    """

    packs = "vae"

    @classmethod
    def factor_of(cls, options: dict[str, Any]) -> int:
        return options["factor"]

    @classmethod
    def complete(cls, section: Any, identity: dict[str, Any]) -> None:
        section.vae = section.vae or identity.get("vae")
        section.vae_sha256 = section.vae_sha256 or identity.get("sha256")

    @classmethod
    def fits(cls, section: Any, image_size: int, entry: tuple[int, ...]) -> dict[str, Any]:
        return {
            "codec.channels": (section.channels, entry[-3] // 2),
            "data.image_size / codec.factor": (image_size // section.factor, entry[-1]),
        }

    def __init__(self, image_size: int, **options: Any) -> None:
        config = VaeOptions(**options)
        if image_size % config.factor:
            raise UsageError(
                f"data.image_size {image_size} does not divide by {config.factor}, the VAE's factor"
            )
        for name, values in (("mean", config.mean), ("std", config.std)):
            if values is not None and len(values) != config.channels:
                raise UsageError(
                    f"codec.{name} has {len(values)} numbers; the latents have {config.channels} "
                    "channels"
                )
        if config.std is not None and min(config.std) <= 0:
            raise UsageError(
                f"codec.std has {min(config.std)}; every channel's deviation must be positive"
            )
        self.config, self.factor = config, config.factor
        side = image_size // config.factor
        self.shape = (config.channels, side, side)
        self._mean = torch.tensor(config.mean or [0.0], device="cpu").view(-1, 1, 1)
        deviation = torch.tensor(config.std or [1.0], device="cpu").view(-1, 1, 1)
        self._scale = config.scale / deviation

    def load(self, device: torch.device | str = "cpu") -> None:
        self._network(torch.device(device))

    def pack(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> mean and standard deviation of the posterior, float32 [B, 2C, H/f,
        W/f].
        """
        vae = self._network(images.device)
        with torch.no_grad():
            posterior = vae.encode(to_unit(images).to(vae.dtype)).latent_dist
        return torch.cat([posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())], dim=1)

    def encode(self, packed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A fresh draw from the posterior; images (uint8) are packed first."""
        if packed.dtype == torch.uint8:
            packed = self.pack(packed)
            if not packed.isfinite().all():
                raise MsmdiffError(
                    f"codec.vae {self.config.vae} encodes images to numbers that are not finite: "
                    "set codec.precision=fp32, or give another VAE"
                )
        mean, std = packed.float().chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        self._to(mean.device)
        return self._scale * (mean + std * noise - self._mean)

    def decode(self, z: Tensor, rounding: str = "half_even") -> Tensor:
        return to_uint8(self.unrounded(z), rounding)

    def unrounded(self, z: Tensor) -> Tensor:
        vae = self._network(z.device)
        with torch.no_grad():
            images: Tensor = vae.decode((z.float() / self._scale + self._mean).to(vae.dtype)).sample
        return images

    def sketch(self) -> "VaeCodec":
        """Of the folder's settings where it is here, else of Stable Diffusion's with as many
        channels and this factor. Raises MsmdiffError where diffusers is missing.
        """
        drawn = copy.copy(self)
        with torch.device("meta"):
            drawn.network = _sketched(self.config)
        return drawn

    def identity(self) -> dict[str, Any]:
        """What made a packed set: settings, and the checksum of the network's numbers."""
        self._network(torch.device("cpu"))
        settings = {key: getattr(self.config, key) for key in ("vae", "precision", "tile")}
        return {"name": self.packs, **settings, "sha256": self._checksum}

    def example(self, batch: int, device: torch.device | str) -> Tensor:
        """Means and deviations, packed before."""
        channels, height, width = self.shape
        size = (batch, 2 * channels, height, width)
        return torch.rand(size, dtype=torch.float16, device=device)

    def _to(self, device: torch.device) -> None:
        if self._mean.device != device:
            self._mean, self._scale = self._mean.to(device), self._scale.to(device)

    def _network(self, device: torch.device) -> Any:
        if self.network is None:
            vae, config = _load_vae(self.config), self.config
            self._checksum = checksum(vae.state_dict())
            wanted = config.vae_sha256
            if wanted not in (None, "any", self._checksum):
                raise UsageError(
                    f"codec.vae {config.vae} is not the VAE that the latents were made with: its "
                    f"checksum is {self._checksum}, theirs {wanted}; give that one, or --set "
                    "codec.vae_sha256=any"
                )
            found = (vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1))
            if found != (config.channels, config.factor):
                raise UsageError(
                    f"codec.vae {config.vae} makes {found[0]} channels at a factor of {found[1]}: "
                    "set codec.channels="
                    f"{found[0]} and codec.factor={found[1]}, not {config.channels} and "
                    f"{config.factor}"
                )
            self.network = _in_precision(vae, config)
        self._to(device)
        if self.network.device != device:
            self.network.to(device)
        return self.network


def checksum(tensors: dict[str, Tensor]) -> str:
    """sha256 over a network's tensors by name, whatever kind of file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


NO_DIFFUSERS = "latents need diffusers: pip install 'msmdiff[vae]'"
STABLE_DIFFUSION_VAE: dict[str, Any] = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=512,
)


def _in_precision(vae: Any, config: VaeOptions) -> Any:
    if config.tile:
        vae.enable_tiling()
    return vae.bfloat16() if config.precision == "bf16" else vae


def _sketched(config: VaeOptions) -> Any:
    """The network without numbers, on the default device; the hub is not asked."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise MsmdiffError(NO_DIFFUSERS) from None
    own = config.vae_config or config.vae or ""
    if (Path(own) / "config.json").is_file():
        with files.reading(Path(own) / "config.json", "the settings of an AutoencoderKL"):
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(own))
    else:
        usual = STABLE_DIFFUSION_VAE
        levels = max(1, config.factor.bit_length())
        widths = (*usual["block_out_channels"], *[512] * levels)[:levels]
        vae = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            latent_channels=config.channels,
        )
    return _in_precision(vae, config).eval().requires_grad_(False)


def _load_vae(config: VaeOptions) -> Any:
    source = config.vae
    if source is None:
        raise UsageError(
            "latents need their VAE: --set codec.vae=FOLDER (for `data encode`: --vae FOLDER), a "
            "file, or a hub id "
            "such as stabilityai/sd-vae-ft-ema"
        )
    try:
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    except ImportError:
        raise MsmdiffError(NO_DIFFUSERS) from None
    try:
        if not Path(source).is_file():
            with hub.loading(source, "codec.vae", "give a folder or a file"):
                vae, loading = AutoencoderKL.from_pretrained(source, output_loading_info=True)
            # Of these diffusers only warns, and goes on with random numbers.
            missing = loading["missing_keys"]
        else:
            settings = STABLE_DIFFUSION_VAE
            if config.vae_config:
                with hub.loading(config.vae_config, "codec.vae_config", "give a folder"):
                    settings = AutoencoderKL.load_config(config.vae_config)
            vae = AutoencoderKL.from_config(settings)
            tensors = tensor_files.read(source)
            held = tensors.get("state_dict", tensors)
            tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
            if not tensors:
                raise ValueError("it holds no tensors")
            if any(
                "mid.block_1." in name for name in tensors
            ):  # the layout of Stable Diffusion's own code
                tensors = convert_ldm_vae_checkpoint(tensors, settings)
            missing = vae.load_state_dict(tensors, strict=False).missing_keys
    except hub.OutOfReach:
        raise
    except Exception as error:  # a library's own words, nearly anything
        reason = " ".join(str(error).split())[:200]
        raise MsmdiffError(
            f"codec.vae {source} cannot be loaded as an AutoencoderKL: {reason}"
        ) from None
    if missing:
        raise MsmdiffError(
            f"codec.vae {source} lacks {len(missing)} of the network's tensors, such as "
            f"{missing[0]}"
        )
    return vae.eval().requires_grad_(False)
