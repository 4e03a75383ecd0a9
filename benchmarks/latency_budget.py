"""Budgets of time: what is predicted, and what the exported files take.

python -m benchmarks.latency_budget --networks resnet50:224 resnet56:32 --runtimes onnxruntime --out FILE

Each network gets budgets of 0.7, 0.5 and 0.35 of the dense network's time. Its widths are searched as prune.py does it, with a damage
that grows with the square of the share that goes, so that no training data is needed: weights are random, and times do not depend on
them. Then both files are exported, run and timed by turns. A budget is kept if the measured ratio is at most the share.

python -m benchmarks.latency_budget --weights DENSE --data FOLDER --runtimes onnxruntime --precisions fp32 --out FILE

With --weights the trained networks are cut by --latency and, with the default rounding, by the --macs that takes as long; both are
measured after refitting on the validation images.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.reporting import benchmark_parser, parse_options, report
from compression.exporting.measuring import noise_images
from compression.latency.runtimes import PRECISIONS, RUNTIMES, cut_copy
from compression.latency.table import compare
from compression.pruning.arguments import PruneArguments
from compression.pruning.frontier import at_share
from compression.pruning.latency_budget import LatencyBudget, budget_of_time, latency_results, shipped_ms, threads_of
from compression.pruning.run import PruningOutcome, PruningRun
from compression.pruning.traced_classifier import load_traced
from compression.pruning.widths import choose_plan
from compression.scoring.calibration import Calibration
from models.networks import build, resolve_model
from utils.errors import UserError
from utils.files.checkpoint import save_checkpoint
from utils.spec import ModelSpec

NETWORKS = ("resnet50:224", "resnet56:32", "yolov5s-cls:64", "yolov5s-cls:224", "mobilenet_v2:224")
SHARES = (0.7, 0.5, 0.35)
CALIBRATED = 32
STEPS, ROUNDS = 7, 9  # of the search for multiply-adds that take as long; of its measurements


def examine(name: str, size: int, runtime: str, precision: str, threads: int, weights: Path) -> list[dict[str, Any]]:
    """Return a row per budget."""
    torch.manual_seed(0)
    spec = ModelSpec(resolve_model(name)[0], 10, size)
    save_checkpoint(weights, {"spec": spec.to_dict(), "state_dict": build(spec).state_dict(), "plan": None})
    calibration = Calibration(noise_images(spec, CALIBRATED, 0), torch.zeros(CALIBRATED, dtype=torch.int64), spec, 16)
    rows = []
    for share in SHARES:
        arguments = PruneArguments(weights=str(weights), latency=share, runtime=runtime, precision=precision, threads=threads)
        classifier = load_traced(arguments)
        units = sum(group.size for entry in classifier.cuttable for group in entry)
        weight = [sum(group.size for group in entry) / units for entry in classifier.cuttable]
        budget = budget_of_time(arguments, classifier, calibration)
        orders = {group.name: range(group.size) for group in classifier.graph.groups}
        row = {"network": f"{name}:{size}", "runtime": runtime, "precision": precision, "share": share, "error": budget.model.error}
        row |= {"dense_ms": budget.dense_ms, "predicted": math.nan, "measured": math.nan, "kept": None, "refused": ""}
        try:
            _, plan = budget.choose(partial(squared, weight), orders, 1, share)
        except UserError as error:
            rows.append({**row, "refused": str(error)})
            continue
        narrow = cut_copy(classifier.model, classifier.graph, plan.kept).eval()
        found = latency_results(budget, arguments, classifier.model, narrow)
        dense_ms, narrow_ms = found["measured_ms"]
        row |= {"dense_ms": dense_ms, "predicted": found["predicted_ms"] / budget.dense_ms, "measured": narrow_ms / dense_ms}
        rows.append({**row, "kept": narrow_ms <= share * dense_ms})
    return rows


def compare_budgets(weights: str, data: str, runtime: str, precision: str, threads: int) -> list[dict[str, Any]]:
    """Return, for each share of the dense time, what is left of a network by a budget of time and by multiply-adds that take as long."""
    setting: dict[str, Any] = {"runtime": runtime, "precision": precision, "threads": threads}
    arguments = PruneArguments(weights=weights, data=data, sweep=SHARES, by="latency", **setting)
    run, rows = PruningRun(arguments), []
    assert run.time is not None
    images = noise_images(run.classifier.spec, 1, 0)
    for share in SHARES:
        timed = run.within(at_share(arguments, share))
        dense_ms, target = timed.results["latency"]["measured_ms"]
        low, high, time, run.time = 0.0, 1.0, run.time, None
        tried: dict[float, float] = {}
        for _ in range(STEPS):  # look for the multiply-adds that take as long
            macs = (low + high) / 2
            try:
                by_macs = replace(at_share(arguments, macs), latency=None, macs=macs)
                _, plan = choose_plan(by_macs, run.classifier, run.scored.orders, None, run.damage)
            except UserError:  # so few can't stay
                low = macs
                continue
            whole, narrow = compare(time.candidates.narrow({}), time.candidates.narrow(plan.kept), images, ROUNDS)
            tried[macs] = narrow / whole
            low, high = (low, macs) if tried[macs] > target / dense_ms else (macs, high)
        macs = max((macs for macs, ratio in tried.items() if ratio <= target / dense_ms), default=min(tried))
        counted, run.time = run.within(replace(at_share(arguments, macs), latency=None, macs=macs)), time
        for by, outcome, ratio in (("latency", timed, target / dense_ms), ("macs", counted, None)):
            ratio = ratio or _ratio(time, run.classifier.model, outcome, threads)
            macs = outcome.results["macs"][1] / outcome.results["macs"][0]
            about = {"network": run.classifier.spec.name, "runtime": runtime, "precision": precision, "share": share, "by": by}
            rows.append({**about, "measured": ratio, "macs": macs, "top1": outcome.after.top1, "loss": outcome.after.loss})
    return rows


def _ratio(time: LatencyBudget, dense: nn.Module, outcome: PruningOutcome, threads: int) -> float:
    narrow = cut_copy(dense, time.candidates.graph, outcome.plan.kept).eval()
    with threads_of(threads):
        whole, part = shipped_ms(time.candidates, dense, narrow, 1)
    return part / whole


def squared(weight: list[float], entry: int, kept: float) -> float:
    """Return the damage that is assumed where an entry keeps a share of its channels."""
    return weight[entry] * (1 - kept) ** 2


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="name:pixels")
    parser.add_argument("--runtimes", nargs="+", default=("onnxruntime", "openvino"), choices=RUNTIMES)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--weights", nargs="*", default=[], help="trained networks, to compare budgets of time and of multiply-adds")
    parser.add_argument("--data", default="", help="their images")
    options = parse_options(parser)
    rows: list[dict[str, Any]] = []
    for weights, runtime, precision in product(options.weights, options.runtimes, options.precisions):
        rows += compare_budgets(weights, options.data, runtime, precision, options.threads)
        report("latency_budget_compared", rows, options.out)
    if options.weights:
        return
    with tempfile.TemporaryDirectory() as folder:
        for network, runtime, precision in product(options.networks, options.runtimes, options.precisions):
            name, _, size = network.partition(":")
            rows += examine(name, int(size), runtime, precision, options.threads, Path(folder) / "dense.pt")
            report("latency_budget", rows, options.out)


if __name__ == "__main__":
    main()
