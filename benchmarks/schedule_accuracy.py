"""A schedule that removes filters, with and without distillation: accuracy and multiply-adds before and after.

python -m benchmarks.schedule_accuracy --data FOLDER --dense CHECKPOINT --out FILE

ResNet-56 on CIFAR-10 as an image folder, data/schedules/resnet56_filters_l1.yaml; the teacher is the dense network
itself. Reported is the network of the last epoch; nothing is selected on test, which is measured once per network. A run
is not repeated if its results are already in the folder of --project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cifar10 import RECIPES, ROOT, run_once, top1_on_test
from benchmarks.reporting import benchmark_parser, parse_options, report
from utils.files.checkpoint import read_tensor_file

SCHEDULE = ROOT / "data" / "schedules" / "resnet56_filters_l1.yaml"
DISTILLED = ["--kd-temp", "4", "--kd-dw", "0.7", "--kd-sw", "0.3"]


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", required=True, help="folder with train/ and test/")
    parser.add_argument("--dense", required=True, help="our checkpoint of the dense network")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--project", default="runs/schedules")
    options = parse_options(parser)
    dense = Path(options.dense)
    before, dense_top1 = read_tensor_file(dense)["metrics"]["macs"], top1_on_test(dense, options.data)
    start = [
        "--weights",
        dense,
        "--data",
        options.data,
        "--compress",
        SCHEDULE,
        "--recipe",
        "yolov5",
        *RECIPES["resnet56"],
        "--cache",
        "ram",
    ]
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for case, extra in (("distilled", ["--kd-teacher", str(dense), *DISTILLED]), ("plain", [])):
            folder = Path(options.project) / f"{case}-seed{seed}"
            results = run_once("train.py", folder, *start, *extra, "--epochs", options.epochs, "--seed", seed)
            tuned_top1 = top1_on_test(folder / "weights" / "last.pt", options.data)
            row = {"network": "resnet56", "case": case, "macs_before": before, "macs_after": results["macs"]}
            row |= {"dense_test_top1": dense_top1, "tuned_test_top1": tuned_top1, "change": tuned_top1 - dense_top1}
            rows.append({**row, "epochs": options.epochs, "seed": seed})
            print(rows[-1], flush=True)
    report("schedule_accuracy", rows, options.out)


if __name__ == "__main__":
    main()
