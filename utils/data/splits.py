"""The parts of a data set: images however they are stored, splits with labels, and the whole with its class names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.data.checking import Looks, look_at
from utils.data.formats import MAX_PIXELS
from utils.data.images import Image, UnreadableImage, as_channels, defect, read_image
from utils.data.listing import PathList
from utils.errors import UserError, nearest
from utils.spec import ImageSize


class Images(Protocol):
    """A sequence of images, any of which may turn out unreadable."""

    def __len__(self) -> int: ...

    def read(self, index: int, channels: int, min_side: int) -> Image:
        """Return uint8 [H, W, channels]. Raises UnreadableImage."""

    def name(self, index: int) -> str:
        """Return the name by which a user knows the image, usually its path."""

    def check(self, index: int) -> str | None:
        """Return what is wrong with the image, found without decoding it, or None."""


@dataclass(frozen=True)
class FileImages:
    """Image files; one of more than ``max_pixels`` once reduced is unreadable."""

    paths: Sequence[Path]
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, channels: int, min_side: int) -> Image:
        return read_image(self.paths[index], channels, min_side, self.max_pixels)

    def name(self, index: int) -> str:
        return self.paths.name(index) if isinstance(self.paths, PathList) else str(self.paths[index])

    def check(self, index: int) -> str | None:
        try:
            return defect(self.paths[index].read_bytes())
        except OSError as error:
            return error.strerror or "can't be read"


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory, uint8 [N, H, W] or [N, H, W, C]."""

    array: NDArray[np.uint8]
    prefix: str

    def __len__(self) -> int:
        return len(self.array)

    def read(self, index: int, channels: int, min_side: int) -> Image:
        return as_channels(self.array[index], channels)

    def name(self, index: int) -> str:
        return f"{self.prefix}/{index}"

    def check(self, index: int) -> str | None:
        return None


@dataclass(frozen=True)
class PillowImages:
    """Any torchvision data set, which hands out Pillow images."""

    dataset: Any
    prefix: str

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int, channels: int, min_side: int) -> Image:
        try:
            image = self.dataset[index][0]
            return as_channels(np.asarray(image.convert("L" if channels == 1 else "RGB")), channels)
        except (OSError, SyntaxError) as error:  # what Pillow raises for a broken file
            raise UnreadableImage(str(error)) from None

    def name(self, index: int) -> str:
        return f"{self.prefix}/{index}"

    def check(self, index: int) -> str | None:
        return None


@dataclass(frozen=True)
class Split:
    """A selection of images, in order, with their labels; itself ``Images``, indexed by position in the split.

    Attributes:
        images: where the split's images come from, and perhaps others.
        labels: int64[N]; indices into the class names.
        rows: int64[N]; the image at position i is ``images[rows[i]]``.
        looks: what ``readable`` saw of all of ``images``, by row.
    """

    images: Images
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    looks: Looks | None = None

    @classmethod
    def of(cls, images: Images, labels: Sequence[int] | NDArray[Any]) -> Split:
        """Make a split of all images."""
        return cls(images, np.asarray(labels, dtype=np.int64), np.arange(len(images)))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int, channels: int, min_side: int) -> Image:
        return self.images.read(int(self.rows[index]), channels, min_side)

    def name(self, index: int) -> str:
        return self.images.name(int(self.rows[index]))

    def check(self, index: int) -> str | None:
        return self.images.check(int(self.rows[index]))

    def take(self, positions: NDArray[Any]) -> Split:
        """Return the part at these positions."""
        return replace(self, labels=self.labels[positions], rows=self.rows[positions])

    def relabel(self, mapping: NDArray[np.int64]) -> Split:
        """Return the split with label ``i`` replaced by ``mapping[i]``."""
        return replace(self, labels=mapping[self.labels])

    def readable(self) -> tuple[Split, list[str]]:
        """Return the part that ``check`` finds nothing wrong with, and a line ``name: reason`` for each other image."""
        if isinstance(self.images, FileImages):
            looks: Looks | None = look_at(self.images.paths)
            assert looks
            reasons = [looks.reasons[row] for row in self.rows.tolist()]
        else:
            looks, reasons = None, [self.check(position) for position in range(len(self))]
        bad = [f"{self.name(position)}: {reason}" for position, reason in enumerate(reasons) if reason]
        seen = replace(self, looks=looks)
        return (seen.take(np.array([not reason for reason in reasons], dtype=bool)) if bad else seen), bad

    def digest(self) -> str:
        """Return a hash of file names and labels, which does not depend on where the files are."""
        digest = hashlib.sha256()
        for position, label in enumerate(self.labels.tolist()):
            digest.update(os.fsencode(f"{chr(10) if position else ''}{os.path.basename(self.name(position))}:{label}"))
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ImageData:
    """A data set: class names, the splits that it has (of ``train``, ``val``, ``test``), and its own defaults."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    imgsz: ImageSize | None = None
    channels: int = 3
    augment: str = ""
    fliplr: float = 0.5
    unreadable: list[str] = field(default_factory=list)

    def split(self, name: str) -> Split:
        """Return a split by name.

        Raises:
            UserError: this data set has no such split.
        """
        if name not in self.splits:
            raise UserError(f"data '{self.name}' has no split '{name}'; it has: {', '.join(self.splits)}")
        return self.splits[name]

    def for_classes(self, class_names: Sequence[str]) -> ImageData:
        """Return the data relabelled for another list of class names; classes are matched by name.

        Raises:
            UserError: the data has a class that is not in the list.
        """
        index = {name: i for i, name in enumerate(class_names)}
        if twice := [name for name in self.class_names if class_names.count(name) > 1]:
            raise UserError(f"the weights have several classes named '{twice[0]}', so the data's class of that name fits none")
        if missing := [name for name in self.class_names if name not in index]:
            raise UserError(
                f"data '{self.name}' has {len(self.class_names)} classes, the weights know {len(class_names)}; unknown to them: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}.{nearest(missing[0], class_names)}"
            )
        mapping = np.array([index[name] for name in self.class_names], dtype=np.int64)
        return replace(self, class_names=tuple(class_names), splits={k: s.relabel(mapping) for k, s in self.splits.items()})
