"""From a budget to widths: evenly, or where a cut does least damage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compression.pruning.plan import Entry
from compression.tracing.costs import Cost
from compression.tracing.graph import ChannelGraph
from utils.errors import UserError

ALLOCATIONS = ("uniform", "sensitivity")
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


SHOWN = 3  # reasons in an error


def allowed_widths(entry: Entry, round_to: int, min_channels: int) -> list[int]:
    """Return the numbers of units that an entry may keep, ascending; whole is always one of them.

    Args:
        entry: groups that share a rate; the widths are its leader's.
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
        raise UserError(f"nothing in this network can be cut: {'; '.join(graph.reasons[:SHOWN]) or 'its only channels are its outputs'}")
    search = _Search(entries, [allowed_widths(entry, round_to, min_channels) for entry in entries], budget, damage)
    least = search.cost([0] * len(entries))
    if least > budget.limit:
        whole = budget.cost(budget.cost.full)
        fine = _Search(entries, [allowed_widths(entry, 1, 1) for entry in entries], budget, damage).cost([0] * len(entries))
        further = f", {fine / whole:.4f} with 1 and 1" if fine < least else f" ({'; '.join(graph.reasons[:SHOWN])})" * bool(graph.reasons)
        raise UserError(
            f"the budget {budget.name} {budget.share:g} can't be reached: {least / whole:.4f} is the least that"
            f" can stay with --min-channels {min_channels} and --round-to {round_to}{further}"
        )
    chosen = search.refill(search.descend())
    return search.widths(chosen)


@dataclass(frozen=True)
class _Search:
    """Steps through the widths that each entry may have; a choice is, for each entry, a position among its options."""

    entries: Sequence[Entry]
    options: list[list[int]]
    budget: Budget
    damage: Damage | None

    def widths(self, chosen: Sequence[int]) -> dict[str, int]:
        """Return the widths of a choice; where a rate is a share of what arrives, no more than that stays."""
        found: dict[str, int] = {}
        for entry, options, at in zip(self.entries, self.options, chosen, strict=True):
            found |= entry.widths(min(options[at], entry.base(found)))
        return found

    def cost(self, chosen: Sequence[int]) -> float:
        """Return the cost of a choice."""
        cost = self.budget.cost
        return cost(cost.vector(self.widths(chosen)))

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
