"""The files, tables and pictures of a pruning run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compression.pruning.frontier import frontier_row, sweep
from compression.pruning.run import PruningOutcome, PruningRun
from compression.pruning.traced_classifier import TracedClassifier
from compression.scoring.criteria import CRITERIA
from compression.scoring.ranks import save_ranks
from utils.files.checkpoint import save_checkpoint, write_text
from utils.files.runs import RunDirectory, write_json
from utils.output.plots import plot_frontier, plot_scores, plot_widths


def write_files(directory: RunDirectory, outcome: PruningOutcome) -> Path:
    """Write ranks/, plan.json, weights/pruned.pt, the pictures, channels.csv and results.json; return the checkpoint's path."""
    folder, classifier, groups = directory.path, outcome.classifier, outcome.scored.groups
    checkpoint = directory.weights / "pruned.pt"
    save_checkpoint(checkpoint, outcome.checkpoint)
    if outcome.scored.maps is not None:
        save_ranks(folder / "ranks", classifier.spec.name, classifier.graph, outcome.scored.maps)
    write_json(folder / "plan.json", {**outcome.plan.to_dict(), "digest": outcome.plan.digest()})
    panels, lines = [], ["group,index,channel,score,place,kept"]
    numbers = {row["name"]: row["index"] for row in outcome.results["groups"]}
    for group in classifier.graph.prunable:
        kept = set(outcome.plan.kept.get(group.name, range(group.size)))
        found = groups[group.name]
        values, order = found.values.tolist(), found.order.tolist()
        place = {unit: i for i, unit in enumerate(order)}
        panels.append((group.name, values, [unit in kept for unit in range(group.size)]))
        index = "" if numbers[group.name] is None else numbers[group.name]
        lines += [f"{group.name},{index},{unit},{values[unit]:.6g},{place[unit]},{int(unit in kept)}" for unit in range(group.size)]
    write_text(folder / "channels.csv", "\n".join(lines) + "\n")
    criterion = outcome.results["criterion"]
    plot_scores(panels, f"{criterion}: {CRITERIA[criterion].meaning}", folder / "ranks.png")
    rows = [row for row in outcome.results["groups"] if row["prunable"] or row["kept"] < row["channels"]]
    plot_widths([r["name"] for r in rows], [r["channels"] for r in rows], [r["kept"] for r in rows], folder / "widths.png")
    write_json(folder / "results.json", outcome.results)
    return checkpoint


def write_sweep(directory: RunDirectory, run: PruningRun) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Cut to each share of a sweep and write a checkpoint for each, frontier.csv, frontier.png and results.json as they come.

    Returns:
        The dense network's row, and those of the others.
    """
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    for share, outcome in sweep(run):
        checkpoint, results = directory.weights / f"pruned-{share:g}.pt", outcome.results
        save_checkpoint(checkpoint, outcome.checkpoint)
        rows.append(frontier_row(share, outcome, str(checkpoint)))
        ms = results["latency"]["measured_ms"][0] if "latency" in results else results["latency_ms"][0]
        before = {**{name: results[name][0] for name in ("macs", "params", "top1", "bytes")}, "latency_ms": ms}
        runs.append(results)
        write_json(directory.path / "results.json", {"by": run.arguments.by, "dense": before, "frontier": rows, "runs": runs})
        columns = list(rows[0])
        table = [",".join(columns), *(",".join(str(row[column]) for column in columns) for row in rows)]
        write_text(directory.path / "frontier.csv", "\n".join(table) + "\n")
    plot_frontier(before, rows, directory.path / "frontier.png")
    return before, rows


def groups_text(classifier: TracedClassifier, widths: Mapping[str, int] | None) -> str:
    """Return the numbered table of the channel groups."""
    total = max(classifier.profile.macs, 1)
    lines = [f"{'entry':>5}  {'channels':>8}  {'kept':>5}  {'MACs':>6}  group (also in it)"]
    for group, row in zip(classifier.graph.groups, classifier.group_rows(widths), strict=True):
        others = [name for name in group.makers if name != group.name]
        members = f" (+ {', '.join(others[:3])}{f', {len(others) - 3} more' if len(others) > 3 else ''})" if others else ""
        wide = group.channels // group.size
        unit = f" [{group.size} times {wide}]" if wide > 1 else ""
        note = "" if row["prunable"] else f"  - stays: {row['reason']}"
        number = "-" if row["index"] is None else str(row["index"])
        lines.append(f"{number:>5}  {row['channels']:>8}  {row['kept']:>5}  {group.macs / total:>6.1%}  {group.name}{unit}{members}{note}")
    lines += [
        f"{'-':>5}  {'':>8}  {'':>5}  {'':>6}  {name or 'the network'}  - stays: {reason}"
        for name, reason in classifier.graph.record.unfollowed.items()
    ]
    count = len(classifier.entries)
    lines.append(
        f"compress_rate takes {count} entries here; groups marked - have none. MACs: share of the multiply-adds that "
        "make or read the group's channels (they add up to more than all)"
    )
    return "\n".join(lines)


def comparison_text(results: Mapping[str, Any]) -> str:
    """Return the table of before and after."""
    rows = (
        ("parameters", "params", lambda v: f"{v:,}"),
        ("multiply-adds", "macs", lambda v: f"{v:,}"),
        (_accuracy(results), "top1", lambda v: f"{v:.2%}"),
        ("latency, batch 1, ms", "latency_ms", lambda v: f"{v:.2f}"),
        ("bytes", "bytes", lambda v: f"{v:,}"),
    )
    lines = [f"{'':<22}{'before':>16}{'after':>16}{'ratio':>8}"]
    for title, key, show in rows:
        before, after = results[key]
        lines.append(f"{title:<22}{show(before):>16}{show(after):>16}{after / max(before, 1e-12):>8.2f}")
    return "\n".join(lines)


def latency_text(latency: Mapping[str, Any]) -> str:
    """Return what a budget of time came to: asked, predicted and measured."""
    dense, narrow = latency["measured_ms"]
    where = f"{latency['runtime']} {latency['precision']}, {latency['threads']} threads, batch {latency['batch']}"
    kept = f"budget {latency['budget_ms']:.3f} ms, predicted {latency['predicted_ms']:.3f} ms"
    if narrow is None:
        return f"latency in {where}: {kept}; not measured here, as the table is another machine's"
    over = "" if narrow <= latency["budget_ms"] else " (OVER)"
    return f"latency in {where}: {kept}, measured {narrow:.3f} ms{over}, dense {dense:.3f} ms ({narrow / dense:.2f})"


def _accuracy(results: Mapping[str, Any]) -> str:
    return "top-1 (val)" if results["labels"] == "data set" else "agreement (val)"


def steps_text(results: Mapping[str, Any]) -> str:
    """Return the accuracy after each step of the run: the cut, the refit, batch norm measured again."""
    lines = [f"{'step':<22}{_accuracy(results):>16}{'seconds':>16}", f"{'dense':<22}{results['top1'][0]:>16.2%}{'':>16}"]
    lines += [f"{step['name']:<22}{step['top1']:>16.2%}{step['seconds']:>16.1f}" for step in results["steps"]]
    return "\n".join(line.rstrip() for line in lines)
