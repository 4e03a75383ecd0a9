"""Prune a trained classifier: python prune.py --weights best.pt --data FOLDER --macs 0.5

Scores the channels, physically removes the weakest, and proves the cut: the narrow network's output equals that of the
dense network with the same channels masked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compression.pruning.arguments import PruneArguments, check_arguments
from compression.pruning.frontier import frontier_text, outcome_of, tolerance_text
from compression.pruning.plan import make_plan
from compression.pruning.report import comparison_text, groups_text, latency_text, steps_text, write_files, write_sweep
from compression.pruning.run import PruningRun, criterion_of
from compression.pruning.traced_classifier import load_traced
from compression.pruning.widths import compress_rate_of, widths_before_scoring
from compression.scoring.criteria import CRITERIA
from utils import distributed
from utils.arguments import parse, to_record
from utils.errors import UserError, run_script
from utils.files.runs import RunDirectory, check_place, write_json
from utils.files.yaml_files import write_yaml
from utils.output.commands import command


def main() -> None:
    arguments, _ = parse(PruneArguments, __doc__)
    if arguments.criterion == "list":
        print("\n".join(f"{name:<18}{criterion.meaning}" for name, criterion in CRITERIA.items()))
        return
    check_place(arguments.project, arguments.name)
    if arguments.dry_run and distributed.is_main():
        dry_run(arguments)
    elif arguments.sweep:
        prune_to_each(arguments)
    elif not arguments.dry_run:
        prune(arguments)


def dry_run(arguments: PruneArguments) -> None:
    """Print the channel groups and, unless they depend on scores, the widths and the cost after the cut."""
    check_arguments(arguments)
    classifier = load_traced(arguments)
    graph, before, spec = classifier.graph, classifier.profile, classifier.spec
    widths = widths_before_scoring(arguments, classifier)
    for note in classifier.loaded.notes:
        print(f"note   {note}")
    print(f"{spec.name} at {spec.size_text}: {before.params:,} parameters, {before.macs:,} multiply-adds")
    print(groups_text(classifier, widths))
    results: dict[str, Any] = {
        "params": [before.params, None],
        "macs": [before.macs, None],
        **{key: [None, None] for key in ("top1", "latency_ms", "bytes")},
        "labels": None,
        "max_relative_difference": None,
        "compress_rate": compress_rate_of(arguments, classifier, widths or {}),
        "criterion": criterion_of(arguments, classifier.model),
        "tied_share": None,
        "rank_seconds": None,
        "groups": classifier.group_rows(widths),
        "steps": [],
    }
    if widths is not None:
        kept = make_plan(graph, widths, {group.name: range(group.size) for group in graph.groups}).kept
        results["macs"][1] = before.macs - graph.macs({}) + graph.macs(kept)
        results["params"][1] = graph.params(kept, list(dict(classifier.model.named_parameters())))
        if not (arguments.compress_rate or arguments.allocation):
            print("widths are spread evenly here; without --dry-run they are measured: less goes where it costs more")
        print(f"compress_rate {results['compress_rate']}")
        for name in ("params", "macs"):
            dense, narrow = results[name]
            print(f"{name:<7}{dense:>16,} -> {narrow:,} ({narrow / dense:.1%})")
    if arguments.json:
        write_json(Path(arguments.json), results)


def prune_to_each(arguments: PruneArguments) -> None:
    """Prune to each share of --sweep, write a checkpoint for each, and print the table."""
    run = PruningRun(arguments)
    directory = RunDirectory.create(arguments.project, arguments.name, arguments.exist_ok)
    try:
        write_yaml(directory.path / "opt.yaml", to_record(arguments))
        before, rows = write_sweep(directory, run)
    except (OSError, UserError):
        directory.discard()
        raise
    for note in run.dense.notes:
        print(f"note   {note}")
    print(f"\n{frontier_text(before, rows, arguments.by)}\n\nresults in {directory.path}")
    print(f"next: {command('train', weights=rows[-1]['weights'], data=arguments.data)}")


def prune(arguments: PruneArguments) -> None:
    """Prune, write the run's files, and print the results."""
    run = PruningRun(arguments)
    outcome = outcome_of(run)
    directory = RunDirectory.create(arguments.project, arguments.name, arguments.exist_ok)
    if not distributed.is_main():
        return
    try:
        write_yaml(directory.path / "opt.yaml", to_record(arguments))
        checkpoint, results = write_files(directory, outcome), outcome.results
    except OSError:
        directory.discard()
        raise
    for note in outcome.notes:
        print(f"note   {note}")
    print(groups_text(outcome.classifier, {name: len(units) for name, units in outcome.plan.kept.items()}))
    print(f"\n{comparison_text(results)}\n\n{steps_text(results)}")
    print(
        f"\nscored by {results['criterion']} in {results['rank_seconds']:.1f} s; {results['tied_share']:.1%} of the channels in cut "
        f"groups tie with another\ncompress_rate {results['compress_rate']}\n"
        f"proved: narrow and masked outputs differ by {results['max_relative_difference']:.1e} of their scale"
    )
    if "tolerance" in results:
        print(f"\n{tolerance_text(results['tolerance'], run.before.images)}")
    if "latency" in results:
        print(latency_text(results["latency"]))
    for name, top1 in results["controls"].items():
        print(f"control {name:<15}top-1 {top1:.2%}")
    data = arguments.data if results["labels"] == "data set" else "FOLDER"
    print(
        f"results in {directory.path}\n"
        f"next: {command('train', weights=checkpoint, data=data)}\n"
        f"      {command('val', weights=checkpoint, data=data)}"
    )


if __name__ == "__main__":
    try:
        run_script(main)
    finally:
        distributed.leave()
