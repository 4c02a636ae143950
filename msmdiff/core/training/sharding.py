"""Sharded training: Accelerate's FSDP 2 splits weights and optimiser state over processes,
checkpoints stay whole.
"""

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from msmdiff.core.backbones.routes import BLOCK
from msmdiff.core.errors import UsageError

_WANTED = {
    "fsdp_version": ("1", "2", ""),
    "fsdp_offload_params": ("false", "false", ", and use more processes"),
    "fsdp_activation_checkpointing": ("false", "false", " and train.gradient_checkpointing=true"),
}
"""Accelerate's settings that matter here: their defaults, the only values that work, and what to do
besides.
"""


def asked() -> bool:
    """Whether Accelerate's launcher asks for shards."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def plugin(precision: Any) -> Any:
    """How Accelerate is to shard, if that is asked for. Raises UsageError for what does not work
    here.
    """
    if not asked():
        return None
    for option, (default, wanted, besides) in _WANTED.items():
        if (found := os.environ.get(option.upper(), default).lower()) != wanted:
            raise UsageError(f"{option} {found} is not supported: set {option}: {wanted}{besides}")
    if precision == "fp16":
        raise UsageError(
            "train.precision fp16 is not supported with sharding (FSDP): use bf16 or fp32"
        )
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[BLOCK],
        # Precision is autocast's as everywhere else: parameters, gradients and their sums stay
        # fp32.
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,  # every process starts from the same weights already
    )


def prepare(
    accelerator: Any,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Iterable[nn.Module],
) -> tuple[Any, Any]:
    """Accelerate's model and optimiser; where it shards, the averages (copies of the network) are
    sharded alike.
    """
    if accelerator.is_fsdp2:
        from accelerate.utils import convert_outputs_to_fp32, fsdp2_prepare_model

        # Accelerate wraps a network's forward pass like this for every way of training but this
        # one.
        network.forward = convert_outputs_to_fp32(accelerator.autocast()(network.forward))
        for average in averages:
            fsdp2_prepare_model(accelerator, average)
    return accelerator.prepare(network, optimizer)


def gathered(tree: Any, wanted: bool = True) -> Any:
    """Nested dicts and tuples with shards put together on the CPU (None unless `wanted`); every
    process must call it.
    """

    def gather(shard: Any) -> Tensor | None:
        full = shard.full_tensor()
        return full.cpu() if wanted else None

    return tree_map_only(_shard_type(), gather, tree)


def load(network: nn.Module, full: dict[str, Tensor]) -> None:
    """Load whole tensors into a network, sharded or not."""
    own = network.state_dict()
    network.load_state_dict({name: _share(value, own.get(name)) for name, value in full.items()})


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load an optimiser's whole state, of which torch would give every process all."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    shares = {
        i: {name: _share(v, own[i]) for name, v in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shares})


def _share(full: Tensor, own: Any) -> Tensor:
    if own is None or not isinstance(own, _shard_type()) or full.shape != own.shape:
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, own.device_mesh, own.placements, src_data_rank=None)


def _shard_type() -> Any:
    """DTensor, or nothing where nobody has imported it: that takes a second, and nothing is sharded
    then.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module.DTensor if module else ()
