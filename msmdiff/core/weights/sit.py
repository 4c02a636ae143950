"""The layout of SiT's checkpoints (willisma/SiT): DiT's network with DiT's keys, trained to predict
the velocity on a straight path.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msmdiff.core.diffusion.flow import Flow, VelocityToImage
from msmdiff.core.diffusion.process import Process
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import register
from msmdiff.core.samplers.papers import SAMPLINGS
from msmdiff.core.weights import dit
from msmdiff.core.weights.layout import Network, Tensors, latent_sections, no_label_dropout

HOLDS = frozenset({"dit"})
NAME = re.compile(r"(?<![a-z])sit(?![a-z])", re.IGNORECASE)
PROCESS = {"schedule": "flow", "prediction": "velocity_to_image"}
ENDS = ("final.linear.weight", "final.linear.bias")

matches = dit.matches


def claims(file_name: str, told: Mapping[str, Any]) -> bool:
    """DiT's training has no path; where the arguments do not tell, the name of the file does."""
    return "path_type" in told or bool(NAME.search(f"{file_name} {told.get('model', '')}"))


def admit(told: Mapping[str, Any]) -> None:
    for name, wanted in (("path_type", "Linear"), ("prediction", "velocity")):
        if told.get(name, wanted) != wanted:
            raise UsageError(f"SiT with {name} {told[name]} is not read, only with {wanted}")


def describe(tensors: Tensors, given: Mapping[str, Any]) -> Network:
    network = dit.describe(tensors, given)
    return Network(
        "dit", network.shape, network.num_classes, network.fields | {"learn_sigma": False}
    )


def to_ours(tensors: Tensors, network: Network) -> Tensors:
    """SiT computes as many channels again as DiT's variance has, and throws them away."""
    ours = dit.to_ours(tensors, network)
    channels, patches = network.shape[0], network.fields["patch_size"] ** 2
    return ours | {
        name: ours[name].unflatten(0, (patches, -1))[:, :channels].flatten(0, 1) for name in ENDS
    }


def to_published(tensors: Tensors, network: Network) -> Tensors:
    """The channels that are thrown away are zeros."""
    channels, patches = network.shape[0], network.fields["patch_size"] ** 2

    def doubled(tensor: Tensor) -> Tensor:
        used = tensor.unflatten(0, (patches, channels))
        return torch.cat([used, torch.zeros_like(used)], dim=1).flatten(0, 1)

    ends = {name: doubled(tensors[name]) for name in ENDS}
    return dit.to_published(tensors | ends, network)


def sections(network: Network, buffers: Tensors) -> dict[str, Any]:
    """The straight path; sampled with 250 steps of the SDE and strength 1.5, as for the published
    FID.
    """
    guided = network.num_classes and network.fields.get("null_class", True)
    common = latent_sections(network.shape) | no_label_dropout(network)
    scale = {} if guided else {"cfg_scale": 1.0}
    return common | {"process": dict(PROCESS), "sample": SAMPLINGS["sit"] | scale}


def file_content(state: Tensors, process: Process) -> Tensors:
    """The state dict alone. Raises UsageError for a network that predicts anything else."""
    if not isinstance(process.prediction, VelocityToImage) or not isinstance(
        process.schedule, Flow
    ):
        raise UsageError(
            "--format sit holds networks with process.schedule flow and process.prediction "
            "velocity_to_image only"
        )
    return state


register("layout", "sit")(sys.modules[__name__])
