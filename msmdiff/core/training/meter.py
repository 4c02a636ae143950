"""What a training run logs: losses, speed, waiting, memory."""

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msmdiff.core import systems
from msmdiff.core.training.cost import Cost


class Meter:
    """Collects between two reports. Losses stay on the device until they are read.

    Args:
        cost: of one image, for FLOP/s.
        device: whose memory is reported.
        mean: of a tensor over all processes, each of which reads at the same steps.
    """

    def __init__(
        self, cost: Cost, device: torch.device, mean: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        self.cost, self.device, self._mean = cost, device, mean
        self._reset()

    def _reset(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._grad_norm: float | Tensor = 0.0
        self._waited = self._spent = 0.0

    def add(
        self,
        terms: dict[str, Tensor],
        grad_norm: float | Tensor,
        images: int,
        seconds: float,
        waited: float,
    ) -> None:
        """Take in one optimiser step: its mean loss terms, images, and time, of which `waited` for
        data.
        """
        for name, value in terms.items():
            self._terms[name] = self._terms[name] + value if name in self._terms else value
        self._grad_norm = self._grad_norm + grad_norm
        self._steps, self._images = self._steps + 1, self._images + images
        self._spent, self._waited = self._spent + seconds, self._waited + waited

    def read(self) -> dict[str, Any]:
        """Averages since the last reading; starts anew. Empty when nothing happened."""
        if not self._steps:
            return {}
        if self.device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize()  # what is still queued belongs to these steps
            self._spent += time.perf_counter() - started
        images_per_s = self._images / self._spent
        terms = self._mean(torch.stack(list(self._terms.values())) / self._steps).tolist()
        metrics = dict(zip(self._terms, terms, strict=True)) | {
            "grad_norm": float(self._grad_norm) / self._steps,
            "images_per_s": images_per_s,
            "ms_per_step": 1000 * self._spent / self._steps,
            "data_wait": self._waited / self._spent,
            "flops_per_s": images_per_s * self.cost.step_flops,
            "peak_memory_bytes": peak_memory(self.device),
        }
        self._reset()
        return metrics


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak allocation on CUDA, else the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage where it can be helped: a process that a larger one started inherits its peak.
    return _of_process("VmHWM") or systems.largest_resident()


def resident_memory() -> int:
    """Bytes of this process in memory now; its peak where the system does not tell."""
    return _of_process("VmRSS") or systems.largest_resident()


def _of_process(name: str) -> int:
    """A size in Linux's /proc/self/status, in bytes; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else 0


def forget_peak(device: torch.device) -> None:
    """Start `peak_memory` anew, where the system can, after giving freed memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent outside glibc
    if trim is not None:
        trim(0)
    # Linux only; without it, what ran before in this process counts too.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
