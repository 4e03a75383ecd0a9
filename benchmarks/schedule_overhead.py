"""What a compression schedule costs per training step, beside the same step without one.

python -m benchmarks.schedule_overhead --data FOLDER --out FILE

The same network trains in the same process with and without a schedule, by turns in blocks of steps. Reported are the
medians of the blocks' processor seconds per step, and the median ratio of neighbouring blocks. The teacher's forward pass is
timed in the same blocks and not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.reporting import benchmark_parser, parse_options, report
from compression.schedule.distillation_policy import DistillationPolicy
from compression.training.arguments import TrainArguments
from compression.training.compressor import ClassifierCompressor
from utils.loop.engine import Run, train_step
from utils.loop.hooks import Hook

WEIGHTS = ["layer*.conv*.weight"]
WINDOW = {"starting_epoch": 0, "ending_epoch": 10, "frequency": 1}
AGP = {"class": "AutomatedGradualPruner", "initial_sparsity": 0.5, "final_sparsity": 0.8, "weights": WEIGHTS}
SPLICING = {"class": "SplicingPruner", "sensitivities": {"layer*.conv*.weight": 0.05}, "low_thresh_mult": 0.9, "hi_thresh_mult": 1.1}
DOUBLE = {"use_double_copies": True, "mask_on_forward_only": True, "mini_batch_pruning_frequency": 1}
CONV1 = ["layer*.conv1.weight"]
FILTERS = {"class": "L1RankedStructureParameterPruner", "desired_sparsity": 0.3, "group_type": "Filters", "weights": CONV1}
LASSO = {"class": "GroupLassoRegularizer", "reg_regims": {"layer*.conv1.weight": [1e-4, "3D"]}}
L1 = {"class": "L1Regularizer", "reg_regims": {"layer*.bn*.weight": 1e-4}}
RATES = {"class": "StepLR", "step_size": 5, "gamma": 0.1}


def policy(kind: str, name: str, **arguments: Any) -> dict[str, Any]:
    """Return a policy for the whole window."""
    return {kind: {"instance_name": name, **({"args": arguments} if arguments else {})}, **WINDOW}


SCHEDULES: dict[str, dict[str, Any]] = {
    "masks (AGP on all convolutions)": {"pruners": {"agp": AGP}, "policies": [policy("pruner", "agp")]},
    "masks, L1 on norms, rates": {
        "pruners": {"agp": AGP, "filters": FILTERS},
        "regularizers": {"l1": L1},
        "lr_schedulers": {"step": RATES},
        "policies": [policy("pruner", "agp"), policy("pruner", "filters"), policy("regularizer", "l1"), policy("lr_scheduler", "step")],
    },
    "group lasso": {"regularizers": {"lasso": LASSO}, "policies": [policy("regularizer", "lasso")]},
    "splicing, asked every step": {"pruners": {"splice": SPLICING}, "policies": [policy("pruner", "splice", **DOUBLE)]},
    "distillation less the teacher": {},
}


class TimedTraining:
    """A training run whose steps are timed, without its teacher's forward pass."""

    def __init__(self, arguments: TrainArguments) -> None:
        self.compressor = ClassifierCompressor(arguments)
        self.run: Run = self.compressor.run
        self.hooks: list[Hook] = self.compressor.training_hooks
        self.batches = iter(self.run.batches(0, 0))
        self.teacher_seconds = 0.0
        self.run.model.train()
        for hook in self.hooks:
            hook.on_epoch_begin(self.run)
        scheduler = self.compressor.scheduler
        for teaching in [p for p in (scheduler.policies if scheduler else []) if isinstance(p, DistillationPolicy)]:
            teaching.teacher = self._timed(teaching.teacher)

    def _timed(self, teacher: Any) -> Any:
        def call(*inputs: Any, **options: Any) -> Any:
            start = time.process_time()
            logits = teacher(*inputs, **options)
            self.teacher_seconds += time.process_time() - start
            return logits

        return call

    def block(self, steps: int) -> float:
        """Return the mean processor seconds of some steps."""
        self.teacher_seconds = 0.0
        spent = 0.0
        for _ in range(steps):
            batch = next(self.batches)
            start = time.process_time()
            train_step(self.run, self.hooks, batch)
            spent += time.process_time() - start
            self.run.step += 1
        return (spent - self.teacher_seconds) / steps


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", required=True, help="folder with train/")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--teacher", default="", help="checkpoint of the teacher; without one distillation is left out")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="per block")
    options = parse_options(parser)
    base = {"model": options.model, "data": options.data, "imgsz": 32, "batch_size": options.batch_size, "workers": 0, "optimizer": "SGD"}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, content in SCHEDULES.items():
            if not content and not options.teacher:
                continue
            extra: dict[str, Any] = {"kd_teacher": options.teacher}
            if content:
                path = Path(folder) / "schedule.yaml"
                path.write_text(yaml.safe_dump({"version": 1, **content}))
                extra = {"compress": str(path)}
            plain, scheduled = TimedTraining(TrainArguments(**base)), TimedTraining(TrainArguments(**base, **extra))
            plain.block(options.steps), scheduled.block(options.steps)
            pairs = [(plain.block(options.steps), scheduled.block(options.steps)) for _ in range(options.blocks)]
            ratios = sorted(ours / theirs for theirs, ours in pairs)
            row = {"schedule": name, "plain_ms": 1e3 * statistics.median(theirs for theirs, _ in pairs)}
            row |= {"scheduled_ms": 1e3 * statistics.median(ours for _, ours in pairs), "ratio": statistics.median(ratios)}
            row["ratio_quartiles"] = [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]]
            rows.append({**row, "batch_size": options.batch_size})
            print(rows[-1], flush=True)
    report("schedule_overhead", rows, options.out)


if __name__ == "__main__":
    main()
