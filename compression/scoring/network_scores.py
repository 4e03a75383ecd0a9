"""What scoring a network returns."""

from __future__ import annotations

from dataclasses import dataclass

from compression.scoring.ranks import MapScores
from compression.scoring.scores import GroupScore


@dataclass(frozen=True)
class NetworkScores:
    """Scores of all prunable groups.

    Attributes:
        groups: by name.
        maps: the ranks that were measured, for ``save_ranks``; None where the criterion measures none.
        seconds: that scoring took.
    """

    groups: dict[str, GroupScore]
    maps: MapScores | None = None
    seconds: float = 0.0
