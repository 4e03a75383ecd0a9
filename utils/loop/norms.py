"""Hooks for normalisation layers: frozen ones stay frozen, and the statistics of fresh ones settle quickly."""

from __future__ import annotations

from torch import nn

from utils.loop.engine import Run
from utils.loop.hooks import Hook


class FrozenNorms(Hook):
    """Keeps the normalisation layers of frozen modules in eval mode, so that their statistics do not change."""

    def __init__(self, norms: list[nn.Module]) -> None:
        self.norms = norms

    def on_epoch_begin(self, run: Run) -> None:
        for norm in self.norms:
            norm.eval()


class NormWarmup(Hook):
    """Averages batch norm's statistics evenly at first: momentum = max(m, 1 / (step + 1)), with m the layer's own.

    Running statistics start at (0, 1) and take several times 1 / m steps to forget it. With YOLOv5's m = 0.03 and a small
    data set, a network that has long learnt would validate at chance for whole epochs. The same holds after a cut, as
    the statistics are then those of another network.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.momenta = [(norm, norm.momentum) for norm in norms if norm.momentum is not None]

    def on_minibatch_begin(self, run: Run) -> None:
        steps = run.epoch * run.steps_per_epoch + run.step
        for norm, momentum in self.momenta:
            norm.momentum = max(momentum, 1 / (steps + 1))
        if all(norm.momentum == momentum for norm, momentum in self.momenta):
            self.momenta = []
