"""Latency of dense networks and of pruned ones with half the multiply-adds, in torch, beside the ratio of multiply-adds.

python -m benchmarks.latency --out FILE

Networks take turns pass by pass, so that noise affects them alike; medians. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import statistics
from copy import deepcopy

import torch

from benchmarks.reporting import benchmark_parser, parse_options, report
from compression.pruning.allocation import Budget, allocate
from compression.pruning.plan import entries_of, make_plan
from compression.tracing.channels import trace
from compression.tracing.costs import macs_cost
from compression.tracing.cutting import apply_cut_, plan_cut
from models.networks import build
from utils.errors import UserError
from utils.measures.profile import count_macs, example_input, measure_latency
from utils.spec import ModelSpec

NETWORKS = {"resnet56": 32, "yolov5n-cls": 224, "yolov5s-cls": 224, "resnet50": 224}
SHARE = 0.5
ROUNDINGS = (1, 8, 16)


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--models", nargs="*", default=list(NETWORKS))
    parser.add_argument("--passes", type=int, default=25)
    options = parse_options(parser)
    rows = []
    for name in options.models:
        spec = ModelSpec(name, 1000 if NETWORKS[name] == 224 else 10, NETWORKS[name])
        dense = build(spec).eval()
        graph, total = trace(dense, example_input(dense, spec)), count_macs(dense, spec)
        entries = entries_of(graph, name)
        models, shares, labels = [dense], [1.0], ["dense"]
        for rounding in ROUNDINGS:
            try:
                widths = allocate(graph, entries, Budget(macs_cost(graph, total), SHARE, "macs"), rounding, 1, None)
            except UserError as error:  # narrow networks may have too few multiples
                print(f"{name}, round-to {rounding}: {error}", flush=True)
                continue
            labels.append(f"round-to {rounding}")
            plan = make_plan(graph, widths, {group.name: range(group.size) for group in graph.groups})
            narrow = deepcopy(dense)
            apply_cut_(narrow, plan_cut(graph, plan.kept))
            models.append(narrow)
            shares.append(count_macs(narrow, spec) / total)
        models = [model.to(memory_format=torch.channels_last) for model in models]
        for batch in (1, 32):
            inputs = torch.randn(batch, 3, *spec.size).to(memory_format=torch.channels_last)
            passes = options.passes * (4 if batch == 1 else 1)
            times = measure_latency(models, inputs, passes)
            for label, taken, share in zip(labels, times, shares, strict=True):
                speed_up = statistics.median(times[0]) / statistics.median(taken)
                quarters = statistics.quantiles(taken, n=4)
                row = {"model": name, "batch": batch, "network": label, "macs": share, "median_ms": statistics.median(taken)}
                row |= {"spread_ms": quarters[2] - quarters[0], "speed_up": speed_up, "of_macs_ratio": speed_up * share}
                rows.append(row)
                print(row, flush=True)
    report("latency", rows, options.out)


if __name__ == "__main__":
    main()
