"""Exponential moving average of the weights; it is what a run validates and saves."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from utils import distributed

DECAY, RAMP = 0.9999, 2000  # YOLOv5's: d = DECAY * (1 - exp(-updates / RAMP))


class EMA:
    """Keeps ``model``, an averaged copy in eval mode: average = d * average + (1 - d) * current.

    Floating-point buffers (batch norm's statistics) are averaged like weights, others are copied.
    """

    def __init__(self, model: nn.Module, decay: float = DECAY, ramp: float = RAMP) -> None:
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay, self.ramp, self.updates = decay, ramp, 0

    @torch.no_grad()
    def update_(self, model: nn.Module) -> None:
        """Move the average towards the weights of a model of the same structure."""
        self.updates += 1
        weight = 1 - self.decay * (1 - math.exp(-self.updates / self.ramp))
        averages, current = _tensors(self.model), _tensors(model)
        floating = [i for i, tensor in enumerate(averages) if tensor.is_floating_point()]
        torch._foreach_lerp_([averages[i] for i in floating], [current[i] for i in floating], weight)
        for average, tensor in zip(averages, current, strict=True):
            if not average.is_floating_point():
                average.copy_(tensor)

    def synchronise_(self) -> None:
        """Copy the buffers of rank 0 to all ranks: batch norm's statistics differ between ranks; weights do not."""
        distributed.broadcast_(list(self.model.buffers()))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the averaged weights."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the number of updates."""
        self.updates = int(state["updates"])


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters and buffers, each once; called at every step, and several times faster than torch's iterators."""
    found = (t for module in model.modules() for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    return list(dict.fromkeys(found))
