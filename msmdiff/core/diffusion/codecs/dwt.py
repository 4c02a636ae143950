"""Wavelet bands, packed into channels."""

from collections.abc import Iterable
from typing import Any

import pywt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from msmdiff.core.diffusion.codecs import Codec, to_uint8, to_unit
from msmdiff.core.errors import UsageError, nearest
from msmdiff.core.registry import Options, register


class DwtOptions(Options):
    wavelet: str = Field(
        "haar", description="The wavelet: any orthogonal or biorthogonal filter of PyWavelets."
    )
    level: int = Field(1, ge=1, le=12, description="The number of decomposition levels.")
    mean: list[float] | None = Field(
        None, description="The mean of each sub-band; null measures it on the data."
    )
    std: list[float] | None = Field(
        None, description="The standard deviation of each sub-band; null measures it on the data."
    )


@register("codec", "dwt", DwtOptions)
class DwtCodec(Codec):
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

    measures = ("mean", "std")

    @classmethod
    def factor_of(cls, options: dict[str, Any]) -> int:
        return 2 ** options["level"]

    def __init__(
        self,
        image_size: int,
        *,
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
        self.wavelet, self.level, self.bands, self.factor = wavelet, level, bands, factor
        self.shape = (3 * factor**2, image_size // factor, image_size // factor)
        self._taps = {
            name: getattr(filters, name) for name in ("dec_lo", "dec_hi", "rec_lo", "rec_hi")
        }
        # On the CPU, also where networks are built on meta.
        probe = torch.eye(64, dtype=torch.float64, device="cpu")
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

    def encode(self, packed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        z = self.transform(to_unit(packed))
        self._to(z.device)
        return (z - self._mean) / self._std

    def decode(self, z: Tensor, rounding: str = "half_even") -> Tensor:
        return to_uint8(self.unrounded(z), rounding)

    def unrounded(self, z: Tensor) -> Tensor:
        z = z.float()
        self._to(z.device)
        return self.inverse(z * self._std + self._mean)

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

    def measure(self, batches: Iterable[Tensor]) -> dict[str, Any]:
        """Mean and standard deviation of each sub-band over uint8 batches [B, 3, H, W], in
        float64.
        """
        count = 0
        total = torch.zeros(self.bands, dtype=torch.float64)
        squares = torch.zeros(self.bands, dtype=torch.float64)
        for images in batches:
            z = self.transform(to_unit(images))
            count += len(z)
            for i, band in enumerate(z.double().split(self._widths, dim=1)):
                total[i] += band.mean((1, 2, 3)).sum()
                squares[i] += band.square().mean((1, 2, 3)).sum()
        mean = total / count
        # A band that never varies (a constant image set) would otherwise be divided by zero.
        std = (squares / count - mean.square()).clamp(min=1e-6).sqrt()
        return {"mean": mean.tolist(), "std": std.tolist()}

    def describe(self) -> str:
        return f"dwt {self.wavelet} level {self.level}"

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
