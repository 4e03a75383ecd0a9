"""From a budget to widths: evenly, or where a cut does least damage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression.pruning.costs import Cost
from compression.pruning.plan import Entry, make_plan
from compression.scoring.calibration import Calibration
from compression.tracing.cutting import mask_
from compression.tracing.graph import ChannelGraph
from utils.errors import UserError

ALLOCATIONS = ("uniform", "sensitivity")
PROBED = (0.8, 0.6, 0.4, 0.2)  # shares of an entry's channels at which its damage is measured
MIN_STEPS = 24  # an entry shrinks from whole to its least width in at least so many steps, if it has that many channels

Damage = Callable[[int, float], float]  # (entry, kept share) -> damage


@dataclass(frozen=True)
class Budget:
    """What a network may cost.

    Attributes:
        cost: the cost as a function of the widths.
        share: the share of the dense network's cost that may stay.
        name: what it is the cost of, "macs" or "params".

    Raises:
        UserError: the share is not in (0, 1].
    """

    cost: Cost
    share: float
    name: str

    def __post_init__(self) -> None:
        check_share(self.name, self.share)

    @property
    def limit(self) -> float:
        """The most that may be spent."""
        return self.share * self.cost(self.cost.full)


def check_share(name: str, share: float) -> None:
    """Raise a UserError unless a share is in (0, 1]."""
    if not 0 < share <= 1:
        raise UserError(f"{name} is {share}; it is the share that stays, in (0, 1]")


def allowed_widths(entry: Entry, round_to: int, min_channels: int) -> list[int]:
    """Return the numbers of units that an entry may keep, ascending; whole is always one of them.

    Args:
        entry: groups that share a width.
        round_to: channels (not units) are kept in multiples of this.
        min_channels: the fewest channels to keep.
    """
    size, per_unit = entry[0].size, max(entry[0].channels // entry[0].size, 1)
    step = round_to // math.gcd(round_to, per_unit)
    least = max(math.ceil(min_channels / per_unit), *(len(group.fixed) for group in entry), 1)
    return [*(width for width in range(step, size, step) if width >= least), size]


def allocate(
    graph: ChannelGraph, entries: Sequence[Entry], budget: Budget, round_to: int, min_channels: int, damage: Damage | None
) -> dict[str, int]:
    """Choose widths whose cost is within a budget, and as close to it as the widths allow.

    Channels go step by step, each time where the damage is least for what it saves (without ``damage``: where the
    largest share still stands, so that all shrink alike). Then what still fits comes back, the other way round.

    Raises:
        UserError: the budget can't be reached.
    """
    if not entries:
        raise UserError("nothing in this network can be cut; prune.py --dry-run says why")
    search = _Search(entries, [allowed_widths(entry, round_to, min_channels) for entry in entries], budget, damage)
    least = search.cost([0] * len(entries))
    if least > budget.limit:
        raise UserError(
            f"the budget {budget.name} {budget.share:g} can't be reached: {least / budget.cost(budget.cost.full):.4f} is the least that"
            f" can stay with --min-channels {min_channels} and --round-to {round_to}"
        )
    chosen = search.refill(search.descend())
    return {group.name: options[at] for entry, options, at in zip(entries, search.options, chosen, strict=True) for group in entry}


@dataclass(frozen=True)
class _Search:
    """Steps through the widths that each entry may have; a choice is, for each entry, a position among its options."""

    entries: Sequence[Entry]
    options: list[list[int]]
    budget: Budget
    damage: Damage | None

    def cost(self, chosen: Sequence[int]) -> float:
        """Return the cost of a choice."""
        cost = self.budget.cost
        return cost(cost.vector({g.name: self.options[i][chosen[i]] for i, entry in enumerate(self.entries) for g in entry}))

    def descend(self) -> list[int]:
        """Take steps down from the whole network until the budget holds."""
        chosen = [len(options) - 1 for options in self.options]
        while (cost := self.cost(chosen)) > self.budget.limit:
            best, best_price, best_lower = -1, math.inf, 0
            for i, options in enumerate(self.options):
                if chosen[i] == 0:
                    continue
                lower = max(chosen[i] - max(len(options) // MIN_STEPS, 1), 0)
                price = -options[chosen[i]] / options[-1]
                if self.damage:
                    saved = cost - self.cost(_replaced(chosen, i, lower))
                    price = self._change(i, lower, chosen[i]) / saved if saved > 0 else math.inf
                if price < best_price or best < 0:
                    best, best_price, best_lower = i, price, lower
            chosen[best] = best_lower
        return chosen

    def refill(self, chosen: list[int]) -> list[int]:
        """Take back single steps while the budget allows."""
        while True:
            cost, best, best_gain = self.cost(chosen), -1, -math.inf
            for i, options in enumerate(self.options):
                if chosen[i] == len(options) - 1:
                    continue
                extra = self.cost(_replaced(chosen, i, chosen[i] + 1)) - cost
                if cost + extra > self.budget.limit:
                    continue
                gain = -options[chosen[i]] / options[-1]
                if self.damage:
                    gain = self._change(i, chosen[i], chosen[i] + 1) / max(extra, 1e-9)
                if gain > best_gain:
                    best, best_gain = i, gain
            if best < 0:
                return chosen
            chosen[best] += 1

    def _change(self, entry: int, lower: int, higher: int) -> float:
        """Return how much more damage the lower of two positions does."""
        assert self.damage
        options = self.options[entry]
        return self.damage(entry, options[lower] / options[-1]) - self.damage(entry, options[higher] / options[-1])


def _replaced(chosen: Sequence[int], entry: int, position: int) -> list[int]:
    return [*chosen[:entry], position, *chosen[entry + 1 :]]


def measure_damage(
    model: nn.Module,
    graph: ChannelGraph,
    entries: Sequence[Entry],
    orders: Mapping[str, Sequence[int]],
    calibration: Calibration,
) -> Damage:
    """Measure what it does to the network's outputs that one entry loses channels, with masks.

    Damage is the mean Kullback-Leibler divergence of the masked network's class probabilities from the dense network's
    own, on calibration images. It is measured at several widths and interpolated along the lower convex hull.

    Cost: entries x widths passes over the calibration images.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = _log_probabilities(model, calibration)
    curves: list[tuple[list[float], list[float]]] = []
    for entry in entries:
        points = [(1.0, 0.0)]
        for share in PROBED:
            widths = {group.name: max(round(share * group.size), len(group.fixed), 1) for group in entry}
            plan = make_plan(graph, widths, orders)
            if not plan.kept:
                continue
            mask_(model, graph, plan.kept)
            masked = _log_probabilities(model, calibration)
            model.load_state_dict(state)
            divergence = F.kl_div(masked, dense, reduction="batchmean", log_target=True).item()
            points.append((widths[entry[0].name] / entry[0].size, max(divergence, points[-1][1])))
        last, slope = points[-1], 0.0
        if len(points) > 1:
            slope = (points[-1][1] - points[-2][1]) / max(points[-2][0] - points[-1][0], 1e-9)
        points.append((0.0, 2 * last[1] + last[0] * slope + 1e-6))
        curves.append(_convex(points))
    return lambda i, share: float(np.interp(share, *curves[i]))


def _convex(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the lower convex hull of points, ascending in the first coordinate."""
    hull: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [x for x, _ in hull], [y for _, y in hull]


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) <= (b[1] - a[1]) * (c[0] - a[0])


@torch.no_grad()
def _log_probabilities(model: nn.Module, calibration: Calibration) -> Tensor:
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([F.log_softmax(model(inputs.to(device)).float(), 1).cpu() for inputs, _ in calibration.batches()])
