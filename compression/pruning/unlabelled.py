"""A folder of images without labels: what a cut needs, and the dense network's own classes in place of labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.backends import TorchBackend
from utils.data.images import is_image_file, preprocess
from utils.data.loaders import Draw, SplitDataset
from utils.data.splits import FileImages, ImageData, Split
from utils.errors import UserError

HELD_OUT, MOST = 0.2, 1000  # of the images, at most so many, to measure on


def images_without_labels(folder: str) -> list[Path]:
    """Return the images that lie in a folder itself, sorted, if none lies in a folder of its own; else nothing."""
    root = Path(folder)
    if not root.is_dir():
        return []
    files = sorted(path for path in root.iterdir() if path.is_file() and is_image_file(path, root))
    below = any(is_image_file(path, root) for child in root.iterdir() if child.is_dir() for path in child.rglob("*"))
    return [] if below else files


def labelled_by(dense: TorchBackend, files: list[Path], name: str, count: int, batch_size: int, seed: int) -> ImageData:
    """Return images as a data set whose labels are the dense network's classes: accuracy on it is agreement with that network.

    Args:
        dense: the dense network.
        files: images.
        name: of the data.
        count: images to score and refit on ("train"); a fifth of all, ``MOST`` at most, is held out ("val").

    Raises:
        UserError: fewer than two can be read.
    """
    split, bad = Split.of(FileImages(files), [0] * len(files)).readable()
    if len(split) < 2:
        raise UserError(f"data '{name}' has {len(split)} readable image(s); at least two are needed, one of them to measure on")
    order = np.random.default_rng([seed, 0x1AB]).permutation(len(split))
    held_out = min(max(round(HELD_OUT * len(split)), 1), MOST)
    splits = {}
    for part, positions in (("train", order[held_out : held_out + count]), ("val", order[:held_out])):
        chosen = split.take(np.sort(positions))
        splits[part] = replace(chosen, labels=_classes(dense, chosen, batch_size)) if len(chosen) else chosen
    return ImageData(name, dense.spec.class_names, splits, unreadable=bad)


def _classes(dense: TorchBackend, split: Split, batch_size: int) -> NDArray[np.int64]:
    """Return the class that a network gives each image."""
    spec = dense.spec
    dataset = SplitDataset(split, spec, lambda image, _: preprocess(image, spec), substitute=True)
    found = []
    for begin in range(0, len(split), batch_size):
        batch = dataset.__getitems__([Draw(position, 0) for position in range(begin, min(begin + batch_size, len(split)))])
        found.append(dense.logits(batch.images).argmax(1).numpy())
    return np.concatenate(found)
