"""The order of a network's tensors in memory: channels last, the fastest, unless a network can't compute with it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


def channels_last(model: nn.Module) -> nn.Module:
    """Put a network's weights in channels-last order, in place, unless it is one that must ``keep_contiguous_``."""
    if _contiguous in model._forward_pre_hooks.values():
        return model
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def keep_contiguous_(model: nn.Module, example: Tensor) -> None:
    """Have a network get contiguous inputs, in place, if it fails with channels last.

    The forward passes of many small networks take a ``view`` of a feature map, which only a contiguous one has.

    Args:
        example: inputs, [B, C, H, W].
    """
    try:
        channels_last(deepcopy(model).eval())(example.to(memory_format=torch.channels_last))
    except RuntimeError:  # one that has another cause is met again, and reported, where the network is used
        model.register_forward_pre_hook(_contiguous)


def _contiguous(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # Not ``contiguous()``: of one channel, the strides of channels last count as contiguous too, and convolutions go by the strides.
    return tuple(value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value for value in inputs)
