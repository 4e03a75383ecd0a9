"""A schedule that removes filters, with and without distillation: accuracy and multiply-adds before and after.

python -m benchmarks.schedule_accuracy --data FOLDER --dense CHECKPOINT --out FILE

ResNet-56 on CIFAR-10 as an image folder, data/schedules/resnet56_filters_l1.yaml; the teacher is the dense network
itself. Reported is the network of the last epoch; nothing is selected on test, which is measured once per network. A run
is not repeated if its results are already in the folder of --project.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cifar10 import RECIPES, ROOT, run, top1_on_test
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
    before = read_tensor_file(dense)["metrics"]["macs"]
    base = top1_on_test(dense, options)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for case, extra in (("distilled", ["--kd-teacher", str(dense), *DISTILLED]), ("plain", [])):
            folder = Path(options.project) / f"{case}-seed{seed}"
            if not (folder / "results.json").exists():
                run(
                    "train.py", "--weights", dense, "--data", options.data, "--compress", SCHEDULE, *RECIPES["resnet56"], *extra,
                    "--cache", "ram", "--epochs", options.epochs, "--seed", seed, "--project", options.project, "--name", folder.name,
                    "--exist-ok",
                )  # fmt: skip
            results = json.loads((folder / "results.json").read_text())
            tuned = top1_on_test(folder / "weights" / "last.pt", options)
            rows.append(
                {
                    "network": "resnet56",
                    "case": case,
                    "macs_before": before,
                    "macs_after": results["macs"],
                    "dense_test_top1": base,
                    "tuned_test_top1": tuned,
                    "change": tuned - base,
                    "epochs": options.epochs,
                    "seed": seed,
                }
            )
            print(rows[-1], flush=True)
    report("schedule_accuracy", rows, options.out)


if __name__ == "__main__":
    main()
