"""Optimizers by name, their parameter groups, and the learning rate as a closed form of training progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from utils.errors import UserError, unknown

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

# name -> (class, what --momentum means to it, whether torch has a fused form)
OPTIMIZERS: dict[str, tuple[type[Optimizer], Callable[[float], dict[str, Any]], bool]] = {
    "SGD": (torch.optim.SGD, lambda m: {"momentum": m, "nesterov": m > 0}, True),
    "Adam": (torch.optim.Adam, lambda m: {"betas": (m, 0.999)}, True),
    "AdamW": (torch.optim.AdamW, lambda m: {"betas": (m, 0.999)}, True),
    "RMSProp": (torch.optim.RMSprop, lambda m: {"momentum": m}, False),
}


def make_optimizer(model: nn.Module, name: str, lr0: float, momentum: float, decay: float) -> Optimizer:
    """Make an optimizer with three groups: biases and norm weights without decay, the other weights with it.

    Parameters that need no gradient are left out.

    Raises:
        UserError: the name is unknown, or a value out of range.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    if not lr0 > 0 or not 0 <= momentum < 1 or not decay >= 0:
        raise UserError(f"lr0 {lr0} must be above 0, momentum {momentum} in [0, 1), decay {decay} at least 0")
    biases: list[nn.Parameter] = []
    weights: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                (biases if key in ("bias", "float_bias") else norms if isinstance(module, NORMS) else weights).append(parameter)
    if not (biases or weights or norms):
        raise UserError("every parameter is frozen; there is nothing to train")
    optimizer_class, options, has_fused = OPTIMIZERS[name]
    groups = [
        {"params": biases, "weight_decay": 0.0, "name": "biases"},
        {"params": weights, "weight_decay": decay, "name": "weights"},
        {"params": norms, "weight_decay": 0.0, "name": "norms"},
    ]
    groups = [group for group in groups if group["params"]]
    extra: dict[str, Any] = {"fused": True} if has_fused and next(model.parameters()).device.type in ("cpu", "cuda") else {}
    return optimizer_class(groups, lr=lr0, **options(momentum), **extra)  # type: ignore[call-arg]


@dataclass(frozen=True)
class LearningRate:
    """lr0, after a linear warm-up, falling to lr0 * lrf linearly or along a cosine (arXiv:1608.03983).

    It is a function of progress alone, so it needs no state to be resumed.
    """

    lr0: float
    lrf: float
    epochs: int
    warmup_epochs: float
    cosine: bool

    def __post_init__(self) -> None:
        if not 0 <= self.lrf <= 1:
            raise UserError(f"lrf is {self.lrf}; the final learning rate is lr0 * lrf, with lrf in [0, 1]")
        if self.warmup_epochs < 0:
            raise UserError(f"warmup-epochs is {self.warmup_epochs}; it must be at least 0")

    def at(self, progress: float) -> float:
        """Return the learning rate after ``progress`` epochs (a fraction within an epoch)."""
        # A run that is shorter than twice the warm-up warms up over half of it.
        warmup = min(self.warmup_epochs, self.epochs / 2)
        done = min(progress / self.epochs, 1.0)
        fall = (1 + math.cos(math.pi * done)) / 2 if self.cosine else 1 - done
        factor = self.lrf + (1 - self.lrf) * fall
        return self.lr0 * factor * (min(progress / warmup, 1.0) if warmup else 1.0)

    def apply_(self, optimizer: Optimizer, progress: float) -> float:
        """Set every group's learning rate, scaled by the group's ``lr_scale`` where it has one."""
        lr = self.at(progress)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr
