"""From a budget of time to widths: times go down in steps, so that single channels tell nothing; whole ranges are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from compression.pruning.allocation import Damage
from compression.pruning.plan import Entry
from utils.errors import UserError

Times = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # widths [N, groups] -> milliseconds [N]
OPTIONS = 64  # widths, at most, that an entry may have
PRICES, SWEEPS, RAISED = 40, 12, 6  # tries of a price; rounds over the entries at each; larger widths that an exchange tries


@dataclass
class TimeSearch:
    """Looks for the widths with the least damage among those within a time.

    Args:
        entries: what may be cut.
        names: of the groups, in the order of the widths that ``times`` takes.
        full: their units.
        times: predicts milliseconds.
        damage: of an entry at a share of its units.
        min_channels: fewest channels to keep.
    """

    entries: Sequence[Entry]
    names: Sequence[str]
    full: NDArray[np.float64]
    times: Times
    damage: Damage
    min_channels: int = 1
    options: list[list[int]] = field(init=False)
    harm: list[NDArray[np.float64]] = field(init=False)

    def __post_init__(self) -> None:
        self.options = [_options(entry, self.min_channels) for entry in self.entries]
        self.harm = [np.array([self.damage(i, width / options[-1]) for width in options]) for i, options in enumerate(self.options)]
        place = {name: i for i, name in enumerate(self.names)}
        self.columns = [[place[group.name] for group in entry] for entry in self.entries]
        self.rows = [
            np.array([[entry.widths(width)[group.name] for group in entry] for width in options], dtype=np.float64)
            for entry, options in zip(self.entries, self.options, strict=True)
        ]

    def within(self, limit: float) -> dict[str, int]:
        """Return the widths that do the least damage in at most ``limit`` milliseconds, as far as the search finds them.

        A price of time is sought at which the best widths, entry by entry until none changes, just keep the limit; then single
        entries grow where there is room, and pairs exchange.

        Raises:
            UserError: even the least widths take longer.
        """
        least = [int(np.argmin(self._times_of(i, [0] * len(self.entries)))) for i in range(len(self.entries))]
        if (fastest := self._time(least)) > limit:
            dense = float(self.times(self.full[None])[0])
            raise UserError(
                f"a latency of {limit:.4g} ms can't be reached: at the least widths the network is predicted to take "
                f"{fastest:.4g} ms of {dense:.4g} ({fastest / dense:.2f})"
            )
        whole = [len(options) - 1 for options in self.options]
        if self._time(whole) <= limit:
            return self._widths(whole)
        best, low, high, chosen = least, 0.0, math.inf, whole
        price = sum(harm[0] for harm in self.harm) / max(self._time(whole) - fastest, 1e-9)
        for _ in range(PRICES):
            chosen = self._settle(list(chosen), price)
            if self._time(chosen) <= limit:
                best, high = min(best, chosen, key=self._harm), price
            else:
                low = price
            price = price * 4 if math.isinf(high) else (low + high) / 2 if low else high / 4
            if high - low < 1e-4 * high:
                break
        return self._widths(self._exchange(self._grow(list(best), limit), limit))

    def _settle(self, chosen: list[int], price: float) -> list[int]:
        """Choose the width of each entry by damage and price, given the others', until none changes."""
        for _ in range(SWEEPS):
            before = list(chosen)
            for i, harm in enumerate(self.harm):
                chosen[i] = int(np.argmin(harm + price * self._times_of(i, chosen)))
            if chosen == before:
                break
        return chosen

    def _grow(self, chosen: list[int], limit: float) -> list[int]:
        """Widen single entries, each time where the most damage goes, while the limit allows."""
        while True:
            gains = []
            for i, harm in enumerate(self.harm):
                allowed = np.where(self._times_of(i, chosen) <= limit, harm, np.inf)
                to = int(np.argmin(allowed))
                gains.append((harm[chosen[i]] - allowed[to], i, to))
            gain, i, to = max(gains)
            if not gain > 0:
                return chosen
            chosen[i] = to

    def _exchange(self, chosen: list[int], limit: float) -> list[int]:
        """Widen an entry and narrow another where that does less damage within the limit, until no pair does."""
        improved = True
        while improved:
            improved = False
            for i in range(len(chosen)):
                for to in range(chosen[i] + 1, min(chosen[i] + 1 + RAISED, len(self.options[i]))):
                    tried = [*chosen[:i], to, *chosen[i + 1 :]]
                    now, best = self._harm(chosen), None
                    for j in (j for j in range(len(chosen)) if j != i and chosen[j]):
                        harm = np.where(self._times_of(j, tried) <= limit, self.harm[j], np.inf)
                        at = int(np.argmin(harm))
                        total = self._harm(tried) - self.harm[j][tried[j]] + harm[at]
                        if total < now * (1 - 1e-6):
                            now, best = total, (j, at)
                    if best:
                        chosen, improved = list(tried), True
                        chosen[best[0]] = best[1]
                        break
        return chosen

    def _times_of(self, entry: int, chosen: Sequence[int]) -> NDArray[np.float64]:
        """Return the time at each of an entry's widths, given the others'."""
        widths = np.repeat(self._vector(chosen)[None], len(self.options[entry]), 0)
        widths[:, self.columns[entry]] = self.rows[entry]
        return self.times(widths)

    def _time(self, chosen: Sequence[int]) -> float:
        return float(self.times(self._vector(chosen)[None])[0])

    def _harm(self, chosen: Sequence[int]) -> float:
        return float(sum(harm[at] for harm, at in zip(self.harm, chosen, strict=True)))

    def _vector(self, chosen: Sequence[int]) -> NDArray[np.float64]:
        widths = self.full.copy()
        for columns, rows, at in zip(self.columns, self.rows, chosen, strict=True):
            widths[columns] = rows[at]
        return widths

    def _widths(self, chosen: Sequence[int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry, options, at in zip(self.entries, self.options, chosen, strict=True):
            found |= entry.widths(options[at])
        return found


def _options(entry: Entry, min_channels: int) -> list[int]:
    """Return the units that an entry may keep: every number of them, or of many every few."""
    size, per_unit = entry[0].size, max(entry[0].channels // entry[0].size, 1)
    least = max(math.ceil(min_channels / per_unit), *(len(group.fixed) for group in entry), 1)
    step = max(size // OPTIONS, 1)
    return sorted({size, *(width for width in range(size, 0, -step) if width >= min(least, size))})


def drawn_widths(entries: Sequence[Entry], seed: int) -> Mapping[str, int]:
    """Draw widths for a measurement of times: of all levels, half of them multiples of 8 or 16, which kernels like."""
    rng = np.random.default_rng([seed, 0x7A])
    level, found = rng.uniform(0.2, 1.0), dict[str, int]()
    for entry in entries:
        size, per_unit = entry[0].size, max(entry[0].channels // entry[0].size, 1)
        width = size * min(level * rng.uniform(0.5, 1.5), 1.0)
        block = max(int(rng.choice([1, 1, 8, 16])) // per_unit, 1)
        least = max(1, *(len(group.fixed) for group in entry))
        found |= entry.widths(min(max(round(width / block) * block, least), size))
    return found
