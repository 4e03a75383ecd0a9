"""Several budgets of one network: a sweep over shares, and the cheapest network that loses no more than is tolerated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from compression.pruning.arguments import PruneArguments
from compression.pruning.run import PruningOutcome, PruningRun
from utils.errors import UserError
from utils.measures.significance import PairedDifference

STEPS = 7  # shares that are tried: the last two are a hundredth apart


def at_share(arguments: PruneArguments, share: float) -> PruneArguments:
    """Return the arguments of a run with a share of what --by names as its budget."""
    amounts: dict[str, Any] = {"macs": None, "params": None, "latency": None} | {arguments.by: share}
    return replace(arguments, **amounts, sweep=(), max_drop=None)


def sweep(run: PruningRun) -> Iterator[tuple[float, PruningOutcome]]:
    """Yield each share of --sweep with what is cut to it; scores and damage are measured once for all."""
    for share in run.arguments.sweep:
        yield share, run.within(at_share(run.arguments, share))


def frontier_row(share: float, outcome: PruningOutcome, weights: str) -> dict[str, Any]:
    """Return a row of results.json's "frontier"."""
    results = outcome.results
    ms = results["latency"]["measured_ms"][1] if "latency" in results else results["latency_ms"][1]
    amounts = {name: results[name][1] for name in ("macs", "params", "top1")}
    return {"share": share, **amounts, "latency_ms": ms, "bytes": results["bytes"][1], "weights": weights}


def within_drop(run: PruningRun) -> PruningOutcome:
    """Look by bisection for the smallest share at which top-1 on the validation split falls by no more than --max-drop.

    Raises:
        UserError: every cut loses more.
    """
    arguments, best, tried = run.arguments, None, list[dict[str, float]]()
    assert arguments.max_drop is not None
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        share = (low + high) / 2
        try:
            outcome = run.within(at_share(arguments, share))
        except UserError:  # so little can't stay
            low = share
            continue
        drop = drop_of(run, outcome)
        tried.append({"share": share, "top1": outcome.after.top1, "drop": drop.drop, "standard_error": drop.standard_error})
        if drop.drop <= arguments.max_drop + 1e-9:
            best, high = outcome, share
        else:
            low = share
    if best is None:
        least = min(tried, key=lambda row: row["drop"], default=None)
        lost = f"{least['share']:.1%} of the {arguments.by} lose {least['drop']:.2%}" if least else "nothing can be cut"
        raise UserError(f"max-drop {arguments.max_drop:g} can't be kept: {lost} of top-1 on {run.before.images} validation images")
    best.results["tolerance"] = {"max_drop": arguments.max_drop, "by": arguments.by, "tried": tried}
    return best


def outcome_of(run: PruningRun) -> PruningOutcome:
    """Return the one cut that a run's arguments ask for.

    Raises:
        UserError: they ask for several.
    """
    if run.arguments.sweep:
        raise UserError("sweep makes several networks; prune.py writes a file of each, and in Python a loop over macs does")
    return run.within(run.arguments) if run.arguments.max_drop is None else within_drop(run)


def prune_once(arguments: PruneArguments) -> PruningOutcome:
    """Load, score and cut; nothing is written. See ``outcome_of``."""
    return outcome_of(PruningRun(arguments))


def drop_of(run: PruningRun, outcome: PruningOutcome) -> PairedDifference:
    """Return what a cut network loses against the dense one on the same images."""
    before, after = run.before.correct, outcome.after.correct
    assert before is not None
    assert after is not None, "refused on several processes"
    return PairedDifference.of(before, after)


def frontier_text(before: dict[str, Any], rows: list[dict[str, Any]], by: str) -> str:
    """Return the table of a sweep."""
    lines = [f"{'share of ' + by:>16}{'multiply-adds':>16}{'parameters':>14}{'top-1 (val)':>13}{'latency, ms':>13}{'bytes':>13}"]
    for row in [{"share": 1.0, **before}, *rows]:
        amounts = f"{row['macs']:>16,}{row['params']:>14,}{row['top1']:>13.2%}"
        lines += [f"{row['share']:>16.2f}{amounts}{row['latency_ms'] or 0:>13.3f}{row['bytes']:>13,}"]
    return "\n".join(lines)


def tolerance_text(tolerance: dict[str, Any], images: int) -> str:
    """Return what was tried for a tolerated loss."""
    lines = [f"{'share of ' + tolerance['by']:>18}{'top-1 (val)':>14}{'loses':>10}{'standard error':>17}"]
    lines += [
        f"{row['share']:>18.3f}{row['top1']:>14.2%}{row['drop']:>10.2%}{row['standard_error']:>17.2%}"
        for row in sorted(tolerance["tried"], key=lambda row: -row["share"])
    ]
    return "\n".join([*lines, f"the cheapest that loses at most {tolerance['max_drop']:.2%} on {images} validation images is kept"])
