"""A schedule that was read and checked: which policies act, and when."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from compression.schedule.windows import Window


@dataclass(frozen=True)
class PolicyEntry:
    """One policy of the file: which instance acts when, with which options."""

    kind: str
    name: str
    class_name: str
    instance: Any
    window: Window
    options: Any = None


@dataclass
class Schedule:
    """A checked schedule.

    Attributes:
        source: the file, for messages.
        entries: policies in the order in which they act: that of the file, learning rates last.
        matches: place in the file -> parameters that the pattern there matched.
        unused: instances that no policy uses.
        notes: what is odd in the file and does no harm.
    """

    source: str = ""
    entries: list[PolicyEntry] = field(default_factory=list)
    matches: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entries = sorted(self.entries, key=lambda entry: entry.kind == "lr_scheduler")

    def of(self, *kinds: str) -> list[PolicyEntry]:
        """Return the policies of some kinds."""
        return [entry for entry in self.entries if entry.kind in kinds]

    def with_entry(self, entry: PolicyEntry) -> Schedule:
        """Return this schedule with one more policy."""
        return replace(self, entries=[*self.entries, entry])

    def describe(self) -> list[str]:
        """Return lines that say what acts when, and which parameters each pattern matched."""
        lines = [f"{entry.kind} {entry.name}: {entry.class_name}, {entry.window}" for entry in self.entries]
        for path, names in self.matches.items():
            few = ", ".join(names[:3]) + (f" ... {names[-1]} ({len(names)})" if len(names) > 3 else "")
            lines.append(f"{path} -> {few or 'nothing that another entry leaves'}")
        return [*lines, *(f"{name} is described, but no policy uses it" for name in self.unused)]
