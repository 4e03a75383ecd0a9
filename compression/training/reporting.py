"""What a run reports of its network at the end of every epoch: sparsity, histograms of parameters, activations."""

from __future__ import annotations

from typing import Any

from compression.schedule.scheduler import CompressionScheduler
from compression.statistics.activations import measure_activations
from compression.statistics.summaries import masks_table, render, sparsity_of
from compression.training.arguments import TrainArguments
from compression.training.data_feed import DataFeed
from models.quantized.preparing import weights_by_name
from utils import distributed
from utils.errors import UserError
from utils.files.checkpoint import write_text
from utils.loop.engine import Run
from utils.loop.hooks import Hook
from utils.output.logs import History

PHASES = ("train", "val", "test")


class EpochReports(Hook):
    """Writes to the run's folder, TensorBoard or the terminal; the history holds the folder and TensorBoard's writer."""

    def __init__(self, history: History) -> None:
        self.history = history


class SparsityReport(EpochReports):
    """Writes sparsity.csv: a row per epoch, the share of zeros of every weight and in total.

    Args:
        history: of the run.
        scheduler: holds the masks.
        prints_masks: whether to print a table of the masks (--masks-sparsity).
    """

    def __init__(self, history: History, scheduler: CompressionScheduler, prints_masks: bool) -> None:
        super().__init__(history)
        self.scheduler, self.prints_masks = scheduler, prints_masks
        self.rows: list[dict[str, float]] = []

    def on_epoch_end(self, run: Run) -> None:
        each, total = sparsity_of(run.averaged)
        run.metrics |= {"sparsity": total, **{f"sparsity/{name}": value for name, value in each.items()}}
        self.rows.append({"epoch": run.epoch + 1, "total": total, **each})
        if self.history.folder:
            names = list(self.rows[-1])
            lines = [",".join(f"{row[name]:.6g}" for name in names) for row in self.rows]
            write_text(self.history.folder / "sparsity.csv", "\n".join([",".join(names), *lines]) + "\n")
        if self.prints_masks and distributed.is_main():
            print(render(masks_table(self.scheduler.masks.values, weights_by_name(run.model))), flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = list(state["rows"])


class ParameterHistograms(EpochReports):
    """Draws every parameter's histogram to TensorBoard (--param-hist)."""

    def on_epoch_end(self, run: Run) -> None:
        if self.history.writer:
            for name, parameter in weights_by_name(run.averaged).items():
                self.history.writer.add_histogram(name, parameter.detach().float().cpu(), run.epoch + 1)


class ActivationReport(EpochReports):
    """Writes activations.csv and activations.yaml: statistics of every layer's outputs (--act-stats).

    Args:
        history: of the run.
        feed: the images.
        phase: the split to measure on; of the training images, a sample without augmentation.
    """

    def __init__(self, history: History, feed: DataFeed, phase: str) -> None:
        super().__init__(history)
        self.feed, self.phase = feed, phase

    def on_epoch_end(self, run: Run) -> None:
        if not distributed.is_main() or not self.history.folder:
            return
        table = measure_activations(run.averaged, self.feed.examples(self.phase).batches())
        table.write(self.history.folder)
        table.log(self.history.writer, run.epoch + 1)


def reports_of(arguments: TrainArguments, history: History, scheduler: CompressionScheduler | None, feed: DataFeed) -> list[EpochReports]:
    """Return the reports that the arguments ask for.

    Raises:
        UserError: there is nothing to report on.
    """
    reports: list[EpochReports] = []
    if scheduler and scheduler.schedule.of("pruner", "regularizer", "extension"):
        reports.append(SparsityReport(history, scheduler, arguments.masks_sparsity))
    elif arguments.masks_sparsity:
        raise UserError("--masks-sparsity shows a schedule's masks; give --compress FILE with a pruner")
    if arguments.param_hist:
        reports.append(ParameterHistograms(history))
    if arguments.act_stats:
        if arguments.act_stats not in PHASES:
            raise UserError(f"act-stats is '{arguments.act_stats}'; it is the images to measure on: {', '.join(PHASES)}")
        feed.data.split(arguments.act_stats)
        reports.append(ActivationReport(history, feed, arguments.act_stats))
    return reports
