"""Prune input channels and refit the remaining weights so that the layer's output changes least (arXiv:1707.06168, equation 1).

min over W' of ||Y - X' W'||, with Y the layer's present output and X' its input from the kept channels

Differs: channels are chosen by mean |w|, where the paper uses a LASSO. Cost: one pass over the calibration images, and a
least-squares fit in float64 for each weight: points x unknowns^2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from compression.schedule.pruners.l1_ranked import L1RankedPruner
from compression.schedule.pruners.pruner import Decision, PruningTask
from compression.schedule.pruners.reconstruction import refit, sample_inputs
from utils.errors import UserError
from utils.options import integer, option, plain


@dataclass(kw_only=True)
class FMReconstructionPruner(L1RankedPruner):
    """Prunes the input channels with the lowest mean magnitude and refits the weights of the others.

    Attributes:
        n_points_per_fm: number of positions in each calibration image that the fit uses.
    """

    kinds = ("Channels",)
    n_points_per_fm: int = option(integer(1), 10)

    def decide(self, task: PruningTask) -> Decision:
        masks = super().decide(task).masks
        kept = {name: self.view(name, mask)[:, 0] > 0 for name, mask in masks.items()}
        layers = {name: _layer(task.model, name) for name in self.weights if not kept[name].all()}
        if not layers:
            return Decision(masks)
        points = sample_inputs(task.model, layers, task.images(), self.n_points_per_fm, task.generator)
        if idle := [name for name in layers if name not in points]:
            raise UserError(f"{idle[0]} can't be refitted: its layer does not run")
        return Decision(masks, {name: refit(layer.weight, kept[name], points[name]) for name, layer in layers.items()})


def _layer(model: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    """Return the layer of a weight.

    Raises:
        UserError: layers of its kind can't be refitted.
    """
    layer = {plain(path): module for path, module in model.named_modules()}.get(plain(name).removesuffix(".weight"))
    if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
        return layer
    kind = f"{type(layer).__name__} with groups" if isinstance(layer, nn.Conv2d) else type(layer).__name__
    raise UserError(f"{name} is the weight of a {kind}; Conv2d with groups == 1 and Linear can be refitted")
