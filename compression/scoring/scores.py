"""What every criterion gives: one value and one place in the order for each unit of a channel group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from compression.scoring.calibration import Calibration
from compression.scoring.feature_maps import Statistic, Tap, find_taps, mean_over_images
from compression.tracing.graph import ChannelGraph, ChannelGroup
from compression.tracing.record import owned_tensors


@dataclass(frozen=True)
class GroupScore:
    """The scores of one group's units.

    Attributes:
        values: float64 [units]; higher is more important. This is what is shown.
        order: int64 [units]: units from the least to the most important, ties broken.
        tied: share of the units whose value equals another's.
        images: that it took; 0 for scores of weights.
    """

    values: Tensor
    order: Tensor
    tied: float
    images: int

    @classmethod
    def of(cls, keys: Sequence[Tensor], images: int = 0) -> GroupScore:
        """Order units by the first key; each further one breaks ties; the last ones are broken by the index."""
        values = keys[0].double()
        return cls(values, order_units(keys), tied_share(values), images)


@dataclass(frozen=True)
class Task:
    """What a criterion may look at.

    Attributes:
        model: it is left as it was.
        calibration: images; None only for criteria that need none.
        seed: of what is drawn.
        keep_counts: units that will be kept of each group, where that is known: scoring may stop when they are settled.
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
    """Return units from the least to the most important; where all keys tie, the higher index goes first."""
    backwards = [key.double().numpy()[::-1] for key in reversed(keys)]
    return torch.from_numpy(len(keys[0]) - 1 - np.lexsort(backwards))


def tied_share(values: Tensor) -> float:
    """Return the share of values that are equal to another one."""
    _, counts = torch.unique(values, return_counts=True)
    return float(counts[counts > 1].sum()) / max(len(values), 1)


def from_taps(group: ChannelGroup, taps: Sequence[Tap], per_channel: Mapping[str, Tensor]) -> Tensor:
    """Return a group's scores from those of its maps: a unit's mean over its channels of each tap, then over the taps.

    Args:
        group: a group.
        taps: all taps.
        per_channel: scores [..., C] by the taps' names.

    Returns:
        float64 [..., units].
    """
    found = [
        by_unit(per_channel[tap.name][..., tap.positions[group.name]], tap.units[group.name], group.size) for tap in taps_of(group, taps)
    ]
    return mean_of(found)


def score_means(task: Task, statistic: Statistic, images: int | None = None) -> dict[str, GroupScore]:
    """Score groups by the mean over images of one statistic of the maps; ``images`` takes the first so many."""
    calibration = task.images if images is None else task.images.head(images)
    taps, means = find_taps(task.graph), mean_over_images(task.model, task.graph, calibration, statistic)
    scored = [group for group in task.graph.prunable if taps_of(group, taps)]
    return {group.name: GroupScore.of([from_taps(group, taps, means)], len(calibration)) for group in scored}


def taps_of(group: ChannelGroup, taps: Sequence[Tap]) -> list[Tap]:
    """Return the taps that show units of a group."""
    return [tap for tap in taps if group.name in tap.units]


def from_weights(model: nn.Module, group: ChannelGroup, per_row: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a group's scores from the weights that make its channels.

    Each weight's scores are divided by their mean, since layers of one group may differ in scale.

    Args:
        per_row: scores [n] of n filters, float64 [n, weights of a filter].
    """
    owned = dict(owned_tensors(model).values())
    found = []
    for member in group.producers:
        weight = owned[member.tensor].detach()
        if weight.ndim < 2 or not weight.is_floating_point():
            continue
        rows = weight.movedim(member.dim, 0).flatten(1).cpu().double()[member.positions]
        found.append(relative(by_unit(per_row(rows), member.units, group.size)))
    return mean_of(found)


def relative(values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Divide by the mean over the units that are there."""
    scores, present = values
    mean = scores[present].mean()
    return (scores / mean if mean > 0 else scores), present


def by_unit(values: Tensor, units: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the mean over the positions of each unit, and which units have any."""
    counts = torch.bincount(units, minlength=size)
    sums = torch.zeros(*values.shape[:-1], size, dtype=torch.float64).index_add_(-1, units, values.double())
    return sums / counts.clamp_min(1), counts > 0


def mean_of(found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean over several members of the units that each carries."""
    sums = torch.stack([scores for scores, _ in found]).sum(0)
    return sums / torch.stack([present for _, present in found]).sum(0).clamp_min(1)
