"""Hooks for normalisation layers: frozen ones stay frozen, and the statistics of fresh ones settle quickly."""

from __future__ import annotations

from torch import nn

from utils.loop.engine import Run
from utils.loop.hooks import Hook

SETTLING = 5  # the share of the steps so far that statistics are averaged over is 1 / SETTLING


class FrozenNorms(Hook):
    """Keeps normalisation layers in eval mode, so that their statistics do not change: those of frozen modules, or all of them.

    Refitted weights fit the statistics of the dense network. With a batch's own they are those of a network that is worse, and a
    short fine-tuning does not bring that back.
    """

    def __init__(self, norms: list[nn.Module]) -> None:
        self.norms = norms

    def on_epoch_begin(self, run: Run) -> None:
        for norm in self.norms:
            norm.eval()


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch norms of a network."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


class NormWarmup(Hook):
    """Averages batch norm's statistics over about the last fifth of the steps, at first.

    The momentum is max(m, 5 / (step + 5)), with m the layer's own.

    Running statistics start at (0, 1) and take several times 1 / m steps to forget it. With YOLOv5's m = 0.03 and a small
    data set, a network that has long learnt would validate at chance for whole epochs. The same holds after a cut, as
    the statistics are then those of another network. Early steps change the weights fast, so an even average lags behind: after 3
    epochs of digits (75 steps) a network validated at 34 % with one, and at 94 % with this.
    """

    def __init__(self, model: nn.Module) -> None:
        self.momenta = [(norm, norm.momentum) for norm in batch_norms(model) if norm.momentum is not None]

    def on_minibatch_begin(self, run: Run) -> None:
        steps = run.epoch * run.steps_per_epoch + run.step
        for norm, momentum in self.momenta:
            norm.momentum = max(momentum, SETTLING / (steps + SETTLING))
        if all(norm.momentum == momentum for norm, momentum in self.momenta):
            self.momenta = []
