"""What every criterion returns, one value and one rank for each unit of a channel group, and the steps that criteria share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compression.layers.readers import InputMoments
from compression.scoring.calibration import Calibration
from compression.scoring.feature_maps import Statistic, Tap, find_taps, mean_over_images
from compression.tracing.graph import ChannelGraph, ChannelGroup
from compression.tracing.record import owned_tensors


@dataclass(frozen=True)
class GroupScore:
    """The scores of one group's units.

    Attributes:
        values: float64 [units]; higher is more important.
        order: int64 [units]: units from the least to the most important, ties broken.
        tied: share of the units whose value equals another's.
        images: how many it took; 0 for scores of weights.
    """

    values: Tensor
    order: Tensor
    tied: float
    images: int

    @classmethod
    def of(cls, keys: Sequence[Tensor], images: int = 0) -> GroupScore:
        """Order units by the first key; each further key breaks ties, and the index those that remain."""
        values = keys[0].double()
        return cls(values, order_units(keys), tied_share(values), images)


@dataclass(frozen=True)
class TapScore:
    """What was measured of one tap.

    Attributes:
        name: of the tap, "conv3".
        weights: the weights whose channels it scores.
        map_size: height and width; None where rank files of another origin do not say.
        images: how many were scored; 0 where rank files do not say.
        means: mean over images, float32 [C], by kind: "rank" and, unless the files are of another origin,
            "effective_rank" and "nuclear".
    """

    name: str
    weights: tuple[str, ...]
    map_size: tuple[int, int] | None
    images: int
    means: dict[str, Tensor]


@dataclass(frozen=True)
class MapScores:
    """What was measured of a network's maps.

    Attributes:
        taps: by name, in forward order.
        images: how many each group took, if known.
    """

    taps: dict[str, TapScore]
    images: dict[str, int]


@dataclass(frozen=True)
class NetworkScores:
    """Scores of all prunable groups.

    Attributes:
        groups: by name.
        maps: the ranks that were measured, for ``save_ranks``; None where the criterion measures none.
        readers: the moments of the readers' inputs, by weight, for an allocation to use again; None where it measures none.
        seconds: the time that scoring took.
    """

    groups: dict[str, GroupScore]
    maps: MapScores | None = None
    readers: dict[str, InputMoments] | None = None
    seconds: float = 0.0

    @property
    def orders(self) -> dict[str, list[int]]:
        """For each group, its units from the least to the most important."""
        return {name: group.order.tolist() for name, group in self.groups.items()}


@dataclass(frozen=True)
class ScoringTask:
    """What a criterion may look at.

    Attributes:
        model: it is left as it was.
        calibration: images; None only for criteria that need none.
        seed: of criteria that draw at random.
        keep_counts: how many units of each group will be kept, if known: scoring may then stop once they are settled.
    """

    model: nn.Module
    graph: ChannelGraph
    calibration: Calibration | None
    seed: int
    keep_counts: Mapping[str, int] | None = None

    @property
    def images(self) -> Calibration:
        """The images of a criterion that needs them."""
        assert self.calibration is not None
        return self.calibration


def order_units(keys: Sequence[Tensor]) -> Tensor:
    """Return units from the least to the most important; where all keys tie, the unit of the higher index is the less important."""
    backwards = [key.double().numpy()[::-1] for key in reversed(keys)]
    return torch.from_numpy(len(keys[0]) - 1 - np.lexsort(backwards))


def tied_share(values: Tensor) -> float:
    """Return the share of values that are equal to another one."""
    _, counts = torch.unique(values, return_counts=True)
    return float(counts[counts > 1].sum()) / max(len(values), 1)


def from_taps(group: ChannelGroup, taps: Sequence[Tap], per_channel: Mapping[str, Tensor]) -> Tensor:
    """Return a group's scores, float64 [..., units]: a unit's mean over its channels of each tap, then over the taps.

    Args:
        per_channel: scores [..., C] by the taps' names.
    """
    shown = taps_of(group, taps)
    return mean_over_members(
        [mean_by_unit(per_channel[tap.name][..., tap.positions[group.name]], tap.units[group.name], group.size) for tap in shown]
    )


def score_maps(task: ScoringTask, statistic: Statistic, images: int | None = None) -> NetworkScores:
    """Score groups by the mean over images of one statistic of the maps; ``images``: only the first so many."""
    calibration = task.images if images is None else task.images.head(images)
    taps, means = find_taps(task.graph), mean_over_images(task.model, task.graph, calibration, statistic)
    scored = [group for group in task.graph.prunable if taps_of(group, taps)]
    return NetworkScores({group.name: GroupScore.of([from_taps(group, taps, means)], len(calibration)) for group in scored})


def score_weights(task: ScoringTask, per_filter: Callable[[Tensor], Tensor]) -> NetworkScores:
    """Score groups by their filters, see ``from_weights``."""
    return NetworkScores({group.name: GroupScore.of([from_weights(task.model, group, per_filter)]) for group in task.graph.prunable})


def taps_of(group: ChannelGroup, taps: Sequence[Tap]) -> list[Tap]:
    """Return the taps that show units of a group."""
    return [tap for tap in taps if group.name in tap.units]


def from_weights(model: nn.Module, group: ChannelGroup, per_filter: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a group's scores from the weights that make its channels: float64 [units].

    Each weight's scores are divided by their mean, since layers of one group may differ in scale.

    Args:
        per_filter: scores [n] of n filters, float64 [n, weights of a filter].
    """
    owned = dict(owned_tensors(model).values())
    found = []
    for member in group.producers:
        weight = owned[member.tensor].detach()
        if weight.ndim < 2 or not weight.is_floating_point():
            continue
        rows = weight.movedim(member.dim, 0).flatten(1).cpu().double()[member.positions]
        found.append(relative(mean_by_unit(per_filter(rows), member.units, group.size)))
    return mean_over_members(found)


def relative(values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Divide scores by their mean over the units that are present."""
    scores, present = values
    mean = scores[present].mean()
    return (scores / mean if mean > 0 else scores), present


def mean_by_unit(values: Tensor, units: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the mean over the positions of each unit, and which units are present."""
    counts = torch.bincount(units, minlength=size)
    sums = torch.zeros(*values.shape[:-1], size, dtype=torch.float64).index_add_(-1, units, values.double())
    return sums / counts.clamp_min(1), counts > 0


def mean_over_members(found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return each unit's mean over the members in which it is present."""
    sums = torch.stack([scores for scores, _ in found]).sum(0)
    return sums / torch.stack([present for _, present in found]).sum(0).clamp_min(1)
