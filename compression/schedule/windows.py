"""The epochs in which a policy acts: a list, or every so many from one epoch to another."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compression.schedule.pruners.pruner import Moment
from utils.options import Place, integer, listed

KEYS = ("epochs", "starting_epoch", "ending_epoch", "frequency")
FOREVER = 10**6  # epochs that no run reaches


@dataclass(frozen=True)
class Window:
    """The epochs, ascending, in which a policy acts; ``end`` is exclusive."""

    epochs: Sequence[int]
    end: int
    frequency: int = 1

    def applies(self, epoch: int) -> bool:
        """Whether the policy acts in an epoch."""
        return epoch in self.epochs

    @property
    def first(self) -> int:
        """The first epoch."""
        return self.epochs[0]

    @property
    def last(self) -> int:
        """The last epoch in which the policy acts; with a frequency above 1 it may lie before ``end - 1``."""
        return self.epochs[-1]

    def last_within(self, epochs: int) -> int:
        """The last epoch in which the policy acts during a run of ``epochs`` epochs; -1 if there is none."""
        count = bisect.bisect_left(self.epochs, epochs)
        return self.epochs[count - 1] if count else -1

    def moment(self, epoch: int) -> Moment:
        """An epoch of the window, as a pruner sees it."""
        return Moment(epoch, self.first, self.last, self.end, self.frequency)

    def __str__(self) -> str:
        if isinstance(self.epochs, range):
            end = "" if self.end == FOREVER else f"{self.last}"
            return f"epochs {self.first} to {end or 'the end'}" + (f", every {self.frequency}" if self.frequency > 1 else "")
        return f"epochs {', '.join(map(str, self.epochs))}"


def read_window(policy: Mapping[str, Any], place: Place, endless: bool = False) -> Window:
    """Read a policy's window.

    Args:
        policy: its entry in the file.
        place: of the entry.
        endless: whether ``ending_epoch`` may be left out; the window then ends with the run.

    Raises:
        UserError: neither form is complete, both are given, or there is no epoch between start and end.
    """
    given = [key for key in KEYS if key in policy]
    if "epochs" in given:
        if len(given) > 1:
            raise place.error(f"'epochs' and '{given[1]}' exclude each other")
        epochs = sorted(set(listed(integer())(policy["epochs"], place / "epochs")))
        return Window(tuple(epochs), epochs[-1] + 1)
    if "starting_epoch" not in given or ("ending_epoch" not in given and not endless):
        missing = "ending_epoch" if "starting_epoch" in given else "starting_epoch"
        raise place.error(f"'{missing}' is missing; give starting_epoch, ending_epoch (exclusive) and frequency, or epochs: [...]")
    start = integer(0, FOREVER)(policy["starting_epoch"], place / "starting_epoch")
    end = integer(0, FOREVER)(policy["ending_epoch"], place / "ending_epoch") if "ending_epoch" in given else FOREVER
    frequency = integer(1)(policy.get("frequency", 1), place / "frequency")
    if end <= start:
        raise place.error(f"ending_epoch {end} is exclusive, so it must be above starting_epoch {start}")
    return Window(range(start, end, frequency), end, frequency)
