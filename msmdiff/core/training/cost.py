"""What a configuration costs, counted on the meta device before anything is allocated."""

from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from msmdiff.core import build as road
from msmdiff.core.config import Config


@dataclass
class Cost:
    """Counts for one configuration.

    Attributes:
        parameters: numbers in the network.
        forward_flops: floating-point operations of one image's forward pass with every token (a
            multiply-add is two).
        masked_flops: the same with the mask.
        activation_bytes: kept for the backward pass of one image in float32, with the mask.
        tokens, kept: tokens of an image, and those that the mask keeps.
        two_passes: a training step runs the network twice, without and with the mask.
    """

    parameters: int
    forward_flops: int
    masked_flops: int
    activation_bytes: int
    tokens: int
    kept: int
    two_passes: bool = False

    @property
    def step_flops(self) -> int:
        """Per image of a training step: the backward pass costs two forward passes."""
        return 3 * (self.masked_flops + self.two_passes * self.forward_flops)

    def memory_bytes(self, config: Config, processes: int = 1, sharded: bool = False) -> int:
        """A training process's estimated memory: weights, gradients, optimiser state, averages,
        activations.

        All but the activations are divided among the processes where `sharded`.
        """
        states = {"adamw": 2, "adan": 4, "adan-pytorch": 4}[config.optim.name]
        copies = 2 + states + len(config.ema.decays)
        micro = config.train.micro_batch_size or config.train.batch_size // processes
        # Autocast keeps most activations in half the width; checkpointing keeps about one tensor
        # per block.
        share = 0.5 if config.train.precision in ("bf16", "fp16") else 1.0
        share *= 0.1 if config.train.gradient_checkpointing else 1.0
        each = 4 * self.parameters * copies / (processes if sharded else 1)
        return int(each + share * micro * self.activation_bytes)


def measure(config: Config) -> Cost:
    """Count one image's forward pass through a resolved configuration, with and without its mask."""
    with torch.device("meta"):
        parts = road.build(config)
        network = parts.backbone
        x, t = torch.empty(1, *parts.codec.shape), torch.empty(1)
        context = road.context_shape(config)
        y = (
            torch.empty(1, *context)
            if context
            else torch.zeros(1, dtype=torch.long)
            if network.num_classes
            else None
        )
        keep = (
            torch.empty(1, parts.mask.kept, dtype=torch.long)
            if parts.mask.kept < parts.mask.tokens
            else None
        )
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
            return tensor

        with FlopCounterMode(display=False) as full, torch.no_grad():
            network(x, t, y)
        with FlopCounterMode(display=False) as masked, torch.no_grad():
            network(x, t, y, keep)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            network(x, t, y, keep)
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        forward_flops=full.get_total_flops(),
        masked_flops=masked.get_total_flops(),
        activation_bytes=sum(saved.values()),
        tokens=parts.mask.tokens,
        kept=parts.mask.kept,
        two_passes=len(parts.objective.passes) > 1,
    )
