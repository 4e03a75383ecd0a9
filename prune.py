"""Cut a trained classifier: python prune.py --weights best.pt --data FOLDER --macs 0.5

Channels are scored, the weak ones removed physically, and the cut is proved: the narrow network's output equals that of
the dense network with the same channels masked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compression.pruning.arguments import PruneArguments
from compression.pruning.plan import make_plan
from compression.pruning.report import comparison_text, groups_text, write_files
from compression.pruning.run import run_pruning
from compression.pruning.traced_classifier import check_arguments, default_criterion, fixed_widths, group_rows, load_traced, shown_rates
from compression.scoring.criteria import CRITERIA
from utils import distributed
from utils.arguments import parse, to_record
from utils.errors import run_script
from utils.files.runs import RunDirectory, write_json
from utils.files.yaml_files import write_yaml


def main() -> None:
    a, _ = parse(PruneArguments, "Cut a trained classifier.")
    if a.criterion == "list":
        print("\n".join(f"{name:<18}{criterion.meaning}" for name, criterion in CRITERIA.items()))
    elif a.dry_run and distributed.is_main():
        dry_run(a)
    elif not a.dry_run:
        run(a)


def dry_run(a: PruneArguments) -> None:
    """Print the channel groups and, where they do not depend on scores, the widths."""
    check_arguments(a)
    classifier = load_traced(a)
    widths = fixed_widths(a, classifier)
    print(
        f"{classifier.spec.name} at {classifier.spec.imgsz} px: {classifier.profile.params:,} parameters, "
        f"{classifier.profile.macs:,} multiply-adds"
    )
    print(groups_text(classifier, widths))
    results: dict[str, Any] = {
        "params": [classifier.profile.params, None],
        "macs": [classifier.profile.macs, None],
        **{key: [None, None] for key in ("top1", "latency_ms", "bytes")},
        "max_relative_difference": None,
        "compress_rate": shown_rates(a, classifier, widths or {}),
        "criterion": a.criterion or default_criterion(classifier.model),
        "tied_share": None,
        "rank_seconds": None,
        "groups": group_rows(classifier, widths),
    }
    if widths is not None:
        kept = make_plan(classifier.graph, widths, {group.name: range(group.size) for group in classifier.graph.groups}).kept
        indices = classifier.graph.indices(kept)
        results["macs"][1] = classifier.profile.macs - classifier.graph.macs({}) + classifier.graph.macs(kept, indices)
        results["params"][1] = classifier.graph.params(kept, list(dict(classifier.model.named_parameters())), indices)
        print(f"compress_rate {results['compress_rate']}")
        for name in ("params", "macs"):
            before, after = results[name]
            print(f"{name:<7}{before:>16,} -> {after:,} ({after / before:.1%})")
    if a.json:
        write_json(Path(a.json), results)


def run(a: PruneArguments) -> None:
    """Cut, write the run's files, and print what came of it."""
    outcome = run_pruning(a)
    directory = RunDirectory.create(a.project, a.name, a.exist_ok)
    if not distributed.is_main():
        return
    try:
        write_yaml(directory.path / "opt.yaml", to_record(a))
        checkpoint, results = write_files(directory, outcome), outcome.results
    except OSError:
        directory.discard()
        raise
    for note in outcome.notes:
        print(f"note   {note}")
    print(groups_text(outcome.classifier, {name: len(units) for name, units in outcome.plan.kept.items()}))
    print(f"\n{comparison_text(results)}")
    print(
        f"\nscored by {results['criterion']} in {results['rank_seconds']:.1f} s; {results['tied_share']:.1%} of the channels in cut "
        f"groups tie with another\ncompress_rate {results['compress_rate']}\n"
        f"proved: narrow and masked outputs differ by {results['max_relative_difference']:.1e} of their scale"
    )
    for name, top1 in outcome.controls.items():
        print(f"control {name:<15}top-1 {top1:.2%}")
    print(
        f"results in {directory.path}\n"
        f"next: python train.py --weights {checkpoint} --data {a.data}\n"
        f"      python val.py --weights {checkpoint} --data {a.data}"
    )


if __name__ == "__main__":
    try:
        run_script(main)
    finally:
        distributed.leave()
