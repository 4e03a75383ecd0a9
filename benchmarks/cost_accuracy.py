"""Accuracy at a cost: networks that are cut to a share of their multiply-adds, at once and after fine-tuning, beside peers and controls.

python -m benchmarks.cost_accuracy --data FOLDER --weights DENSE ... --out FILE

Each method cuts the same dense checkpoint to the same share by one counter; every cut is fine-tuned by the same recipe
(train.py's own for pruned files, with the dense network as its teacher), for 0, 1 and 6 epochs, each a run of its own. Reported is
the last epoch's test accuracy. Nothing is selected on test: Torch-Pruning's importance and scope are those that are best on the
validation images. An epoch is a fixed share of the training images, drawn anew each time, for all rows alike. Cases that the file
of --out has already are not repeated, and it grows with each.

Controls: a cut at random, refitted and not; the same narrow network from scratch; the dense network trained as many epochs more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cifar10 import run_once
from benchmarks.peers import IMPORTANCES, cut_by_torch_pruning
from benchmarks.reporting import benchmark_parser, parse_options, report
from compression.pruning.arguments import PruneArguments
from compression.pruning.recalibration import recalibrate_
from compression.pruning.traced_classifier import load_traced
from compression.scoring.calibration import Calibration, sample
from compression.training.dense_teacher import DISTILL, STUDENT, TEMPERATURE
from utils.data.datasets import load_data, with_validation
from utils.files.checkpoint import read_tensor_file, save_checkpoint
from utils.measures.profile import count_macs

KEY = ("network", "method", "budget", "seed", "epochs")
# Flags of prune.py. The first is what it does without any, but that it may keep any number of channels, as Torch-Pruning does.
CUTS = {
    "default": [],
    "random, refitted": ["--criterion", "random", "--allocation", "uniform"],
    "random": ["--criterion", "random", "--allocation", "uniform", "--no-refit"],
    "l1": ["--criterion", "l1", "--allocation", "uniform"],
    "taylor": ["--criterion", "taylor", "--allocation", "uniform"],
    "rank": ["--criterion", "rank", "--allocation", "uniform"],
    "reconstruction": ["--criterion", "reconstruction", "--allocation", "uniform"],
    "taylor, measured": ["--criterion", "taylor", "--allocation", "sensitivity"],
    "rank, measured": ["--criterion", "rank", "--allocation", "sensitivity"],
}
PEER, SCRATCH, DENSE, GRADUAL = "torch-pruning", "from scratch", "dense, trained more", "in two cuts"
METHODS = (*CUTS, GRADUAL, PEER, SCRATCH, DENSE)
PADDED = re.compile(r"resnet(20|32|44|56|110)")  # shortcuts of option A, which Torch-Pruning can't cut
TAUGHT = ["--kd-temp", TEMPERATURE, "--kd-dw", DISTILL, "--kd-sw", STUDENT]
TUNED = ("default", GRADUAL, "random, refitted", "random", PEER, SCRATCH, DENSE)  # the others are measured as they are cut


@dataclass(frozen=True)
class Case:
    """One row: a dense network's file, cut by a method to a budget, fine-tuned."""

    weights: Path
    network: str
    method: str
    budget: float
    seed: int
    epochs: int

    @property
    def key(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in KEY}

    def folder(self, options: argparse.Namespace) -> Path:
        return Path(options.project) / f"{self.network}-{self.method.replace(', ', '-').replace(' ', '-')}-{self.budget}-{self.seed}"


def top1_on_test(checkpoint: Path, data: str, folder: Path) -> float:
    """Measure a checkpoint on the test split."""
    return float(run_once("val.py", folder, "--weights", checkpoint, "--data", data, "--split", "test")["top1"])


def cut(case: Case, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Cut the dense network by a method of ours; return the file and what to report of it."""
    folder = case.folder(options) / "cut"
    flags = ["--macs", case.budget, "--round-to", 1, "--seed", case.seed, "--images", options.images, *CUTS[case.method]]
    about = folder / "about.json"
    begin = time.perf_counter()
    results = run_once("prune.py", folder, "--weights", case.weights, "--data", options.data, *flags)
    if not about.exists():
        seconds = round(time.perf_counter() - begin, 1)
        about.write_text(json.dumps({"macs": results["macs"][1] / results["macs"][0], "cut_seconds": seconds, "choice": ""}))
    return folder / "weights/pruned.pt", json.loads(about.read_text())


def cut_by_peer(case: Case, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Cut the dense network by Torch-Pruning: by the importance and scope that are best on the validation images."""
    path, about = case.folder(options) / "cut/pruned.pt", case.folder(options) / "cut/about.json"
    if not about.exists():
        begin, classifier = time.perf_counter(), load_traced(PruneArguments(weights=str(case.weights)))
        data = with_validation(load_data(options.data, download=False), 0.1, 0)
        images = sample(data.split("train"), classifier.spec, options.images, 32, case.seed)
        held_out = sample(data.split("val"), classifier.spec, 2000, 250, 0)
        found: list[tuple[float, str, nn.Module]] = []
        for importance, scope in _peers_to_try(case, options):
            narrow = cut_by_torch_pruning(classifier.model, classifier.spec, images, importance, scope, case.budget)
            recalibrate_(narrow, images)
            found.append((top1(narrow, held_out), f"{importance}, {scope}", narrow))
        best, choice, narrow = max(found, key=lambda one: one[0])
        content = {key: value for key, value in read_tensor_file(case.weights).items() if key in ("spec", "arguments")}
        state = {name: tensor.contiguous() for name, tensor in narrow.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, {**content, "plan": {"kept": {}, "sizes": {}}, "state_dict": state, "metrics": {}})
        spent = count_macs(narrow, classifier.spec) / classifier.profile.macs
        values = {"macs": spent, "cut_seconds": round(time.perf_counter() - begin, 1), "choice": f"{choice} ({best:.3f} on val)"}
        about.write_text(json.dumps(values))
    return path, json.loads(about.read_text())


def _peers_to_try(case: Case, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the importances and scopes that may be best: all for the first seed, afterwards the one that was."""
    first = replace(case, seed=options.seeds[0]).folder(options) / "cut/about.json"
    if not first.exists():
        return list(itertools.product(IMPORTANCES, ("global", "local")))
    importance, scope = json.loads(first.read_text())["choice"].partition(" (")[0].split(", ")
    return [(importance, scope)]


@torch.no_grad()
def top1(model: nn.Module, images: Calibration) -> float:
    """Measure the accuracy in eval mode."""
    model.eval()
    return sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in images.batches()) / len(images)


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a case."""
    folder = case.folder(options)
    about: dict[str, Any] = {"macs": 1.0, "cut_seconds": 0.0, "choice": ""}
    flags: list[object] = ["--weights", case.weights]
    if case.method == GRADUAL:
        return _measure_gradual(case, options)
    if case.method == PEER:
        start, about = cut_by_peer(case, options)
        flags = ["--weights", start, "--kd-resume", case.weights, *TAUGHT]
    elif case.method == SCRATCH:
        twin = Case(case.weights, case.network, "default", case.budget, case.seed, 0)
        _, about = cut(twin, options)
        rates = json.loads((twin.folder(options) / "cut/results.json").read_text())["compress_rate"]
        spec = read_tensor_file(case.weights)["spec"]
        flags = ["--model", spec["name"], "--imgsz", spec["imgsz"], "--compress_rate", rates]
    elif case.method != DENSE:
        start, about = cut(case, options)
        flags = ["--weights", start]
    else:
        start = case.weights
    if case.epochs:
        start = train(case, options, folder / f"{case.epochs}", case.epochs, flags)
    return {**case.key, "test_top1": top1_on_test(start, options.data, folder / f"{case.epochs}-test"), **about}


def train(case: Case, options: argparse.Namespace, folder: Path, epochs: int, flags: list[object]) -> Path:
    """Train in one run and return the last epoch's checkpoint."""
    common = ["--epochs", epochs, "--effective-train-size", options.share, "--seed", case.seed, "--cache", "ram"]
    run_once("train.py", folder, *flags, "--data", options.data, *common)
    return folder / "weights/last.pt"


def _measure_gradual(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Cut half of the way, train half of the epochs, cut the rest and train on; both times the dense network teaches."""
    start, kept, seconds = case.weights, 1.0, 0.0
    for turn in (1, 2):
        folder = case.folder(options) / f"{case.epochs}-turn{turn}"
        share = case.budget ** (turn / 2) / kept
        flags = ["--macs", share, "--round-to", 1, "--seed", case.seed, "--images", options.images]
        begin = time.perf_counter()
        results = run_once("prune.py", folder / "cut", "--weights", start, "--data", options.data, *flags)
        seconds += time.perf_counter() - begin
        start, kept = folder / "cut/weights/pruned.pt", kept * results["macs"][1] / results["macs"][0]
        if case.epochs:
            taught = ["--kd-resume", case.weights, *TAUGHT]
            start = train(case, options, folder / "tuned", case.epochs // 2 or 1, ["--weights", start, *taught])
    about = {"macs": kept, "cut_seconds": round(seconds, 1), "choice": ""}
    return {**case.key, "test_top1": top1_on_test(start, options.data, case.folder(options) / f"{case.epochs}-test"), **about}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases, the quick and the most telling first."""
    for seed, budget, epochs in itertools.product(options.seeds, options.budgets, options.epochs):
        if budget != options.budgets[0] and seed != options.seeds[0]:
            continue
        for weights, method in itertools.product(options.weights, options.methods):
            untrained = method in (SCRATCH, DENSE) and not epochs
            uncuttable = method == PEER and PADDED.fullmatch(network_of(weights))
            too_short = method == GRADUAL and epochs == 1
            if not (untrained or uncuttable or too_short) and (not epochs or method in TUNED):
                yield Case(Path(weights), network_of(weights), method, budget, seed, epochs)


@cache
def network_of(weights: str) -> str:
    return str(read_tensor_file(Path(weights))["spec"]["name"])


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", required=True, help="folder with train/ and test/")
    parser.add_argument("--weights", nargs="+", required=True, help="our checkpoints of trained dense networks")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.3], help="shares of the multiply-adds; all but the first once")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--epochs", nargs="+", type=int, default=[0, 1, 6])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.2, help="of the training images in an epoch")
    parser.add_argument("--project", default="runs/cost_accuracy")
    options = parse_options(parser)
    out = Path(options.out)
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"] if options.out and out.exists() else []
    for case in cases(options):
        if not any(all(row[name] == value for name, value in case.key.items()) for row in rows):
            rows.append({**measure(case, options), "share": options.share, "images": options.images})
            report("cost_accuracy", rows, options.out)


if __name__ == "__main__":
    main()
