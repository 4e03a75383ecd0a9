"""Optimizers by name, their parameter groups, and the learning rate as a function of training progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from utils.errors import UserError, unknown
from utils.loop.muon import Muon

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class OptimizerKind(NamedTuple):
    """An optimizer: its class, what --momentum means to it, whether torch has a fused form; a rate and a decay that suit it."""

    kind: type[Optimizer]
    options: Callable[[float], dict[str, Any]]
    has_fused: bool
    lr0: float
    decay: float


OPTIMIZERS = {
    "SGD": OptimizerKind(torch.optim.SGD, lambda m: {"momentum": m, "nesterov": m > 0}, True, 0.03, 5e-4),
    "Adam": OptimizerKind(torch.optim.Adam, lambda m: {"betas": (m, 0.999)}, True, 1e-3, 5e-5),
    "AdamW": OptimizerKind(torch.optim.AdamW, lambda m: {"betas": (m, 0.999)}, True, 1e-3, 0.05),
    "Muon": OptimizerKind(Muon, lambda m: {"momentum": m}, False, 0.01, 0.05),
    "RMSProp": OptimizerKind(torch.optim.RMSprop, lambda m: {"momentum": m}, False, 1e-3, 5e-5),
}


def make_optimizer(model: nn.Module, name: str, lr0: float, momentum: float, decay: float) -> Optimizer:
    """Make an optimizer with three groups: weights with decay; biases and norm weights without.

    Frozen parameters are left out.

    Raises:
        UserError: the name is unknown, a value is out of range, or everything is frozen.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    if not lr0 > 0 or not 0 <= momentum < 1 or not decay >= 0:
        raise UserError(f"lr0 {lr0} must be above 0, momentum {momentum} in [0, 1), decay {decay} at least 0")
    parameters: dict[str, list[nn.Parameter]] = {"biases": [], "weights": [], "norms": []}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                kind = "biases" if key in ("bias", "float_bias") else "norms" if isinstance(module, NORMS) else "weights"
                parameters[kind].append(parameter)
    groups = [
        {"params": members, "weight_decay": decay if kind == "weights" else 0.0, "name": kind}
        for kind, members in parameters.items()
        if members
    ]
    if not groups:
        raise UserError("every parameter is frozen; there is nothing to train")
    chosen = OPTIMIZERS[name]
    extra: dict[str, Any] = {"fused": True} if chosen.has_fused and next(model.parameters()).device.type in ("cpu", "cuda") else {}
    return chosen.kind(groups, lr=lr0, **chosen.options(momentum), **extra)  # type: ignore[call-arg]


@dataclass(frozen=True)
class LearningRate:
    """A linear warm-up to lr0, then a fall to lr0 * lrf, linear or along a cosine (arXiv:1608.03983).

    It depends on progress alone, so a resumed run needs no state of it.
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
        """Return the learning rate after ``progress`` epochs, a fraction within an epoch."""
        # A run shorter than twice the warm-up warms up for half of it.
        warmup = min(self.warmup_epochs, self.epochs / 2)
        done = min(progress / self.epochs, 1.0)
        fall = (1 + math.cos(math.pi * done)) / 2 if self.cosine else 1 - done
        factor = self.lrf + (1 - self.lrf) * fall
        return self.lr0 * factor * (min(progress / warmup, 1.0) if warmup else 1.0)

    def apply_(self, optimizer: Optimizer, progress: float) -> float:
        """Set every group's learning rate, scaled by its ``lr_scale`` if it has one."""
        lr = self.at(progress)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr
