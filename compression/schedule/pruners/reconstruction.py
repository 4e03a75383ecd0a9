"""Samples of a layer's inputs, and the least-squares fit of its weight to fewer input channels (arXiv:1707.06168, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.modes import observed

_BATCH = 32


def sample_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, points: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Sample the input patches of layers in eval mode, at positions drawn for each image.

    Args:
        model: left unchanged.
        layers: some of its convolutions and linear layers, by name.
        images: [N, C, H, W].
        points: the largest number of positions per image.
        generator: draws the positions.

    Returns:
        By name, float64 [N * positions, input channels, kernel elements] on the CPU; nothing for a layer that did not run.
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
    with observed(model, hooks):
        for batch in images.split(_BATCH):
            model(batch)
    return {name: torch.cat(patches) for name, patches in found.items()}


def _patches(layer: nn.Module, image: Tensor) -> Tensor:
    """Return the input patches of one image [1, ...]: [positions, channels, kernel elements]."""
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(image, layer._reversed_padding_repeated_twice, mode)  # the layer's own padding, with "same" resolved
        columns = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)[0]
        return columns.view(image.shape[1], -1, columns.shape[-1]).permute(2, 0, 1)
    return image.reshape(-1, image.shape[-1], 1)


def refit(weight: Tensor, kept: Tensor, points: Tensor) -> Tensor:
    """Return the weight that best reproduces a layer's outputs from some of its input channels.

    The weights of the kept channels are corrected by the least-squares fit of the other channels' contribution. This is the
    same solution as fitting the outputs anew; with fewer points than unknowns, it is the one nearest to the present weights.

    Args:
        weight: [O, I, ...].
        kept: bool [I].
        points: float64 [points, I, kernel elements], the layer's inputs.
    """
    old = weight.detach().double().cpu().flatten(2) if weight.dim() > 2 else weight.detach().double().cpu()[..., None]
    kept = kept.cpu()
    missing = points[:, ~kept].flatten(1) @ old[:, ~kept].flatten(1).T
    correction = torch.linalg.lstsq(points[:, kept].flatten(1), missing, driver="gelsd").solution
    new = torch.zeros_like(old)
    new[:, kept] = old[:, kept] + correction.T.reshape(len(old), -1, old.shape[2])
    return new.reshape(weight.shape).to(weight)
