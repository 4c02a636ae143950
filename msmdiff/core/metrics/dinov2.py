"""DINOv2's features."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msmdiff.core import hub, tensor_files
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.metrics.features import Features, clean, one_line
from msmdiff.core.registry import register

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
DINOV2_FILES = (
    "give dinov2_vitl14_pretrain.pth or timm's file with --weights (beside Inception: "
    "--dinov2-weights)"
)


@register("features", "dinov2")
class DinoFeatures(Features):
    """DINOv2's class token after the last norm, of images brought to 224 by the clean rule (Stein
    et al. 2023).

    Args:
        weights: the published file, or timm's; None takes timm's from the hub or its cache.
        model: timm's name; published distances are of ViT-L/14.

    Raises MsmdiffError when no weights can be had, or they are another network's.
    """

    prefix = DINOV2.partition(".")[0]
    resize, metric, suffix = "clean", "fd_dinov2", " over DINOv2"

    def __init__(
        self,
        weights: Path | None = None,
        device: torch.device | str = "cpu",
        *,
        spatial: bool = False,
        model: str = DINOV2,
    ) -> None:
        import timm

        try:
            if weights is None:
                with hub.loading(model, "DINOv2's weights", DINOV2_FILES):
                    made = timm.create_model(model, pretrained=True, num_classes=0)
                state = made.state_dict()
            else:
                state = tensor_files.read(weights)
            state.pop("mask_token", None)
            state["pos_embed"] = _positions(state["pos_embed"], 16)
            network: Any = timm.create_model(model, num_classes=0, img_size=224)
            network.load_state_dict(state)
        except hub.OutOfReach:
            raise
        except (
            Exception
        ) as error:  # the hub's client, damaged pickles and other networks raise nearly anything
            given = (
                f"{weights} cannot be used"
                if weights
                else "DINOv2's weights are neither cached nor to be had"
            )
            raise MsmdiffError(f"{given} as {model} ({one_line(error)}): {DINOV2_FILES}") from None
        digest = hashlib.sha256()
        for key in sorted(state):
            digest.update(state[key].float().numpy().tobytes())
        self.name, self.width = (
            f"{model.partition('.')[0]}/{digest.hexdigest()[:8]}",
            network.num_features,
        )
        self.title = "FD-DINOv2" if model == DINOV2 else f"Fréchet distance over {model}"
        self.device, self._network = torch.device(device), network.to(device).eval()
        self._mean, self._deviation = torch.tensor(
            [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device
        ).view(2, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        x = (clean(images.to(self.device), 224) / 255 - self._mean) / self._deviation
        return self._network.forward_features(x)[:, 0].float(), None

    @classmethod
    def titles(cls, name: str) -> tuple[str, str]:
        model = name.rpartition("/")[0]
        return (
            "FD-DINOv2" if model == cls.prefix else f"Fréchet distance over {model}"
        ), cls.suffix


def _positions(table: Tensor, side: int) -> Tensor:
    """DINOv2's own change of its position table [1, 1 + M^2, D] to another side: bicubic, with its
    offset of 0.1.
    """
    old = round((table.shape[1] - 1) ** 0.5)
    image = table[:, 1:].float().unflatten(1, (old, old)).movedim(3, 1)
    image = F.interpolate(image, scale_factor=((side + 0.1) / old,) * 2, mode="bicubic")
    return torch.cat([table[:, :1], image.flatten(2).mT], 1)
