"""What a layer reads, sampled, and the least-squares fit of its weight to fewer input channels (arXiv:1707.06168, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.modes import eval_mode

_BATCH = 32


def sample_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, points: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return what layers read to make some of their outputs: in eval mode, at places drawn for each image.

    Args:
        model: it is left as it was.
        layers: convolutions and linear layers of it, by a name.
        images: [N, C, H, W].
        points: at most so many places of each image.
        generator: draws the places.

    Returns:
        By name, float64 [N * places, input channels, kernel elements] on the CPU; nothing for a layer that did not run.
    """
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for image in inputs[0].detach().split(1):
                patches = _patches(layer, image)
                chosen = torch.randperm(len(patches), generator=generator, device=generator.device)[:points]
                found.setdefault(name, []).append(patches[chosen.to(patches.device)].double().cpu())

        return keep

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with eval_mode(model), torch.no_grad():
            for batch in images.split(_BATCH):
                model(batch)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: torch.cat(patches) for name, patches in found.items()}


def _patches(layer: nn.Module, image: Tensor) -> Tensor:
    """Return what a layer reads of one image [1, ...] for each of its places: [places, channels, kernel elements]."""
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(image, layer._reversed_padding_repeated_twice, mode)  # what the layer itself pads by, "same" resolved
        columns = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)[0]
        return columns.view(image.shape[1], -1, columns.shape[-1]).permute(2, 0, 1)
    return image.reshape(-1, image.shape[-1], 1)


def refit(weight: Tensor, kept: Tensor, points: Tensor) -> Tensor:
    """Return the weight that makes a layer's outputs from some of its input channels as well as any can.

    The kept channels' weights are corrected by the least-squares fit of what the others contribute: the same solution as
    fitting the outputs anew, and where there are fewer points than unknowns, the one nearest to the present weights.

    Args:
        weight: [O, I, ...].
        kept: bool [I].
        points: float64 [points, I, kernel elements], what the layer reads.
    """
    old = weight.detach().double().cpu().flatten(2) if weight.dim() > 2 else weight.detach().double().cpu()[..., None]
    kept = kept.cpu()
    missing = points[:, ~kept].flatten(1) @ old[:, ~kept].flatten(1).T
    correction = torch.linalg.lstsq(points[:, kept].flatten(1), missing, driver="gelsd").solution
    new = torch.zeros_like(old)
    new[:, kept] = old[:, kept] + correction.T.reshape(len(old), -1, old.shape[2])
    return new.reshape(weight.shape).to(weight)
