"""The spaces diffusion runs in: codecs map uint8 images to about unit-scale tensors, and back.

The road of an image: `pack` once, offline; `encode` every step, on the device; `decode` after
    sampling.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import pywt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from msmdiff.core.config import CodecConfig
from msmdiff.core.errors import MsmdiffError, UsageError, nearest


class Codec(Protocol):
    shape: tuple[int, int, int]
    """(C, H, W) that the backbone sees."""

    def pack(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> what a data set stores."""

    def encode(self, packed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What is stored -> x0 float32 [B, *shape], about unit scale."""

    def decode(self, z: Tensor, rounding: str = "half_even") -> Tensor:
        """z [B, *shape] -> uint8 images [B, 3, H, W]."""

    def clip(self, x0: Tensor) -> Tensor:
        """Bring x0 [B, *shape] into the range that images can have; used at every sampling step."""


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(x: Tensor, rounding: str = "half_even") -> Tensor:
    """-1..1 -> uint8 0..255, clamped; `half_even`, `half_up` (DiT, U-ViT, MaskDM) or `truncate`
    (MDT).
    """
    x = x.float().add(1).mul(127.5)
    if rounding != "truncate":
        x = x.round() if rounding == "half_even" else x.add(0.5).floor()
    return x.clamp(0, 255).to(torch.uint8)


class PixelCodec:
    """Pixels in -1..1."""

    def __init__(self, image_size: int) -> None:
        self.shape = (3, image_size, image_size)

    def pack(self, images: Tensor) -> Tensor:
        return images

    def encode(self, packed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return to_unit(packed)

    def decode(self, z: Tensor, rounding: str = "half_even") -> Tensor:
        return to_uint8(z, rounding)

    def clip(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1)


class DwtCodec:
    """Wavelet bands packed into channels: level 1 takes 3xHxW to 12xH/2xW/2, level 2 to 48xH/4xW/4.

    The transform is PyWavelets' `wavedec2(mode="periodization")`. Channels run [LL, then LH, HL, HH
    of the coarsest level, ..., of the finest] (PyWavelets' cA, cH, cV, cD), each with its three
    colours; a finer band is folded to the coarsest grid by taking its 2x2 (4x4, ...) neighbours as
    channels. Each sub-band is shifted and scaled to about zero mean and unit variance by `mean` and
    `std`, in that order of bands.

    Args:
        image_size: side of the images in pixels; must divide by 2**level.
        wavelet: an orthogonal or biorthogonal PyWavelets filter.
        mean, std: one number per sub-band (1 + 3 level of them); None leaves coefficients as they
            are.

    Raises UsageError for an unknown wavelet, one whose finite filters do not invert (dmey), an
    indivisible size or a wrong number of statistics.
    """

    def __init__(
        self,
        image_size: int,
        wavelet: str = "haar",
        level: int = 1,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        if wavelet not in pywt.wavelist(kind="discrete"):
            near = nearest(wavelet, pywt.wavelist(kind="discrete"))
            raise UsageError(f"codec.wavelet '{wavelet}' is not a discrete PyWavelets filter{near}")
        filters = pywt.Wavelet(wavelet)
        if not (filters.orthogonal or filters.biorthogonal):
            raise UsageError(f"codec.wavelet '{wavelet}' is neither orthogonal nor biorthogonal")
        factor = 2**level
        if image_size % factor:
            raise UsageError(
                f"data.image_size {image_size} does not divide by {factor} (codec.level {level})"
            )
        bands = 1 + 3 * level
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != bands:
                raise UsageError(
                    f"codec.{name} has {len(values)} numbers; level {level} has {bands} sub-bands"
                )
        if std is not None and min(std) <= 0:
            raise UsageError(
                f"codec.std has {min(std)}; every sub-band's deviation must be positive"
            )
        self.level, self.bands = level, bands
        self.shape = (3 * factor**2, image_size // factor, image_size // factor)
        self._taps = {
            name: getattr(filters, name) for name in ("dec_lo", "dec_hi", "rec_lo", "rec_hi")
        }
        probe = torch.eye(
            64, dtype=torch.float64, device="cpu"
        )  # also where networks are built on meta
        if (self._synthesise(*self._analyse(probe, -1), -1) - probe).abs().max() > 1e-6:
            raise UsageError(
                f"codec.wavelet '{wavelet}' does not invert exactly (its filters are "
                "truncated); use another"
            )
        # Channels of each band after folding: a band of level l has (2^(level-l))^2 neighbours per
        # colour.
        self._widths = [3] + [3 * 4 ** (level - l) for l in range(level, 0, -1) for _ in range(3)]
        self._mean = self._per_channel(mean or [0.0] * bands)
        self._std = self._per_channel(std or [1.0] * bands)
        self._bound = self._per_channel(self._largest_coefficients())

    def pack(self, images: Tensor) -> Tensor:
        return images

    def encode(self, packed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        z = self.transform(to_unit(packed))
        self._to(z.device)
        return (z - self._mean) / self._std

    def decode(self, z: Tensor, rounding: str = "half_even") -> Tensor:
        z = z.float()
        self._to(z.device)
        return to_uint8(self.inverse(z * self._std + self._mean), rounding)

    def clip(self, x0: Tensor) -> Tensor:
        self._to(x0.device)
        high, low = (self._bound - self._mean) / self._std, (-self._bound - self._mean) / self._std
        return torch.maximum(torch.minimum(x0, high), low)

    def transform(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> unscaled coefficients [B, *shape]."""
        bands: list[Tensor] = []
        for level in range(1, self.level + 1):
            low, high = self._analyse(x, -2)
            x, cv = self._analyse(low, -1)
            ch, cd = self._analyse(high, -1)
            bands = [
                F.pixel_unshuffle(band, 2 ** (self.level - level)) for band in (ch, cv, cd)
            ] + bands
        return torch.cat([x, *bands], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        """Unscaled coefficients [B, *shape] -> images [B, 3, H, W]: the exact inverse of
        `transform`.
        """
        x, *bands = z.split(self._widths, dim=1)
        for level in range(self.level, 0, -1):
            ch, cv, cd = (F.pixel_shuffle(band, 2 ** (self.level - level)) for band in bands[:3])
            bands = bands[3:]
            x = self._synthesise(self._synthesise(x, cv, -1), self._synthesise(ch, cd, -1), -2)
        return x

    def measure(self, batches: Iterable[Tensor]) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each sub-band over uint8 batches [B, 3, H, W], in float64."""
        count = 0
        total, squares = (
            torch.zeros(self.bands, dtype=torch.float64),
            torch.zeros(self.bands, dtype=torch.float64),
        )
        for images in batches:
            z = self.transform(to_unit(images))
            count += len(z)
            for i, band in enumerate(z.double().split(self._widths, dim=1)):
                total[i] += band.mean((1, 2, 3)).sum()
                squares[i] += band.square().mean((1, 2, 3)).sum()
        mean = total / count
        # A band that never varies (a constant image set) would otherwise be divided by zero.
        std = (squares / count - mean.square()).clamp(min=1e-6).sqrt()
        return mean.tolist(), std.tolist()

    def _to(self, device: torch.device) -> None:
        if self._mean.device != device:  # once: a copy in every step would wait for the device
            self._mean, self._std, self._bound = (
                v.to(device) for v in (self._mean, self._std, self._bound)
            )

    # One filter bank along one dimension, as PyWavelets' periodization mode defines it:
    # low[i] = sum_k dec_lo[k] x[(2i + F/2 - k) mod N]. Written as F shifted gathers: exact in
    # float32 on any device, where a convolution or a matrix product may run in TF32.

    def _analyse(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        n, taps = x.shape[dim], len(self._taps["dec_lo"])
        start = torch.arange(0, n, 2, device=x.device) + taps // 2
        low = high = x.new_zeros(())
        for k in range(taps):
            shifted = x.index_select(dim, (start - k) % n)
            low = low + self._taps["dec_lo"][k] * shifted
            high = high + self._taps["dec_hi"][k] * shifted
        return low, high

    def _synthesise(self, low: Tensor, high: Tensor, dim: int) -> Tensor:
        n, taps = 2 * low.shape[dim], len(self._taps["rec_lo"])
        phases = []
        for parity in (0, 1):
            x = low.new_zeros(())
            for k in range((parity + taps // 2) % 2, taps, 2):
                index = (
                    (torch.arange(parity, n, 2, device=low.device) - taps // 2 + k) // 2 % (n // 2)
                )
                x = x + self._taps["rec_lo"][taps - 1 - k] * low.index_select(dim, index)
                x = x + self._taps["rec_hi"][taps - 1 - k] * high.index_select(dim, index)
            phases.append(x)
        return torch.stack(phases, dim=dim if dim >= 0 else low.ndim + dim + 1).flatten(
            dim - 1, dim
        )

    def _per_channel(self, values: list[float]) -> Tensor:
        widths = torch.tensor(self._widths, device="cpu")
        return torch.tensor(values, device="cpu").repeat_interleave(widths).view(-1, 1, 1)

    def _largest_coefficients(self) -> list[float]:
        """What an image in -1..1 can reach in each band: products of the filters' absolute sums."""
        low, high = (sum(abs(v) for v in self._taps[name]) for name in ("dec_lo", "dec_hi"))
        bounds = [low ** (2 * self.level)]
        for level in range(self.level, 0, -1):
            mixed = low ** (2 * level - 1) * high
            bounds += [mixed, mixed, (low ** (level - 1) * high) ** 2]
        return bounds


class VaeCodec:
    """Latents of a diffusers AutoencoderKL, brought to about unit scale: x0 = scale (latent - mean)
    / std.

    The network is loaded when it is first used, so that a denoiser's shape is known without it.

    Args:
        image_size: side of the images in pixels; must divide by `config.factor`.
        config: `vae` and `vae_config` say where the network is, `mean` and `std` are one number per
            channel.

    Raises UsageError for an indivisible size or a wrong number of statistics, and, on use,
    MsmdiffError when the network cannot be had or is not of these channels and this factor.
    """

    def __init__(self, image_size: int, config: CodecConfig) -> None:
        if image_size % config.factor:
            raise UsageError(
                f"data.image_size {image_size} does not divide by {config.factor}, the VAE's factor"
            )
        for name, values in (("mean", config.mean), ("std", config.std)):
            if values is not None and len(values) != config.channels:
                raise UsageError(
                    f"codec.{name} has {len(values)} numbers; the latents have "
                    f"{config.channels} channels"
                )
        if config.std is not None and min(config.std) <= 0:
            raise UsageError(
                f"codec.std has {min(config.std)}; every channel's deviation must be positive"
            )
        self.shape = (config.channels, image_size // config.factor, image_size // config.factor)
        self.config = config
        self._mean = torch.tensor(config.mean or [0.0], device="cpu").view(-1, 1, 1)
        self._factor = config.scale / torch.tensor(config.std or [1.0], device="cpu").view(-1, 1, 1)
        self._vae: Any = None

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
        mean, std = packed.float().chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        self._to(mean.device)
        return self._factor * (mean + std * noise - self._mean)

    def decode(self, z: Tensor, rounding: str = "half_even") -> Tensor:
        vae = self._network(z.device)
        with torch.no_grad():
            return to_uint8(
                vae.decode((z.float() / self._factor + self._mean).to(vae.dtype)).sample, rounding
            )

    def clip(self, x0: Tensor) -> Tensor:
        return x0

    def identity(self) -> dict[str, Any]:
        """What made a packed set: settings, and the checksum of the network's numbers."""
        self._network(torch.device("cpu"))
        settings = {key: getattr(self.config, key) for key in ("name", "vae", "precision", "tile")}
        return {**settings, "sha256": self._checksum}

    def _to(self, device: torch.device) -> None:
        if self._mean.device != device:
            self._mean, self._factor = self._mean.to(device), self._factor.to(device)

    def _network(self, device: torch.device) -> Any:
        if self._vae is None:
            vae, config = _load_vae(self.config), self.config
            self._checksum = checksum(vae.state_dict())
            found = (vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1))
            if found != (config.channels, config.factor):
                raise UsageError(
                    f"codec.vae {config.vae} makes {found[0]} channels at a factor of {found[1]}: "
                    "set codec.channels="
                    f"{found[0]} and codec.factor={found[1]}, not {config.channels} and "
                    f"{config.factor}"
                )
            if config.tile:
                vae.enable_tiling()
            self._vae = vae.bfloat16() if config.precision == "bf16" else vae
        self._to(device)
        return self._vae.to(device)


def checksum(tensors: dict[str, Tensor]) -> str:
    """sha256 over a network's tensors by name, whatever kind of file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


STABLE_DIFFUSION_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=512,
)


def _load_vae(config: CodecConfig) -> Any:
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
        raise MsmdiffError("latents need diffusers: pip install 'msmdiff[vae]'") from None
    try:
        if not Path(source).is_file():
            vae, loading = AutoencoderKL.from_pretrained(source, output_loading_info=True)
            missing = loading[
                "missing_keys"
            ]  # diffusers only warns, and goes on with random numbers
        else:
            settings = (
                AutoencoderKL.load_config(config.vae_config)
                if config.vae_config
                else STABLE_DIFFUSION_VAE
            )
            vae = AutoencoderKL.from_config(settings)
            if source.endswith(".safetensors"):
                tensors = load_file(source)
            else:
                tensors = torch.load(source, map_location="cpu", weights_only=True)
                tensors = tensors.get("state_dict", tensors)
            if any(
                "mid.block_1." in name for name in tensors
            ):  # the layout of Stable Diffusion's own code
                tensors = convert_ldm_vae_checkpoint(tensors, settings)
            missing = vae.load_state_dict(tensors, strict=False).missing_keys
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        AttributeError,
        SafetensorError,
        UnpicklingError,
    ) as error:
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


KEYS = {
    "pixel": set[str](),
    "dwt": {"wavelet", "level", "mean", "std"},
    "vae": {"vae", "vae_config", "scale", "mean", "std", "channels", "factor", "precision", "tile"},
}
"""The keys of the `codec` section that each codec takes, beside `name` and `text`."""


def check(config: CodecConfig, given: Iterable[str]) -> None:
    """Raises UsageError for one of the `given` keys that has no effect on the codec."""
    for key in set(given) - KEYS[config.name] - {"name", "text"}:
        takers = " and ".join(name for name, keys in KEYS.items() if key in keys)
        value = getattr(config, key)
        raise UsageError(
            f"codec.{key} {value} has no effect on the codec {config.name}, only on {takers}"
        )


def build(config: CodecConfig, image_size: int) -> Codec:
    """The codec a configuration asks for, for square images of `image_size` pixels."""
    if config.name == "dwt":
        return DwtCodec(image_size, config.wavelet, config.level, config.mean, config.std)
    if config.name == "vae":
        return VaeCodec(image_size, config)
    return PixelCodec(image_size)
