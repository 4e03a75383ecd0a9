"""The images on which a network is scored, calibrated and proved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.data.images import preprocess
from utils.data.loaders import Draw, SplitDataset
from utils.data.splits import Split
from utils.data.transforms import normalise
from utils.errors import UserError
from utils.spec import ModelSpec


@dataclass(frozen=True)
class Calibration:
    """Images as the network sees them in evaluation, and their labels.

    Attributes:
        images: uint8 [N, S, S, C].
        labels: int64 [N].
        spec: gives the mean and std.
        batch_size: of a forward pass.
    """

    images: Tensor
    labels: Tensor
    spec: ModelSpec
    batch_size: int

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (normalised float32 inputs [B, C, S, S], labels [B]) in a fixed order."""
        for begin in range(0, len(self), self.batch_size):
            chosen = slice(begin, begin + self.batch_size)
            yield normalise(self.images[chosen], self.spec), self.labels[chosen]

    def head(self, count: int) -> Calibration:
        """Return the first images, which are a sample too: the order is random."""
        return Calibration(self.images[:count], self.labels[:count], self.spec, self.batch_size)

    def tail(self, begin: int) -> Calibration:
        """Return the images from one on."""
        return Calibration(self.images[begin:], self.labels[begin:], self.spec, self.batch_size)


def sample(split: Split, spec: ModelSpec, count: int, batch_size: int, seed: int) -> Calibration:
    """Draw images from a split without repeats, with the transforms of evaluation.

    Raises:
        UserError: a count below 1, or none of the images can be read.
    """
    if count < 1 or batch_size < 1:
        raise UserError(f"images {count} and batch-size {batch_size} must be at least 1")
    positions = np.random.default_rng([seed, 0xCA1]).permutation(len(split))[:count]
    dataset = SplitDataset(split, spec, lambda image, _: preprocess(image, spec), substitute=True)
    batch = dataset.__getitems__([Draw(int(position), 0) for position in positions])
    return Calibration(torch.as_tensor(batch.images), torch.as_tensor(batch.labels), spec, batch_size)
