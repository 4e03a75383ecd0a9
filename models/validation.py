"""Evaluate any classifier on a split of a data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.backends import Backend, name_outputs_, warm_up
from utils.data.checking import unreadable_notes
from utils.data.datasets import load_data, with_validation
from utils.data.formats import MAX_PIXELS
from utils.data.images import preprocess
from utils.data.loaders import EvalOrder, SplitDataset, choose_workers, make_loader
from utils.data.splits import ImageData
from utils.loop.engine import evaluate
from utils.measures.metrics import Evaluation
from utils.spec import ModelSpec


@dataclass(frozen=True)
class Measurement:
    """An evaluation, with the classifier's specification and what the user should know."""

    evaluation: Evaluation
    spec: ModelSpec
    unreadable: list[str]
    notes: list[str]


def load_for(
    backend: Backend,
    data: str,
    split: str,
    val_fraction: float | None,
    seed: int | None,
    download: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> ImageData:
    """Load a data set with labels in the order of a classifier's outputs; classes are matched by name.

    Without a val folder, the splits "val" and "train" are the parts of train that the training run held out and kept, by its
    record unless ``val_fraction`` and ``seed`` are given.

    Raises:
        UserError: there is no such data or split, or the classifier does not know its classes.
    """
    found = load_data(data, download=download, max_pixels=max_pixels)
    record, wants_part = backend.record, split in ("train", "val") and "train" in found.splits
    if wants_part and "val" not in found.splits:
        fraction = record.get("val_fraction", 0.1) if val_fraction is None else val_fraction
        found = with_validation(found, fraction, record.get("seed", 0) if seed is None else seed)
    found.split(split)
    backend.notes += unreadable_notes(found.unreadable, listed=False)
    if backend.named:
        return found.for_classes(backend.spec.class_names)
    name_outputs_(backend, found.class_names, data)
    return found


def measure(backend: Backend, data: ImageData, split: str, batch_size: int, workers: int, device: torch.device) -> Measurement:
    """Evaluate a classifier on one split, after a warm-up.

    Raises:
        UserError: no image of the split can be read, or the network does not take images of this size.
    """
    part, spec = data.split(split), backend.spec
    dataset = SplitDataset(part, spec, lambda image, _: preprocess(image, spec), substitute=False)
    loader = make_loader(dataset, EvalOrder(len(part), batch_size, 0, 1), choose_workers(workers, 1), device)
    warm_up(backend, min(batch_size, len(part)))
    evaluation = evaluate(backend.logits, spec.num_classes, loader, device, part.name)
    unreadable = [*data.unreadable, *(f"{name}: could not be decoded" for name in evaluation.unreadable)]
    return Measurement(evaluation, spec, unreadable, backend.notes)
