"""Metrics of a classifier: top-1, top-5, loss, and per class precision, recall, F1 and support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils import distributed
from utils.errors import UserError

TOP5 = 5

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Tally:
    """Counts that add up exactly over batches and processes.

    Attributes:
        confusion: int64 [true classes, predicted classes].
        top5: images whose true class is among the five likeliest.
        loss: sum of the images' cross-entropies.
    """

    confusion: Tensor
    top5: int = 0
    loss: float = 0.0

    @classmethod
    def empty(cls, num_classes: int) -> Tally:
        """Return a tally with no images."""
        return cls(torch.zeros(num_classes, num_classes, dtype=torch.int64))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: float logits [B, classes] and labels [B]; images with the label -1 are not counted."""
        valid = labels >= 0
        logits, labels = logits[valid], labels[valid]
        if not len(labels):
            return
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        classes = self.confusion.shape[0]
        pairs = labels * classes + top[:, 0]
        self.confusion += torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).cpu()
        self.top5 += int((top == labels[:, None]).any(1).sum())
        self.loss += float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))

    def over_all_ranks(self, device: torch.device) -> Tally:
        """Return the sum over all processes."""
        confusion = distributed.sum_(self.confusion.to(device)).cpu()
        sums = torch.tensor([float(self.top5), self.loss], dtype=torch.float64, device=device)
        top5, loss = distributed.sum_(sums).tolist()
        return Tally(confusion, round(top5), loss)


@dataclass(frozen=True)
class Evaluation:
    """The result on one split; top-1 and top-5 are fractions.

    Attributes:
        speed_ms: milliseconds per image for preprocess (with reading and decoding), inference and postprocess.
        unreadable: names of images that were skipped.
        correct: for each image that was read, in order, whether top-1 is right; None on several processes.
    """

    top1: float
    top5: float
    loss: float
    images: int
    confusion: Tensor
    speed_ms: dict[str, float] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()
    correct: Tensor | None = None

    @classmethod
    def of(cls, tally: Tally, **details: Any) -> Evaluation:
        """Turn counts into fractions.

        Raises:
            UserError: nothing was counted.
        """
        images = int(tally.confusion.sum())
        if not images:
            raise UserError("no image of this split could be read, so there is nothing to measure")
        top1 = int(tally.confusion.diagonal().sum()) / images
        return cls(top1, tally.top5 / images, tally.loss / images, images, tally.confusion, **details)

    @property
    def text(self) -> str:
        """Accuracies and loss, as they are printed."""
        return accuracy_text({"top1": self.top1, "top5": self.top5, "loss": self.loss}, len(self.confusion))

    def better_than(self, other: Evaluation | None) -> bool:
        """Whether top-1 is higher, or equal with a lower loss."""
        return other is None or (self.top1, -self.loss) > (other.top1, -other.loss)


def accuracy_text(values: Mapping[str, float], classes: int) -> str:
    """Return top-1, top-5 and loss as text; with five classes or fewer top-5 is always all, so it is left out."""
    top5 = f", top-5 {values['top5']:.2%}" if classes > TOP5 else ""
    return f"top-1 {values['top1']:.2%}{top5}, loss {values['loss']:.4f}"


def per_class(evaluation: Evaluation, class_names: tuple[str, ...]) -> pd.DataFrame:
    """Return precision, recall, F1 and support, a row per class; a fraction of nothing is 0."""
    import pandas as pd

    confusion = evaluation.confusion.double()
    hits, predicted, support = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    precision, recall = hits / predicted.clamp(min=1), hits / support.clamp(min=1)
    f1 = 2 * hits / (predicted + support).clamp(min=1)
    columns = {"precision": precision.numpy(), "recall": recall.numpy(), "f1": f1.numpy(), "support": support.long().numpy()}
    return pd.DataFrame({"class": list(class_names), **columns})
