"""What a schedule will do, epoch by epoch, known before training."""

from __future__ import annotations

from collections.abc import Sequence

from compression.schedule.learning_rates import Plateau
from compression.schedule.schedule import Schedule


def timeline(schedule: Schedule, epochs: int, lr0: float, fallback: Sequence[float] | None = None) -> str:
    """Return a table of the active policies, the target sparsity of each pruner, and the learning rate by epoch.

    Consecutive epochs with the same policies and targets form one row, with their first and last learning rate.

    Args:
        schedule: a checked schedule.
        epochs: of the run.
        lr0: the initial learning rate.
        fallback: rates by epoch if no policy sets them.
    """
    rates = rates_by_epoch(schedule, epochs, lr0, fallback)
    rows: list[tuple[int, int, str]] = []
    for epoch in range(epochs):
        text = ", ".join(_active(schedule, epoch)) or "-"
        if rows and rows[-1][2] == text:
            rows[-1] = (rows[-1][0], epoch, text)
        else:
            rows.append((epoch, epoch, text))
    lines = [f"{'epochs':>11}  {'learning rate':>22}  active (target sparsity)"]
    for first, last, text in rows:
        span = f"{first}" if first == last else f"{first} to {last}"
        known = [rate for rate in (rates[first], rates[last]) if rate is not None]
        rate = " to ".join(dict.fromkeys(f"{value:.4g}" for value in known)) or "by validation"
        lines.append(f"{span:>11}  {rate:>22}  {text}")
    return "\n".join(lines)


def _active(schedule: Schedule, epoch: int) -> list[str]:
    found = []
    for entry in schedule.entries:
        if not entry.window.applies(epoch):
            continue
        target = entry.instance.target(entry.window.moment(epoch)) if entry.kind == "pruner" else None
        found.append(entry.name if target is None else f"{entry.name} ({target:.1%})")
    return found


def rates_by_epoch(schedule: Schedule, epochs: int, lr0: float, fallback: Sequence[float] | None = None) -> list[float | None]:
    """Return the learning rate of each epoch; None if it depends on the validation."""
    entries = schedule.of("lr_scheduler")
    if not entries:
        return list(fallback[:epochs]) if fallback else [lr0] * epochs
    rates: list[float | None] = [lr0]
    tables = {entry.name: entry.instance.of([lr0], epochs) for entry in entries}
    for entry in entries:  # LinearLR and OneCycleLR do not begin at lr0
        table = tables[entry.name]
        if entry.window.applies(0) and not isinstance(table, Plateau):
            rates[0] = table[0][0]
    for epoch in range(epochs - 1):
        rate = rates[-1]
        for entry in entries:
            if entry.window.applies(epoch):
                table = tables[entry.name]
                rate = None if isinstance(table, Plateau) else table[epoch + 1][0]
        rates.append(rate)
    return rates


def warnings(schedule: Schedule, epochs: int) -> list[str]:
    """Return a line for each policy that a run of ``epochs`` epochs cuts short, or whose effect may surprise."""
    lines = [f"warning: {note}" for note in schedule.notes]
    late = {"pruner": "reaches its target in", "extension": "removes for the last time in"}
    for entry in schedule.entries:
        first, last = entry.window.first, entry.window.last
        if first >= epochs:
            lines.append(f"warning: {entry.name} begins in epoch {first}; the run ends in epoch {epochs - 1}")
        elif last >= epochs and entry.kind in late and not getattr(entry.options, "discard_masks_at_minibatch_end", False):
            lines.append(f"warning: {entry.name} {late[entry.kind]} epoch {last}; the run ends in epoch {epochs - 1}")
    for cut in schedule.of("extension"):
        lines += [
            f"warning: {cut.name} removes in epoch {cut.window.first}, but {entry.name} prunes until {entry.window.last}: "
            "from then on its sparsity counts from what is left"
            for entry in schedule.of("pruner")
            if entry.window.first <= cut.window.first < entry.window.last
        ]
    return lines
