"""How much memory a training process will take, from one step on tensors without numbers."""

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msmdiff.core import build as road
from msmdiff.core.backbones.routes import Route, checkpoint_blocks
from msmdiff.core.config import Config
from msmdiff.core.diffusion.alignment import Alignment
from msmdiff.core.seeding import stream
from msmdiff.core.training import launch, optim
from msmdiff.core.training.meter import resident_memory

# Measured on Linux CPUs (docs/benchmarks.md): what the allocator cannot use again, as a share of
# the tensors of a step, and what the kernels' libraries take when they are first called.
_FRAGMENTS = 0.25
_LIBRARIES = 32 * 2**20


@dataclass
class Memory:
    """Bytes that a training process takes at its peak.

    Attributes:
        weights, gradients, optimiser, averages: of the network's numbers.
        buckets: copies of the gradients that several processes exchange.
        activations: what the passes of a step hold at the worst moment, temporary tensors and the
            weights' copies in half the width included.
        allocator: freed pieces that fit nothing else, and libraries; only known of CPUs.
        process: the interpreter and its imports; on a GPU 0, since that is not the device's.
    """

    weights: int
    gradients: int
    optimiser: int
    averages: int
    buckets: int
    activations: int
    allocator: int
    process: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def estimate(
    config: Config, processes: int = 1, sharded: bool = False, device: str | None = None
) -> Memory:
    """What each of `processes` takes to train a resolved configuration; nothing is allocated.

    Args:
        sharded: weights, gradients, optimiser state and averages are divided among the processes.
        device: `cpu` or `cuda`; None is what this machine trains on.

    Raises UsageError where the batch does not divide among the processes.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    micro, _ = launch.shares(config.train, processes)
    with torch.device("meta"):
        parts = road.build(config)
        aligned = parts.alignment(config)
    projector = [] if aligned is None else list(aligned.parameters())
    parameters = optim.Parameters.of(parts.backbone, projector)
    beside = sum(p.numel() for p in projector)
    followed = sum(p.nbytes for network in _frozen(aligned) for p in network.parameters())
    own = 4 * sum(p.numel() for p in parts.backbone.parameters())
    trained = sum(p.numel() for p in parameters)
    activations = _activations(config, parts, aligned, micro, device)
    states = {
        "weights": own + 4 * beside + followed,
        "gradients": 4 * trained,
        "optimiser": 4 * optim.state_size(config.optim, parameters),
        "averages": own * _averages(config),
    }
    if sharded:
        states = {name: size // processes for name, size in states.items()}
    on_cpu = device == "cpu"
    return Memory(
        **states,
        buckets=4 * trained if processes > 1 and not sharded else 0,
        activations=activations,
        allocator=round(_LIBRARIES + _FRAGMENTS * activations) if on_cpu else 0,
        process=resident_memory() if on_cpu else 0,
    )


def _averages(config: Config) -> int:
    """Copies of the network that averages are kept in."""
    ema = config.ema
    return len(ema.decays) + (len(ema.widths) if ema.snapshots_every else 0)


def _frozen(aligned: Alignment | None) -> list[torch.nn.Module]:
    """Other networks that an alignment follows, on the meta device."""
    found = None if aligned is None else aligned.rehearsal()
    return [] if found is None else [found]


def _activations(
    config: Config, parts: road.Parts, aligned: Alignment | None, micro: int, device: str
) -> int:
    """Bytes that the passes over one micro-batch hold at their peak, beside weights and
    gradients.
    """
    batch = micro * parts.objective.copies
    network = parts.backbone
    checkpoint_blocks(network, int(config.train.gradient_checkpointing))
    half = config.train.precision in ("bf16", "fp16")
    # A GPU's fused attention keeps no scores, nor does the CPU's in fp16; in bf16 a CPU multiplies.
    followed = _frozen(aligned)  # not with fake tensors: making a network may read numbers
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = network.to_empty(device="cpu")
        x, t = torch.empty(batch, *parts.codec.shape), torch.empty(batch)
        y = parts.objective.condition.example(batch, "cpu")
        ways = routes(parts, batch, "cpu")
        projector = None if aligned is None else aligned.projector
        trained = [network] if projector is None else [network, projector.to_empty(device="cpu")]
        frozen = [each.to_empty(device="cpu") for each in followed]
        alive = _Alive(torch.nn.ModuleList([*trained, *frozen]))
        watched: Any = nullcontext({}) if aligned is None else aligned.watching()
        with alive, watched as hidden:
            loss = torch.zeros(())
            with torch.autocast("cpu", dtype=dtype, enabled=half):
                for route in ways:
                    loss = loss + network(x, t, y, route).float().square().mean()
                for other in frozen:
                    other(x)
                if aligned is not None and projector is not None:
                    told = aligned.projected(hidden[aligned.student]).tokens
                    loss = loss + told.float().square().mean()
            loss.backward()
    return alive.peak


def routes(parts: road.Parts, batch: int, device: str) -> list[Route | None]:
    """The route of each pass of a step over `batch` images, as many tokens kept as the mask keeps;
    their ids are no numbers.
    """

    def draw(purpose: str, device: Any = "cpu") -> torch.Generator:
        return stream("cpu", 0, purpose)

    found: list[Route | None] = []
    for route_of in parts.objective.passes.values():
        # On real tensors: some routes read numbers.
        with torch.device("cpu"), unset_fake_temporarily():
            route = route_of(parts.objective.copies, draw)
        if route is not None and route.keep is not None:
            keep = torch.zeros(batch, parts.mask.kept, dtype=torch.long, device=device)
            found.append(replace(route, keep=keep, dropped=False))
        else:
            # EDT's network draws masks of its own for every image; a plain pass holds as much.
            found.append(None)
    return found


class _Alive(TorchDispatchMode):
    """Follows what operations make, and how many bytes of it are alive.

    Args:
        network: its numbers and their gradients do not count.

    Attributes:
        peak: the most bytes at any time.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in (*network.parameters(), *network.buffers()):
            self._sizes[tensor.untyped_storage()._cdata] = 0  # views of it make nothing
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._forget_gradient)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._hold(leaf.untyped_storage())
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        # The address of the storage's C++ object: views share it, and it is unique while alive.
        place = storage._cdata
        if place in self._sizes:
            return
        self._sizes[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, place)

    def _drop(self, place: int) -> None:
        self.now -= self._sizes.pop(place, 0)

    def _forget_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._drop(parameter.grad.untyped_storage()._cdata)
