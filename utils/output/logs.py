"""Hooks that report a run's progress: results.csv, TensorBoard, console lines, a progress bar; and early stopping."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils import distributed
from utils.files.checkpoint import write_text
from utils.loop.engine import Run
from utils.loop.hooks import Hook
from utils.measures.metrics import Evaluation

COLUMNS = ("epoch", "train_loss", "val_loss", "top1", "top5", "lr", "images_per_second", "seconds")


class History(Hook):
    """Keeps a row per epoch, writes results.csv and TensorBoard, and remembers the best epoch.

    Args:
        folder: the run's folder; None (on ranks other than 0) writes nothing.
        on_best: called after every epoch that is the best so far.
        counts: whether an epoch can be the best at all. The first that can replaces all before it: a network that has
            not reached its sparsity yet may be more accurate, but is not what was asked for.
    """

    def __init__(self, folder: Path | None, on_best: Callable[[Run], None], counts: Callable[[Run], bool] = lambda _: True) -> None:
        self.folder, self.on_best, self.counts = folder, on_best, counts
        self.counting = False
        self.rows: list[dict[str, float]] = []
        self.best: Evaluation | None = None
        self.best_epoch = 0
        self.seconds = 0.0
        self.writer: Any = None
        self.started = 0.0  # by the process's clock; 0 until the run begins

    def on_run_begin(self, run: Run) -> None:
        self.started = time.perf_counter() - self.seconds
        if self.folder:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self.writer = SummaryWriter(str(self.folder), purge_step=run.epoch + 1 if run.epoch else None)

    def on_minibatch_end(self, run: Run) -> None:
        self.seconds = time.perf_counter() - self.started  # for checkpoints within an epoch

    def on_epoch_end(self, run: Run) -> None:
        previous, self.seconds = self.rows[-1]["seconds"] if self.rows else 0.0, time.perf_counter() - self.started
        evaluation = run.evaluation
        assert evaluation is not None
        row = {
            "epoch": run.epoch + 1,
            "train_loss": run.loss_sums.get("loss", 0.0) / max(run.images_seen, 1),
            "val_loss": evaluation.loss,
            "top1": evaluation.top1,
            "top5": evaluation.top5,
            "lr": run.optimizer.param_groups[0]["lr"],
            "images_per_second": run.images_seen / (self.seconds - previous),
            "seconds": self.seconds,
        }
        if len(run.loss_sums) > 2:  # a single part is the loss itself
            run.metrics |= {f"loss_{name}": value / max(run.images_seen, 1) for name, value in run.loss_sums.items() if name != "loss"}
        # Figures with a slash in their name are numerous; they go to TensorBoard only.
        self.rows.append({**row, **{name: value for name, value in run.metrics.items() if "/" not in name}})
        if not self.counting and self.counts(run):
            self.counting, self.best = True, None
        if evaluation.better_than(self.best):
            self.best, self.best_epoch = evaluation, run.epoch + 1
            self.on_best(run)
        if self.folder:
            columns = list(dict.fromkeys([*COLUMNS, *(name for row in self.rows for name in row)]))
            lines = [",".join(f"{row[c]:.6g}" if c in row else "" for c in columns) for row in self.rows]
            write_text(self.folder / "results.csv", "\n".join([",".join(columns), *lines]) + "\n")
            for name, value in {**row, **run.metrics}.items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, run.epoch + 1)

    def on_run_end(self, run: Run) -> None:
        self.close()

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self.writer:
            self.writer.close()

    def state_dict(self) -> dict[str, Any]:
        fields = ("top1", "top5", "loss", "images", "confusion")
        best = {**{name: getattr(self.best, name) for name in fields}, "unreadable": list(self.best.unreadable)} if self.best else None
        return {"rows": self.rows, "best": best, "best_epoch": self.best_epoch, "seconds": self.seconds, "counting": self.counting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.best_epoch, self.seconds = list(state["rows"]), state["best_epoch"], state["seconds"]
        best = state["best"]
        self.best = Evaluation(**{**best, "unreadable": tuple(best.get("unreadable", ()))}) if best else None
        self.counting = state["counting"]


class EarlyStopping(Hook):
    """Stops a run after ``patience`` epochs without improvement; 0: never."""

    def __init__(self, patience: int, history: History) -> None:
        self.patience, self.history = patience, history

    def on_epoch_end(self, run: Run) -> None:
        if self.patience and self.history.counting and run.epoch + 1 - self.history.best_epoch >= self.patience:
            run.stop = f"no improvement for {self.patience} epochs"


class StepLog(Hook):
    """Prints the loss and its parts every so many batches; 0: never."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_minibatch_end(self, run: Run) -> None:
        if self.every and (run.step + 1) % self.every == 0 and distributed.is_main():
            parts = ", ".join(f"{name} {float(part):.4f}" for name, part in run.loss_parts.items())
            rate = run.optimizer.param_groups[0]["lr"]
            print(
                f"epoch {run.epoch + 1} step {run.step + 1}/{run.steps_per_epoch}: loss {float(run.loss):.4f} ({parts}), lr {rate:.3g}",
                flush=True,
            )


class Progress(Hook):
    """Prints a line per epoch, and on a terminal a progress bar with the throughput and the time left."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.bar: Any = None
        self.shows_bar = sys.stderr.isatty()

    def on_run_begin(self, run: Run) -> None:
        if distributed.is_main():
            print(
                f"{'epoch':>9} {'train loss':>11} {'val loss':>9} {'top-1':>7} {'top-5':>7} {'images/s':>9} {'left':>8}  * best", flush=True
            )

    def on_epoch_begin(self, run: Run) -> None:
        if distributed.is_main() and self.shows_bar:
            label = f"{run.epoch + 1:>4}/{run.epochs}"
            self.bar = tqdm(total=run.steps_per_epoch, initial=run.step, desc=label, unit="img", leave=False, dynamic_ncols=True)

    def on_minibatch_end(self, run: Run) -> None:
        if self.bar is not None:
            self.bar.unit_scale = len(run.inputs) * distributed.world_size()  # counts batches, shows images
            self.bar.update()
            self.bar.set_postfix_str(f"loss {float(run.loss_parts['classification']):.3f}", refresh=False)

    def on_epoch_end(self, run: Run) -> None:
        if self.bar is not None:
            self.bar.close()
        if distributed.is_main():
            row = self.history.rows[-1]
            left = duration(row["seconds"] / row["epoch"] * (run.epochs - row["epoch"]))
            mark = " *" if self.history.best_epoch == row["epoch"] else ""
            sparsity = f" {row['sparsity']:>8.2%} of the weights are zero" if "sparsity" in row else ""
            print(
                f"{int(row['epoch']):>4}/{run.epochs:<4} {row['train_loss']:>11.4f} {row['val_loss']:>9.4f} {row['top1']:>7.2%} "
                f"{row['top5']:>7.2%} {row['images_per_second']:>9.0f} {left:>8}{mark or '  '}{sparsity}".rstrip(),
                flush=True,
            )


def duration(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
