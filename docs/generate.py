"""Renew the parts of the docs that are computed: python -m docs.generate

A part stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``. Flags come from the scripts' arguments, measured figures from
benchmarks/*.json, channel numbers from a trace. The tests hold every part equal to what is computed.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import predict
import val
from compression.exporting.arguments import ExportArguments
from compression.pruning.arguments import PruneArguments
from compression.training.arguments import TrainArguments
from compression.training.recipes import RECIPES, Recipe
from docs.four_layers import KEEP, Step, dense_steps, four_layers, graph_of, shrunk_network, shrunk_steps
from utils.arguments import flag_table, spellings_of

HERE = Path(__file__).resolve().parent
SCRIPTS: dict[str, type[Any]] = {
    "train.py": TrainArguments,
    "prune.py": PruneArguments,
    "export.py": ExportArguments,
    "val.py": val.ValArguments,
    "predict.py": predict.PredictArguments,
}
RUNTIMES = {"torch": "torch, eager", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def flags() -> str:
    """Return the flags of each script, a table per group."""
    return flag_table(SCRIPTS)


def deployment(network: str) -> str:
    """Return a network's forms, dense and pruned, in each runtime."""
    rows = [row for row in _rows("deploy") if row["network"] == network]
    trained = rows[0]["top1"] is not None
    head = ["network", "runtime", "precision", *(["test top-1"] if trained else []), "batch 1", "batch 8", "size"]
    return _table(
        head,
        (
            [
                f"{row['step'].removesuffix(' + int8')}, {row['macs'] / 1e6:,.1f} M multiply-adds",
                RUNTIMES[row["runtime"].split()[0]],
                row["precision"],
                *([_percent(row["top1"])] if trained else []),
                *(f"{row[f'latency_ms_batch{n}']:.2f} ms ({row[f'speed_up_batch{n}']:.1f}x)" for n in (1, 8)),
                f"{row['bytes'] / 1e6:.2f} MB",
            ]
            for row in rows
        ),
    )


def accuracy_after_pruning() -> str:
    """Return the accuracy of each network and criterion: dense, after the cut, fine-tuned."""
    rows = (
        [
            row["network"],
            f"{row['macs']:.1%}",
            row["criterion"],
            *(_percent(row[f"{when}_test_top1"]) for when in ("dense", "cut", "tuned")),
        ]
        for row in _rows("cifar10")
    )
    return _table(["network", "multiply-adds left", "criterion", "dense", "after the cut", "fine-tuned"], rows)


def latency() -> str:
    """Return the latency of dense and pruned networks in eager torch."""
    rows = (
        [row["model"], row["batch"], row["network"], f"{row['macs']:.1%}", f"{row['median_ms']:.1f} ms", f"{row['speed_up']:.2f}x"]
        for row in _rows("latency")
    )
    return _table(["network", "batch", "widths", "multiply-adds", "median", "speed-up"], rows)


def latency_budgets() -> str:
    """Return what budgets of time come to: predicted and measured."""
    rows = (
        [
            *(str(row[key]) for key in ("network", "runtime", "precision")),
            f"{row['share']:.0%}",
            "-" if row["refused"] else f"{row['predicted']:.1%}",
            row["refused"].rpartition("predicted to take ")[2] or f"{row['measured']:.1%}",
        ]
        for row in _rows("latency_budget")
    )
    return _table(["network", "runtime", "precision", "budget", "predicted", "measured"], rows)


def latency_compared() -> str:
    """Return networks that were cut by a time, and by the multiply-adds that take as long."""
    rows = (
        [
            *(str(row[key]) for key in ("network", "runtime", "precision")),
            f"{row['share']:.0%}",
            row["by"],
            *(f"{row[key]:.1%}" for key in ("measured", "macs", "top1")),
            f"{row['loss']:.3f}",
        ]
        for row in _rows("latency_budget_compared")
    )
    head = ["network", "runtime", "precision", "budget", "cut by", "time measured", "multiply-adds", "top-1 (val)", "loss (val)"]
    return _table(head, rows)


def operations() -> str:
    """Return every operation of the four layers with its channel numbers, whole and cut."""
    rows = (
        [step.name, " x ".join(map(str, step.shape)), _numbers(step), " x ".join(map(str, cut.shape)), _numbers(cut)]
        for step, cut in zip(dense_steps(), shrunk_steps(), strict=True)
    )
    return _table(["operation", "shape", "channel numbers", "shape after the cut", "numbers after the cut"], rows)


def groups() -> str:
    """Return the channel groups of the four layers."""
    rows = (
        [
            f"`{group.name}`",
            group.size,
            *(", ".join(f"`{m.tensor}` dim {m.dim}" for m in group.members if m.role == role) or "-" for role in ROLES),
            group.reason or "yes",
        ]
        for group in graph_of(four_layers()).groups
    )
    return _table(["group", "units", "made by", "followed by", "read by", "can it be cut?"], rows)


ROLES = ("producer", "follower", "reader")


def leftovers() -> str:
    """Return what the cut leaves of each tensor of the four layers."""
    shrunk, dense, graph = shrunk_network()
    before, after = dense.state_dict(), shrunk.state_dict()
    kept = graph.indices(KEEP)
    rows = (
        [
            f"`{name}`",
            " x ".join(map(str, before[name].shape)),
            "; ".join(f"dim {dim}: {', '.join(map(str, index.tolist()))}" for dim, index in sorted(kept.get(name, {}).items())) or "all",
            " x ".join(map(str, after[name].shape)),
        ]
        for name in before
    )
    return _table(["tensor", "shape", "kept positions", "shape after the cut"], rows)


def recipes() -> str:
    """Return what each recipe sets, a row per flag."""
    rows = (
        [f"`{spellings_of(field.name)[0]}`", *(_setting(getattr(recipe, field.name)) for recipe in RECIPES.values())]
        for field in dataclasses.fields(Recipe)
    )
    return _table(["", *(f"`{name}`" for name in RECIPES)], rows)


def _setting(value: Any) -> str:
    return {"": "by size", True: "on", False: "off"}.get(value, f"{value}") if isinstance(value, str | bool) else f"{value:g}"


def cost_accuracy() -> str:
    """Return the test accuracy of each network, budget and method after 0, 1 and 6 epochs: mean and standard deviation over seeds."""
    cells: dict[tuple[str, float, str], dict[int, list[float]]] = {}
    for row in _rows("cost_accuracy"):
        found = cells.setdefault((row["network"], row["budget"], row["method"]), {})
        found.setdefault(row["epochs"], []).append(row["test_top1"])
    epochs = sorted({count for found in cells.values() for count in found})
    rows = (
        [network, f"{budget:.0%}", method, *(_mean_and_deviation(found.get(count, [])) for count in epochs)]
        for (network, budget, method), found in sorted(cells.items(), key=lambda item: (item[0][0], -item[0][1]))
    )
    return _table(["network", "multiply-adds left", "method", *(f"{count} epoch{'s' * (count != 1)}" for count in epochs)], rows)


def timm_summary() -> str:
    """Return how many of timm's networks can be cut."""
    rows = _rows("coverage_timm")
    passed = [row for row in rows if row["passes"]]
    whole = [row for row in passed if not row["stays"]]
    half = [row for row in passed if row["least"] <= 0.5]
    tried = [row for row in rows if row.get("peer")]
    peer = [row for row in tried if row["peer"].endswith("%")]
    quick = [row for row in rows if row["trace_s"] <= 20]
    return (
        f"{len(rows)} networks, one of each family: {len(passed)} pass ({len(passed) / len(rows):.1%}), {len(whole)} of them whole and "
        f"{len(passed) - len(whole)} in part; {len(rows) - len(passed)} do not. Half of the multiply-adds can go in {len(half)}. "
        f"{len(quick)} are traced and proved within 20 s on one thread. Torch-Pruning, tried on {len(tried)}, cuts {len(peer)}."
    )


def timm_coverage() -> str:
    """Return what can be cut of each of timm's networks, and of what is left by the peer."""
    rows = (
        [
            row["model"].removeprefix("timm/"),
            row["cut"].removesuffix(" groups") if row["passes"] else "**no**",
            f"{row['least']:.0%}" if row["passes"] else "-",
            row["stays"].replace("|", "\\|") or "-",
            row.get("peer", "-").replace("|", "\\|"),
        ]
        for row in sorted(_rows("coverage_timm"), key=lambda row: str(row["model"]))
    )
    return _table(["network", "groups that can be cut", "least that can stay", "what stays, and why", "Torch-Pruning"], rows)


def _mean_and_deviation(values: Sequence[float]) -> str:
    if len(values) < 2:
        return _percent(values[0]) if values else "-"
    return f"{_percent(statistics.mean(values))} ± {100 * statistics.stdev(values):.2f} (n = {len(values)})"


PARTS: dict[tuple[str, str], Callable[[], str]] = {
    ("flags.md", "flags"): flags,
    ("results.md", "resnet50"): lambda: deployment("resnet50"),
    ("results.md", "resnet56"): lambda: deployment("resnet56"),
    ("results.md", "yolov5n-cls"): lambda: deployment("yolov5n-cls"),
    ("results.md", "accuracy"): accuracy_after_pruning,
    ("results.md", "cost"): cost_accuracy,
    ("training.md", "recipes"): recipes,
    ("results.md", "latency"): latency,
    ("results.md", "latency-budgets"): latency_budgets,
    ("results.md", "latency-compared"): latency_compared,
    ("coverage.md", "timm-summary"): timm_summary,
    ("coverage.md", "timm"): timm_coverage,
    ("how-a-cut-works.md", "operations"): operations,
    ("how-a-cut-works.md", "groups"): groups,
    ("how-a-cut-works.md", "leftovers"): leftovers,
}


def marks(name: str) -> tuple[str, str]:
    """Return the lines that a part stands between."""
    return f"<!-- {name} -->\n", f"\n<!-- /{name} -->"


def _rows(benchmark: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((HERE.parent / "benchmarks" / f"{benchmark}.json").read_text(encoding="utf-8"))["rows"]
    return found


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _numbers(step: Step) -> str:
    return " ".join(map(str, step.numbers))


def main() -> None:
    """Write every part into its file."""
    for (file, name), part in PARTS.items():
        path, (begin, end) = HERE / file, marks(name)
        before, rest = path.read_text(encoding="utf-8").split(begin)
        path.write_text(before + begin + part() + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
