"""Test accuracy of a network that is cut and not trained: as cut, with batch norm measured again, refitted, and both.

python -m benchmarks.cost_accuracy --data FOLDER --weights CHECKPOINT --imgsz 32 --out FILE

The images to score and refit on come from train, without their labels. Nothing is selected on test: what prune.py would keep is
the row's "kept". Cases that the file of --out has already are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.reporting import benchmark_parser, parse_options, report
from compression.pruning.arguments import PruneArguments
from compression.pruning.recalibration import recalibrate_
from compression.pruning.recovery import Recovery, recover_
from compression.pruning.surgery import shrink_
from compression.pruning.traced_classifier import TracedClassifier, load_traced
from compression.pruning.widths import choose_plan, widths_before_scoring
from compression.scoring.calibration import Calibration, sample
from compression.scoring.criteria import score
from utils.data.datasets import load_data
from utils.data.splits import ImageData

KEY = ("network", "macs_budget", "criterion", "allocation", "seed")


@torch.no_grad()
def top1(model: nn.Module, images: Calibration) -> float:
    """Measure the accuracy in eval mode."""
    model.eval()
    right = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in images.batches())
    return right / len(images)


def recalibrated(model: nn.Module, images: Calibration) -> nn.Module:
    """Return a copy with batch norm's statistics measured on the images."""
    copy = deepcopy(model)
    recalibrate_(copy, images)
    return copy


def measure_case(classifier: TracedClassifier, arguments: PruneArguments, data: ImageData, test: Calibration) -> dict[str, Any]:
    """Cut and recover a network in one way, and measure every step on the test images."""
    model, graph, begin = classifier.model, classifier.graph, time.perf_counter()
    images = sample(data.split("train"), classifier.spec, arguments.images, arguments.batch_size, arguments.seed)
    widths = widths_before_scoring(arguments, classifier)
    scored = score(arguments.criterion, model, graph, images, arguments.seed, widths)
    _, plan = choose_plan(arguments, classifier, images, scored, widths)
    planned = time.perf_counter()
    narrow = deepcopy(model)
    shrink_(narrow, graph, plan.kept, next(images.head(8).batches())[0])
    row = {"cut": top1(narrow, test), "cut_recalibrated": top1(recalibrated(narrow, images), test)}
    begin_refit = time.perf_counter()
    kept, refitted = "cut", narrow
    for step, _ in recover_(narrow, model, graph, plan.kept, images, Recovery(seed=arguments.seed)):
        kept = step
        refitted = deepcopy(narrow) if step == "refitted" else refitted
    refit_seconds = time.perf_counter() - begin_refit
    row |= {"refitted": top1(refitted, test), "refitted_recalibrated": top1(recalibrated(refitted, images), test)}
    return {
        "macs": graph.macs(plan.kept) / graph.macs({}),
        **row,
        "kept": kept,
        "prune_seconds": round(planned - begin, 1),
        "refit_seconds": round(refit_seconds, 1),
    }


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", required=True, help="folder with train/ and test/")
    parser.add_argument("--weights", nargs="+", required=True, help="trained dense networks")
    parser.add_argument("--imgsz", type=int, default=None, help="for weights that do not say it")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.3], help="shares of the multiply-adds")
    parser.add_argument("--criteria", nargs="+", default=["l1", "taylor", "rank", "random"])
    parser.add_argument("--allocations", nargs="+", default=["uniform", "sensitivity"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--test-images", type=int, default=10_000)
    options = parse_options(parser)
    data = load_data(options.data, download=False)
    out = Path(options.out)
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"] if options.out and out.exists() else []
    for weights in options.weights:
        rows += measure_network(weights, options, data, rows)
    report("cost_accuracy", rows, options.out)


def measure_network(weights: str, options: argparse.Namespace, data: ImageData, done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each case of a network that is not done yet; the file of --out grows with each."""
    classifier = load_traced(PruneArguments(weights=weights, imgsz=options.imgsz))
    test = sample(data.split("test"), classifier.spec, options.test_images, 250, 0)
    dense, rows = top1(classifier.model, test), []
    cases = itertools.product(options.budgets, options.allocations, options.criteria, options.seeds)
    for budget, allocation, criterion, seed in cases:
        case = dict(zip(KEY, (classifier.spec.name, budget, criterion, allocation, seed), strict=True))
        if any(all(row[key] == value for key, value in case.items()) for row in done):
            continue
        arguments = PruneArguments(
            weights=weights, macs=budget, round_to=1, criterion=criterion, allocation=allocation, seed=seed, images=options.images
        )
        rows.append({**case, "dense": dense, **measure_case(classifier, arguments, data, test)})
        report("cost_accuracy", [*done, *rows], options.out)
    return rows


if __name__ == "__main__":
    main()
