"""Batches of training and validation images: their order, and the seeds of their augmentation.

Both are functions of (seed, epoch, position), so neither the number of worker processes nor a restart in the middle of
an epoch changes what the network sees.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.data.images import READ_MARGIN, Image, UnreadableImage
from utils.data.splits import Split
from utils.errors import UserError, unknown
from utils.spec import ModelSpec

BALANCES = ("none", "sampler", "weights")


class Batch(NamedTuple):
    """Images uint8 [B, S, S, C], labels int64 [B] (-1: the image could not be read), positions in the split, cost."""

    images: Tensor
    labels: Tensor
    positions: Tensor
    unreadable: list[int]
    seconds: float  # spent on reading, decoding and transforming


class Draw(NamedTuple):
    """One image to load: its position in the split and the seed of its augmentation."""

    position: int
    seed: int


def mix_seed(*parts: int) -> int:
    """Hash integers into a 63-bit seed (splitmix64), so that neighbouring integers give unrelated seeds."""
    state = 0
    for part in parts:
        state = (state + 0x9E3779B97F4A7C15 + part) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class SplitDataset(Dataset[Batch]):
    """Loads a whole batch at a time into one array.

    Args:
        split: images and labels.
        spec: input size and channels.
        transform: (image, seed) -> uint8 [S, S, C].
        substitute: whether the next readable image replaces an unreadable one (training); otherwise its place stays
            black with the label -1 (validation), so that no count includes it.
    """

    def __init__(self, split: Split, spec: ModelSpec, transform: Callable[[Image, int], Image], substitute: bool) -> None:
        self.split, self.spec, self.transform, self.substitute = split, spec, transform, substitute

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        start = time.perf_counter()
        channels = self.spec.channels
        images = np.zeros((len(draws), *self.spec.size, channels), np.uint8)
        labels = np.full(len(draws), -1, np.int64)
        unreadable: list[int] = []
        for i, (position, seed) in enumerate(draws):
            for attempt in range(len(self) if self.substitute else 1):
                candidate = (position + attempt) % len(self)
                try:
                    image = self.split.read(candidate, channels, self.spec.longest * READ_MARGIN)
                except UnreadableImage:
                    unreadable.append(candidate)
                    continue
                images[i], labels[i] = self.transform(image, seed), self.split.labels[candidate]
                break
            else:
                if self.substitute:
                    raise UserError("no training image can be read any more")
        positions = torch.tensor([draw.position for draw in draws])
        seconds = time.perf_counter() - start
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), positions, unreadable, seconds)

    def __getitem__(self, draw: Draw) -> Batch:
        return self.__getitems__([draw])


class TrainOrder(Sampler[list[Draw]]):
    """Batches of one rank for one epoch. Set ``epoch`` and ``start`` before each pass.

    All ranks get the same number of batches: the last ones are filled up from the front of the epoch's order. A last
    batch of one image joins the batch before it, since batch norm needs more than one image.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world_size: int, share: float = 1.0) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.images = max(round(length * share), 1)  # of an epoch; which ones differs from epoch to epoch
        self.weights: NDArray[np.float64] | None = None  # sampling probabilities; None: each image once
        self.epoch, self.start = 0, 0

    def batch_sizes(self) -> list[int]:
        """Sizes of an epoch's batches on one rank."""
        per_rank = -(-self.images // self.world_size)
        sizes = [self.batch_size] * (per_rank // self.batch_size)
        rest = per_rank % self.batch_size
        if rest == 1 and sizes:
            sizes[-1] += 1
        elif rest:
            sizes.append(rest)
        return sizes

    def __len__(self) -> int:
        return len(self.batch_sizes())

    def order(self) -> NDArray[np.int64]:
        """Positions in the split in the epoch's order, the same on every rank."""
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.weights is not None:
            return generator.choice(self.length, self.images, p=self.weights)
        return generator.permutation(self.length)[: self.images]

    def __iter__(self) -> Iterator[list[Draw]]:
        order = self.order()
        padded = np.resize(order, -(-self.images // self.world_size) * self.world_size)
        places = range(self.rank, len(padded), self.world_size)
        begin = 0
        for step, size in enumerate(self.batch_sizes()):
            if step >= self.start:
                yield [Draw(int(padded[place]), mix_seed(self.seed, self.epoch, place)) for place in places[begin : begin + size]]
            begin += size


class EvalOrder(Sampler[list[Draw]]):
    """Batches of one rank in the split's order; over all ranks, each image appears once."""

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int) -> None:
        self.positions = range(rank, length, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        for begin in range(0, len(self.positions), self.batch_size):
            yield [Draw(position, 0) for position in self.positions[begin : begin + self.batch_size]]


def make_loader(dataset: SplitDataset, order: Sampler[list[Draw]], workers: int, device: torch.device) -> DataLoader[Any]:
    """Return torch's loader over the batches of ``order``; with 0 workers, this process loads them itself."""
    options: dict[str, Any] = {}
    if workers:
        # Forked workers share the parent's cached pixels; on systems without fork they get copies. OpenCV's thread pool
        # does not survive a fork (its calls would hang), so it is closed here; the workers need none.
        cv2.setNumThreads(0)
        context = "fork" if sys.platform == "linux" else None
        options = {"multiprocessing_context": context, "persistent_workers": True, "prefetch_factor": 4}
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=order, num_workers=workers, collate_fn=_as_is, pin_memory=device.type == "cuda", **options
    )
    return loader


def choose_workers(wanted: int, world_size: int) -> int:
    """Return the number of workers: at most ``wanted`` and this process's share of the cores; none on one core.

    Raises:
        UserError: a negative number.
    """
    if wanted < 0:
        raise UserError(f"workers is {wanted}; it must be at least 0")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // world_size
    return min(wanted, share) if share > 1 else 0


def class_weights(labels: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """Return a weight per class, inverse to its frequency, with a mean of 1 over the images; 0 for an absent class."""
    counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
    present = counts > 0
    weights = np.zeros(num_classes)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return weights


def check_balance(balance: str) -> str:
    """Return a valid ``--balance`` value.

    Raises:
        UserError: it is none.
    """
    if balance not in BALANCES:
        raise unknown("balance", balance, BALANCES)
    return balance


def sampling_probabilities(labels: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """Return a probability per image, such that all classes are drawn equally often."""
    weights = class_weights(labels, num_classes)[labels]
    return np.asarray(weights / weights.sum())


def _as_is(batch: Sequence[Any]) -> Any:
    return batch
