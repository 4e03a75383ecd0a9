"""The images of a training run: its splits, the order they come in, and their loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from compression.scoring.calibration import Calibration, sample
from compression.training.arguments import TrainArguments
from utils import distributed
from utils.data.caching import CachedImages
from utils.data.images import preprocess
from utils.data.loaders import EvalOrder, SplitDataset, TrainOrder, choose_workers, make_loader, sampling_probabilities
from utils.data.splits import ArrayImages, ImageData
from utils.data.transforms import Augmentation, TrainTransform
from utils.errors import UserError
from utils.spec import ModelSpec

CALIBRATION_IMAGES, CALIBRATION_BATCH = 256, 32  # for what a schedule measures


class Loaders(NamedTuple):
    """The loaders of a run's batches, of this rank's share; ``test`` is None if the data has no such split."""

    train: DataLoader[Any]
    val: DataLoader[Any]
    test: DataLoader[Any] | None


class DataFeed:
    """Loads a run's images.

    Args:
        arguments: batch size, workers, seed, balance.
        data: the splits.
        spec: the size and channels of the network's input.
        augmentation: what training images go through.
        device: where the batches go.
    """

    def __init__(
        self, arguments: TrainArguments, data: ImageData, spec: ModelSpec, augmentation: Augmentation, device: torch.device
    ) -> None:
        self.arguments, self.data, self.spec, self.device = arguments, data, spec, device
        train = data.split("train")
        self.world, self.rank = distributed.world_size(), distributed.rank()
        self.workers = choose_workers(arguments.workers, self.world)
        in_memory = isinstance(train.images, ArrayImages | CachedImages)
        if device.type == "cpu" and in_memory and not augmentation.is_heavy:
            self.workers = 0  # a batch loads in a few percent of a step's time; workers would cost the network more than that
        if not 0 < arguments.effective_train_size <= 1:
            raise UserError(f"effective-train-size is {arguments.effective_train_size}, a share of the images; it must lie in (0, 1]")
        self.train_set = SplitDataset(train, spec, TrainTransform(augmentation, spec), substitute=True)
        self.order = TrainOrder(
            len(train), arguments.batch_size // self.world, arguments.seed, self.rank, self.world, arguments.effective_train_size
        )
        if self.order.images < 2 * self.world and arguments.effective_train_size < 1:
            raise UserError(f"effective-train-size {arguments.effective_train_size:g} leaves {self.order.images} of {len(train)} images")
        if arguments.balance == "sampler":
            self.order.weights = sampling_probabilities(train.labels, spec.num_classes)
        self.train_loader = make_loader(self.train_set, self.order, self.workers, device)
        self.val_set, self.val_loader = self.evaluation("val")

    def loaders(self) -> Loaders:
        """Return the loaders of the splits."""
        return Loaders(self.train_loader, self.val_loader, self.evaluation("test")[1] if "test" in self.data.splits else None)

    def evaluation(self, split: str) -> tuple[SplitDataset, DataLoader[Any]]:
        """Return a split without augmentation, and the loader of this rank's share.

        Raises:
            UserError: the data has no such split.
        """
        images = self.data.split(split)
        dataset = SplitDataset(images, self.spec, lambda image, _: preprocess(image, self.spec), substitute=False)
        order = EvalOrder(len(images), max(2 * self.arguments.batch_size // self.world, 1), self.rank, self.world)
        return dataset, make_loader(dataset, order, self.workers, self.device)

    def batches(self, epoch: int, step: int) -> Iterator[Any]:
        """Return an epoch's training batches from a step on."""
        self.order.epoch, self.order.start = epoch, step
        return iter(self.train_loader)

    def examples(self, split: str) -> Calibration:
        """Return a sample of a split's images as the network sees them in evaluation, the same on every rank."""
        return sample(self.data.split(split), self.spec, CALIBRATION_IMAGES, CALIBRATION_BATCH, self.arguments.seed)

    def calibration(self) -> Calibration:
        """Return the training images that a schedule measures the network on."""
        return self.examples("train")
