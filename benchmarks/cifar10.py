"""Accuracy after pruning and fine-tuning on CIFAR-10, as an image folder, beside controls at the same widths.

python -m benchmarks.cifar10 --data FOLDER --resnet56 CHECKPOINT --yolov5n CHECKPOINT --out FILE

Each network is fine-tuned (ResNet-56: the public checkpoint, on these images), cut by each criterion, and fine-tuned
again: 6 epochs, warm-up over a quarter of them, then one cosine. A tenth of train is held out for validation. Reported is
the network of the last epoch; nothing is selected on test, which is measured once per network. A run is not repeated if its
results are already in the folder of --project.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.reporting import benchmark_parser, parse_options, report

ROOT = Path(__file__).resolve().parent.parent
RESNET_RATE = "[0.]+[0.15]*2+[0.4]*27"
CYCLE = ["--recipe", "yolov5", "--no-distill", "--cos-lr", "--lrf", "0.001", "--cache", "ram"]
RECIPES = {
    "resnet56": [
        "--optimizer", "SGD", "--lr0", "0.02", "--decay", "5e-4", "--batch-size", "128", "--label-smoothing", "0", "--augment", "light",
    ],
    "yolov5n-cls": ["--optimizer", "Adam", "--lr0", "1e-3", "--batch-size", "64", "--augment", "default"],
}  # fmt: skip
CUTS: dict[str, dict[str, list[str]]] = {
    "resnet56": {
        "rank": ["--compress_rate", RESNET_RATE, "--criterion", "rank"],
        "l1": ["--compress_rate", RESNET_RATE, "--criterion", "l1"],
        "random": ["--compress_rate", RESNET_RATE, "--criterion", "random"],
        "rank, sensitivity": ["--macs", "0.52", "--allocation", "sensitivity", "--round-to", "1", "--criterion", "rank"],
    },
    "yolov5n-cls": {
        name: ["--macs", "0.5", "--allocation", "uniform", "--criterion", name]
        for name in ("rank", "effective_rank", "l2", "taylor", "random")
    },
}


def run_once(script: str, folder: Path, *arguments: object) -> dict[str, Any]:
    """Run one of the scripts, unless its results are in the folder already, and return them."""
    if not (folder / "results.json").exists():
        command = [str(ROOT / script), *map(str, arguments), "--project", str(folder.parent), "--name", folder.name, "--exist-ok"]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def fine_tuned(name: str, weights: Path, network: str, options: argparse.Namespace) -> Path:
    """Fine-tune weights and return the last epoch's checkpoint."""
    folder = Path(options.project) / name
    extra = ["--model", "resnet56", "--imgsz", "32"] if weights.suffix == ".th" else []
    epochs = ["--epochs", options.epochs, "--warmup-epochs", options.epochs / 4, "--seed", options.seed]
    run_once("train.py", folder, "--weights", weights, "--data", options.data, *extra, *RECIPES[network], *CYCLE, *epochs)
    return folder / "weights" / "last.pt"


def top1_on_test(checkpoint: Path, data: str) -> float:
    """Measure a checkpoint on the test split."""
    folder = checkpoint.parent.parent / "test" / checkpoint.stem
    return float(run_once("val.py", folder, "--weights", checkpoint, "--data", data, "--split", "test")["top1"])


def compare_criteria(network: str, dense: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Cut a dense network by each criterion and fine-tune it; return a row for each criterion."""
    dense_top1 = top1_on_test(dense, options.data)
    rows: list[dict[str, Any]] = []
    for criterion, arguments in CUTS[network].items():
        if options.only and criterion not in options.only:
            continue
        name = f"{network}-{criterion.replace(', ', '-')}-seed{options.seed}"
        folder = Path(options.project) / f"{name}-cut"
        cut = run_once("prune.py", folder, "--weights", dense, "--data", options.data, "--seed", options.seed, "--no-refit", *arguments)
        pruned = folder / "weights" / "pruned.pt"
        tuned_top1 = top1_on_test(fine_tuned(name, pruned, network, options), options.data)
        row: dict[str, Any] = {"network": network, "criterion": criterion}
        row |= {cost: cut[cost][1] / cut[cost][0] for cost in ("macs", "params")}
        row |= {"dense_test_top1": dense_top1, "cut_test_top1": top1_on_test(pruned, options.data), "tuned_test_top1": tuned_top1}
        row |= {"change": tuned_top1 - dense_top1, "tied_share": cut["tied_share"], "epochs": options.epochs, "seed": options.seed}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", required=True, help="folder with train/ and test/")
    parser.add_argument("--resnet56", default="", help="public state dict to fine-tune, or our checkpoint of the dense network")
    parser.add_argument("--yolov5n", default="", help="our checkpoint of the dense network")
    parser.add_argument("--only", nargs="*", default=[], help="criteria to run")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--project", default="runs/cifar10")
    options = parse_options(parser)
    rows: list[dict[str, Any]] = []
    if options.yolov5n:
        rows += compare_criteria("yolov5n-cls", Path(options.yolov5n), options)
    if options.resnet56:
        weights = Path(options.resnet56)
        dense = weights if weights.suffix == ".pt" else fine_tuned("resnet56-dense", weights, "resnet56", options)
        rows += compare_criteria("resnet56", dense, options)
    report("cifar10", rows, options.out)


if __name__ == "__main__":
    main()
