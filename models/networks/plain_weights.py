"""Networks whose weights are computed from others, given the weights that come out.

A norm of a weight (weight_norm, spectral_norm, weight standardisation: arXiv:1602.07868, 1802.05957, 1903.10520) runs over channels
that a cut removes, so only the weight that it makes can be cut.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-5  # of the outputs' largest value
SIDE = 16  # of the noise that a convolution is tried on, beyond what its kernel spans


@torch.no_grad()
def fold_weights_(model: nn.Module) -> list[str]:
    """Replace computed weights by parameters, in place; the outputs in eval mode stay what they are.

    Parametrizations are folded wherever they are; of modules that compute a weight in their forward pass the convolutions are.

    Returns:
        The names of the modules that were changed.
    """
    model.eval()  # or spectral_norm would take a step
    changed = []
    for name, module in list(model.named_modules()):
        if parametrize.is_parametrized(module):
            _unparametrize_(module)
            changed.append(name)
        if name and isinstance(module, nn.Conv2d) and type(module).forward is not nn.Conv2d.forward and (plain := _plain(module)):
            model.set_submodule(name, plain)
            changed.append(name)
    return changed


def _unparametrize_(module: nn.Module) -> None:
    weights = {name: getattr(module, name).detach().clone() for name in cast(nn.ModuleDict, module.parametrizations)}
    module.__class__ = type(module).__bases__[0]  # torch's own way back would change the class of the user's network too
    del module.parametrizations
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight))


class _Weights(TorchFunctionMode):
    """Takes down the weights of the convolutions that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            self.found.append((kwargs or {}).get("weight", args[1] if len(args) > 1 else None))
        return func(*args, **(kwargs or {}))


def _plain(module: nn.Conv2d) -> nn.Conv2d | None:
    """Return the convolution that a module does with a weight that it computes; None where it is something else."""
    sides = [SIDE + dilation * (size - 1) for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    noise = torch.randn(1, module.in_channels, *sides, generator=torch.Generator().manual_seed(0)).to(module.weight)
    try:
        with _Weights() as weights:
            expected = module(noise)
    except (RuntimeError, TypeError, ValueError):  # it takes other inputs
        return None
    weight = weights.found[0] if len(weights.found) == 1 else None
    if not isinstance(weight, Tensor) or weight is module.weight or weight.shape != module.weight.shape:
        return None
    plain = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        cast(tuple[int, int], module.kernel_size),
        cast(tuple[int, int], module.stride),
        cast(tuple[int, int], module.padding),
        cast(tuple[int, int], module.dilation),
        module.groups,
        module.bias is not None,
        module.padding_mode,
    ).to(weight)
    plain.weight.copy_(weight)
    if plain.bias is not None and module.bias is not None:
        plain.bias.copy_(module.bias)
    found = plain.eval()(noise)
    return plain if found.shape == expected.shape and bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max()) else None
