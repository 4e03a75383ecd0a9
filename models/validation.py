"""Measure any classifier's file on a split of a data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.backends import Backend, name_outputs_, warm_up
from utils.data.datasets import load_data, with_validation
from utils.data.images import preprocess
from utils.data.loaders import EvalOrder, SplitDataset, choose_workers, make_loader
from utils.data.splits import ImageData
from utils.loop.engine import evaluate
from utils.measures.metrics import Evaluation
from utils.spec import ModelSpec


@dataclass(frozen=True)
class Measurement:
    """An evaluation, the classes it is about, and what a reader should know of it."""

    evaluation: Evaluation
    spec: ModelSpec
    unreadable: list[str]
    notes: list[str]


def load_for(backend: Backend, data: str, split: str, val_fraction: float | None, seed: int | None, download: bool = False) -> ImageData:
    """Load a data set with labels in the order of a classifier's outputs, classes matched by name.

    Args:
        backend: the classifier; its training run's record says which part of train was held out.
        data: as ``load_data`` takes it.
        split: what will be measured; a held-out part is made only where "val" or "train" is asked for.
        val_fraction, seed: of the held-out part, where not the record's.
        download: fetch a built-in data set that is not there.

    Raises:
        UserError: no such data or split, or classes that the classifier does not know.
    """
    found = load_data(data, download=download)
    record, wants_part = backend.record, split in ("train", "val") and "train" in found.splits
    if wants_part and "val" not in found.splits:
        fraction = record.get("val_fraction", 0.1) if val_fraction is None else val_fraction
        found = with_validation(found, fraction, record.get("seed", 0) if seed is None else seed)
    found.split(split)
    if backend.named:
        return found.for_classes(backend.spec.class_names)
    name_outputs_(backend, found.class_names, data)
    return found


def measure(backend: Backend, data: ImageData, split: str, batch_size: int, workers: int, device: torch.device) -> Measurement:
    """Evaluate a classifier on one split, after a warm-up.

    Raises:
        UserError: no image of the split can be read, or the network does not take this size.
    """
    part, spec = data.split(split), backend.spec
    dataset = SplitDataset(part, spec, lambda image, _: preprocess(image, spec), substitute=False)
    loader = make_loader(dataset, EvalOrder(len(part), batch_size, 0, 1), choose_workers(workers, 1), device)
    warm_up(backend, min(batch_size, len(part)))
    evaluation = evaluate(backend.logits, spec.num_classes, loader, device, part.name)
    unreadable = [*data.unreadable, *(f"{name}: could not be decoded" for name in evaluation.unreadable)]
    return Measurement(evaluation, spec, unreadable, backend.notes)
