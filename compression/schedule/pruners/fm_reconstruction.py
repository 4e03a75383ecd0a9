"""Input channels are chosen, and their weights refitted so that the layer's output stays (arXiv:1707.06168, equation 1).

min over W' of ||Y - X' W'||, with Y the layer's present output and X' what it reads of the kept channels

Differs: the channels are chosen by their mean |w|, where the paper takes a LASSO. Cost: one pass over the calibration
images, and a least-squares fit in float64 for each weight: points x unknowns^2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from compression.schedule.pruners.l1_ranked import ByMagnitude
from compression.schedule.pruners.pruner import Decision, PruningTask
from compression.schedule.pruners.reconstruction import refit, sample_inputs
from compression.schedule.pruners.targets import AtOnce, Gradual
from utils.errors import UserError
from utils.options import integer, option, plain


@dataclass(kw_only=True)
class ByMagnitudeRefitted(ByMagnitude):
    """Prunes input channels of the lowest mean magnitude and refits the weights of the others.

    Attributes:
        n_points_per_fm: how many places of each calibration image the fit sees.
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
        weights: dict[str, Tensor] = {}
        for name, layer in layers.items():
            if name not in points:
                raise UserError(f"{name} can't be refitted: its layer does not run")
            weights[name] = refit(layer.weight, kept[name], points[name])  # type: ignore[arg-type]
        return Decision(masks, weights)


def _layer(model: nn.Module, name: str) -> nn.Module:
    """Return the layer of a weight.

    Raises:
        UserError: it is of no kind that can be refitted.
    """
    layer = {plain(path): module for path, module in model.named_modules()}.get(plain(name).removesuffix(".weight"))
    if not isinstance(layer, nn.Linear) and not (isinstance(layer, nn.Conv2d) and layer.groups == 1):
        kind = f"{type(layer).__name__} with groups" if isinstance(layer, nn.Conv2d) else type(layer).__name__
        raise UserError(f"{name} is the weight of a {kind}; Conv2d with groups == 1 and Linear can be refitted")
    return layer


@dataclass(kw_only=True)
class FMReconstructionChannelPruner(ByMagnitudeRefitted, AtOnce):
    """Prunes input channels and refits the others."""


@dataclass(kw_only=True)
class FMReconstructionChannelPrunerAGP(ByMagnitudeRefitted, Gradual):
    """Prunes input channels, more and more of them, and refits the others."""
