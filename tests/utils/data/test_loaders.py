import os
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from utils.data.images import UnreadableImage
from utils.data.loaders import (
    BALANCES,
    Draw,
    EvalOrder,
    SplitDataset,
    TrainOrder,
    check_balance,
    choose_workers,
    class_weights,
    make_loader,
    mix_seed,
    sampling_probabilities,
)
from utils.data.splits import ArrayImages, Split
from utils.data.transforms import PRESETS, TrainTransform
from utils.errors import UserError
from utils.spec import ModelSpec

SPEC = ModelSpec("x", 2, 8, channels=1)


class Patchy:
    """Images filled with their number, some of which can't be read."""

    def __init__(self, count, unreadable=()):
        self.count, self.unreadable, self.asked = count, unreadable, []

    def __len__(self):
        return self.count

    def read(self, index, channels, min_side):
        self.asked.append((channels, min_side))
        if index in self.unreadable:
            raise UnreadableImage("broken")
        return np.full((8, 8, channels), index, np.uint8)


def dataset(count, unreadable=(), substitute=False, transform=lambda image, seed: image):
    return SplitDataset(Split.of(Patchy(count, unreadable), [i % 2 for i in range(count)]), SPEC, transform, substitute)


def train_batches(length, batch_size, rank=0, world_size=1, epoch=0, start=0, seed=3):
    order = TrainOrder(length, batch_size, seed, rank, world_size)
    order.epoch, order.start = epoch, start
    return list(order)


@pytest.mark.parametrize(
    ("length", "batch_size", "world_size", "sizes"),
    [
        (10, 4, 1, [4, 4, 2]),
        (9, 4, 1, [4, 5]),  # a last batch of one joins the one before
        (8, 4, 1, [4, 4]),
        (1, 4, 1, [1]),
        (3, 1, 1, [1, 1, 1]),
        (10, 4, 3, [4]),  # ceil(10 / 3) = 4 each
        (13, 4, 3, [5]),  # ceil(13 / 3) = 5 = 4 + 1
        (2, 4, 3, [1]),
    ],
)
def test_batch_sizes(length, batch_size, world_size, sizes):
    for rank in range(world_size):
        order = TrainOrder(length, batch_size, 0, rank, world_size)
        assert order.batch_sizes() == sizes
        assert len(order) == len(sizes)
        assert [len(batch) for batch in order] == sizes


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 7, 12, 31])
def test_an_epoch_shows_every_image_once_but_for_the_padding(length, world_size):
    batches = [train_batches(length, 4, rank, world_size) for rank in range(world_size)]
    seen = np.bincount([draw.position for rank in batches for batch in rank for draw in batch], minlength=length)
    assert len({len(rank) for rank in batches}) == 1
    # The order is repeated from its front until every rank has equally many: all images once more often than needed at most.
    padded = -(-length // world_size) * world_size
    assert seen.sum() == padded
    assert seen.min() == padded // length
    assert (seen > seen.min()).sum() == padded % length


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_ranks_together_draw_what_one_process_draws(world_size):
    alone = [draw for batch in train_batches(12, 12) for draw in batch]
    ranks = [[draw for batch in train_batches(12, 12, rank, world_size) for draw in batch] for rank in range(world_size)]
    assert [draw for together in zip(*ranks, strict=True) for draw in together] == alone


def test_order_changes_with_epoch_and_seed_and_repeats():
    assert train_batches(20, 4) == train_batches(20, 4)
    assert train_batches(20, 4) != train_batches(20, 4, epoch=1)
    assert train_batches(20, 4) != train_batches(20, 4, seed=4)
    seeds = [draw.seed for epoch in range(3) for batch in train_batches(50, 4, epoch=epoch) for draw in batch]
    assert len(set(seeds)) == 150
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_restart_in_an_epoch_is_the_rest_of_the_epoch(start, world_size):
    assert train_batches(9 * world_size, 3, 0, world_size, start=start) == train_batches(9 * world_size, 3, 0, world_size)[start:]


def test_weights_draw_images_by_their_probability():
    order = TrainOrder(1000, 10, 0, 0, 1)
    order.weights = np.array([0.0] * 500 + [0.002] * 500)
    positions = [draw.position for batch in order for draw in batch]
    assert len(positions) == 1000
    assert min(positions) >= 500
    assert len(set(positions)) < 500  # drawn with replacement


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 6, 11])
def test_evaluation_covers_every_image_once_over_the_ranks(length, world_size):
    positions = []
    for rank in range(world_size):
        order = EvalOrder(length, 2, rank, world_size)
        batches = list(order)
        assert len(batches) == len(order)
        assert all(len(batch) == 2 for batch in batches[:-1])
        mine = [draw.position for batch in batches for draw in batch]
        assert mine == sorted(mine)
        positions += mine
    assert sorted(positions) == list(range(length))


def test_mix_seed_of_zero_is_half_the_first_number_of_splitmix64():
    assert mix_seed(0) == 0xE220A8397B1DCDAF >> 1  # the published first output for the state 0
    assert len({mix_seed(a, b) for a in range(30) for b in range(30)}) == 900


def test_batch_holds_the_split_rows_labels_and_positions():
    part = SplitDataset(dataset(6).split.take(np.array([5, 2, 3])), SPEC, lambda image, seed: image + seed, False)
    batch = part.__getitems__([Draw(2, 10), Draw(0, 20)])
    assert batch.images.shape == (2, 8, 8, 1)
    assert batch.images[:, 0, 0, 0].tolist() == [13, 25]  # rows 3 and 5, plus their seeds
    assert batch.labels.tolist() == [1, 1]
    assert batch.positions.tolist() == [2, 0]
    assert batch.unreadable == []
    assert batch.seconds > 0
    assert set(part.split.images.asked) == {(1, 16)}  # images are read at no less than twice the input's side
    assert part[Draw(1, 0)].images[0, 0, 0, 0] == 2


def test_unreadable_images_are_black_and_unlabelled_in_validation():
    batch = dataset(4, unreadable={1}).__getitems__([Draw(i, 0) for i in range(3)])
    assert batch.labels.tolist() == [0, -1, 0]
    assert batch.images[:, 0, 0, 0].tolist() == [0, 0, 2]
    assert batch.unreadable == [1]


def test_unreadable_images_are_replaced_by_the_next_readable_in_training():
    batch = dataset(4, unreadable={2, 3}, substitute=True).__getitems__([Draw(1, 0), Draw(2, 0)])
    assert batch.images[:, 0, 0, 0].tolist() == [1, 0]  # 2 and 3 are broken, then the count starts again
    assert batch.labels.tolist() == [1, 0]
    assert batch.positions.tolist() == [1, 2]
    assert batch.unreadable == [2, 3]


@pytest.fixture
def _opencv_threads():
    threads = cv2.getNumThreads()
    yield
    cv2.setNumThreads(threads)


@pytest.mark.usefixtures("_opencv_threads")
@pytest.mark.parametrize("fit", ["crop", "squash", "letterbox"])
def test_training_images_have_the_networks_shape_and_its_distortion(fit):
    """A disc in a long image is seen round but for the crop's own ratio; squashed as much as in validation."""
    image = np.zeros((64, 256, 1), np.uint8)
    cv2.circle(image, (128, 32), 12, 255, -1)
    spec = ModelSpec("x", 2, (32, 64), channels=1, fit=fit)
    transform = TrainTransform(replace(PRESETS["light"], fliplr=0.0), spec)
    squeezed = 2.0 if fit == "squash" else 1.0  # 4 to 1 in 2 to 1
    ratios = []
    for seed in range(200):
        out = transform(image, seed)
        assert out.shape == (32, 64, 1)
        rows, columns = (np.flatnonzero((out[:, :, 0] > 127).any(axis)) for axis in (1, 0))
        if len(rows) > 2 and rows[0] > 0 and rows[-1] < 31 and columns[0] > 0 and columns[-1] < 63:
            ratios.append(len(rows) / len(columns))
    low, high = PRESETS["light"].ratio
    assert len(ratios) > 20
    assert low * 0.7 < min(ratios) / squeezed
    assert max(ratios) / squeezed < high * 1.5


def test_worker_processes_do_not_change_the_batches():
    images = np.random.default_rng(0).integers(0, 256, (11, 10, 12), dtype=np.uint8)
    source = SplitDataset(Split.of(ArrayImages(images, "a"), range(11)), SPEC, TrainTransform(PRESETS["light"], SPEC), True)
    order = TrainOrder(11, 4, 0, 0, 1)
    loaders = [make_loader(source, order, workers, torch.device("cpu")) for workers in (0, 2)]
    for epoch, start in ((0, 0), (1, 1)):
        order.epoch, order.start = epoch, start
        alone, forked = (list(loader) for loader in loaders)
        assert [batch.positions.tolist() for batch in alone] == [[draw.position for draw in draws] for draws in order]
        assert all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(alone, forked, strict=True))


@pytest.mark.parametrize(("wanted", "world_size", "chosen"), [(8, 1, 4), (3, 1, 3), (0, 1, 0), (8, 2, 2), (8, 4, 0), (8, 9, 0)])
def test_workers_are_limited_by_the_share_of_the_cores(wanted, world_size, chosen, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert choose_workers(wanted, world_size) == chosen


def test_negative_workers_are_refused():
    with pytest.raises(UserError, match="workers is -1; it must be at least 0"):
        choose_workers(-1, 1)


def test_class_weights_by_hand():
    labels = np.array([0, 0, 0, 2])
    # 4 images, 2 classes present: 4 / (2 * 3) = 2/3 and 4 / (2 * 1) = 2; mean (3 * 2/3 + 2) / 4 = 1
    assert class_weights(labels, 4).tolist() == pytest.approx([2 / 3, 0, 2, 0])
    # each class is drawn half of the time: 1/2 / 3 and 1/2
    assert sampling_probabilities(labels, 4).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_balance_is_one_of_the_table():
    assert [check_balance(balance) for balance in BALANCES] == ["none", "sampler", "weights"]
    with pytest.raises(UserError, match=r"balance 'weight'. Did you mean 'weights'\? Valid: none, sampler, weights"):
        check_balance("weight")
