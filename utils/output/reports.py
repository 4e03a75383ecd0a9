"""The files that a run leaves behind: results.json, tables, figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.data.inspection import Finding
from utils.data.loaders import Draw, SplitDataset
from utils.files.checkpoint import write_text
from utils.files.runs import RunDirectory, write_json
from utils.loop.engine import Run
from utils.loop.hooks import Hook
from utils.measures.metrics import Evaluation, per_class
from utils.measures.profile import Profile
from utils.output.logs import History
from utils.output.plots import mosaic, plot_confusion, plot_results
from utils.spec import ModelSpec

RIGHT, WRONG = (0, 110, 0), (200, 0, 0)  # RGB
MAX_PREDICTIONS = 32  # in the picture of predictions


class FirstBatch(Hook):
    """Draws the first training batch, as the network sees it, into train_batch.jpg in the history's folder."""

    def __init__(self, spec: ModelSpec, history: History) -> None:
        self.spec, self.history = spec, history

    def on_minibatch_begin(self, run: Run) -> None:
        if self.history.folder is None or run.epoch or run.step:
            return
        mean, std = torch.tensor(self.spec.mean), torch.tensor(self.spec.std)
        pixels = (run.inputs.detach().float().cpu().permute(0, 2, 3, 1) * std + mean) * 255
        images = pixels.clamp(0, 255).byte().numpy()
        labels = (run.targets if run.targets.ndim == 1 else run.targets.argmax(1)).tolist()
        mosaic(list(images), [self.spec.class_names[label] for label in labels], self.history.folder / "train_batch.jpg")


def report_training(
    directory: RunDirectory,
    history: History,
    profile: Profile,
    spec: ModelSpec,
    val_set: SplitDataset,
    network: torch.nn.Module,
    unreadable: list[str],
    findings: Sequence[Finding],
) -> dict[str, Any]:
    """Write a finished run's results.json, figures and list of unreadable images; return the content of results.json.

    Args:
        network: the best network of the run, for the pictures of its predictions.
        findings: what the look at the data found.
    """
    best = history.best
    assert best is not None
    results = {
        "top1": best.top1,
        "top5": best.top5,
        "loss": best.loss,
        "epochs": len(history.rows),
        "best_epoch": history.best_epoch,
        "params": profile.params,
        "macs": profile.macs,
        "seconds": round(history.seconds, 2),
        "checkpoint": str(directory.best),
        "data": [finding.to_dict() for finding in findings],
    }
    path = directory.path
    plot_results(history.rows, path / "results.png")
    plot_confusion(best.confusion, spec.class_names, path / "confusion_matrix.png")
    draw_predictions(network, spec, val_set, path / "val_predictions.jpg")
    write_unreadable(unreadable, path)
    write_json(path / "results.json", results)
    return results


def draw_predictions(network: torch.nn.Module, spec: ModelSpec, dataset: SplitDataset, path: Path) -> None:
    """Draw evenly spaced images of a split with the network's predictions; wrong ones in red."""
    from utils.data.transforms import normalise

    positions = np.unique(np.linspace(0, len(dataset) - 1, min(MAX_PREDICTIONS, len(dataset))).astype(int))
    batch = dataset.__getitems__([Draw(int(position), 0) for position in positions])
    device = next(network.parameters()).device
    with torch.inference_mode():
        probabilities = network.eval()(normalise(batch.images.to(device), spec)).float().softmax(1).cpu()
    confidence, predicted = probabilities.max(1)
    captions, colours = [], []
    for guess, share, label in zip(predicted.tolist(), confidence.tolist(), batch.labels.tolist(), strict=True):
        right = guess == label
        wrong_part = "" if right else f" not {spec.class_names[label]}" if label >= 0 else " unreadable"
        captions.append(f"{spec.class_names[guess]} {share:.2f}{wrong_part}")
        colours.append(RIGHT if right else WRONG)
    mosaic(list(batch.images.numpy()), captions, path, colours)


def report_evaluation(evaluation: Evaluation, spec: ModelSpec, folder: Path, unreadable: list[str]) -> dict[str, Any]:
    """Write results.json, per_class.csv and the confusion matrix (CSV, PNG); return the content of results.json."""
    import pandas as pd

    table = per_class(evaluation, spec.class_names)
    rows = table.to_dict("records")
    results = {
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "loss": evaluation.loss,
        "images": evaluation.images,
        "per_class": [{str(key): value for key, value in row.items()} for row in rows],
        "speed_ms": evaluation.speed_ms,
    }
    write_text(folder / "per_class.csv", table.to_csv(index=False))
    names = list(spec.class_names)
    confusion = pd.DataFrame(evaluation.confusion.numpy(), index=pd.Index(names, name="true \\ predicted"), columns=names)
    write_text(folder / "confusion_matrix.csv", confusion.to_csv())
    plot_confusion(evaluation.confusion, names, folder / "confusion_matrix.png")
    write_unreadable(unreadable, folder)
    write_json(folder / "results.json", results)
    return results


def write_unreadable(lines: list[str], folder: Path) -> None:
    """List the images that were skipped, if there are any."""
    if lines:
        write_text(folder / "unreadable.txt", "\n".join(dict.fromkeys(lines)) + "\n")
