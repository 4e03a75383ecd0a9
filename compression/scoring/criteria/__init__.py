"""Criteria: which channels matter, one method per file; ``CRITERIA`` lists them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from compression.scoring.calibration import Calibration
from compression.scoring.criteria.apoz import apoz
from compression.scoring.criteria.bn_scale import bn_scale
from compression.scoring.criteria.chip import chip
from compression.scoring.criteria.effective_rank import effective_rank
from compression.scoring.criteria.fpgm import fpgm
from compression.scoring.criteria.l1 import l1
from compression.scoring.criteria.l2 import l2
from compression.scoring.criteria.mean_activation import mean_activation
from compression.scoring.criteria.nuclear_norm import nuclear_norm
from compression.scoring.criteria.random_order import random_order
from compression.scoring.criteria.rank import rank
from compression.scoring.criteria.reconstruction import reconstruction
from compression.scoring.criteria.taylor import taylor
from compression.scoring.ranks import load_ranks, scores_from_ranks
from compression.scoring.scores import NetworkScores, ScoringTask
from compression.tracing.graph import ChannelGraph
from utils.errors import UserError, unknown


@dataclass(frozen=True)
class Criterion:
    """A way to score channels: what it needs, the function that computes it, and its meaning in one line.

    Attributes:
        needs: "weights" (nothing else), "maps" (images) or "gradients" (images and their labels).
    """

    needs: str
    function: Callable[[ScoringTask], NetworkScores]
    meaning: str


CRITERIA: dict[str, Criterion] = {
    "rank": Criterion("maps", rank, "mean matrix rank of the feature map (HRank); ties broken by the effective rank"),
    "effective_rank": Criterion("maps", effective_rank, "mean effective rank of the feature map: exp(entropy of its singular values)"),
    "nuclear_norm": Criterion("maps", nuclear_norm, "mean nuclear norm of the feature map: the sum of its singular values"),
    "l1": Criterion("weights", l1, "sum of the absolute weights of the filter"),
    "l2": Criterion("weights", l2, "Euclidean norm of the filter"),
    "bn_scale": Criterion("weights", bn_scale, "absolute scale of batch normalisation (Network Slimming)"),
    "fpgm": Criterion("weights", fpgm, "summed distance of the filter to the others of its layer (geometric median)"),
    "taylor": Criterion("gradients", taylor, "squared first-order change of the loss without the channel"),
    "apoz": Criterion("maps", apoz, "share of positive activations (1 - average percentage of zeros)"),
    "mean_activation": Criterion("maps", mean_activation, "mean absolute activation"),
    "chip": Criterion("maps", chip, "what the layer's maps lose in nuclear norm without the channel (channel independence)"),
    "reconstruction": Criterion("maps", reconstruction, "error of the readers' outputs after the best refit without the channel (OBS)"),
    "random": Criterion("weights", random_order, "drawn at random, seeded: the control"),
}
# Activations that are never exactly zero: every map has full rank, and ranks tie.
WITHOUT_ZEROS = (nn.SiLU, nn.GELU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.PReLU)


def score(
    criterion: str,
    model: nn.Module,
    graph: ChannelGraph,
    calibration: Calibration | None,
    seed: int,
    keep_counts: Mapping[str, int] | None = None,
) -> NetworkScores:
    """Score the units of every prunable group.

    Args:
        criterion: a name of ``CRITERIA``.
        model: the network that was traced; it is left as it was.
        graph: its channel groups.
        calibration: images; may be None for criteria that need weights only.
        seed: of criteria that draw at random.
        keep_counts: how many units of each group will be kept, so that ranks stop once the choice has settled; without
            it all images are scored.

    Raises:
        UserError: the criterion is unknown, or can't score this network.
    """
    if criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    chosen = CRITERIA[criterion]
    if chosen.needs != "weights" and (calibration is None or not len(calibration)):
        raise UserError(f"criterion '{criterion}' needs images; give --data")
    start = time.perf_counter()
    scored = chosen.function(ScoringTask(model, graph, calibration, seed, keep_counts))
    return replace(scored, seconds=time.perf_counter() - start)


def default_criterion(model: nn.Module, for_budget: bool) -> str:
    """Return the criterion for a network: the best for a budget; for a compress_rate HRank's, which needs activations with exact zeros."""
    if for_budget:
        return "reconstruction"
    return "taylor" if any(isinstance(module, WITHOUT_ZEROS) for module in model.modules()) else "rank"


def score_by_files(folder: str, model: nn.Module, graph: ChannelGraph, model_name: str = "") -> NetworkScores:
    """Score the units of every prunable group by the rank files in a folder.

    Groups that no map shows (HRank writes no files of linear layers) are scored by the norm of their weights.

    Raises:
        UserError: a file is missing, damaged or of another network.
    """
    found = scores_from_ranks(load_ranks(folder, graph, model_name), graph)
    missing = any(group.name not in found for group in graph.prunable)
    return NetworkScores({**(score("l2", model, graph, None, 0).groups if missing else {}), **found})
