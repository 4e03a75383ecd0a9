"""The image files of class folders, listed fast and held in little memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from utils.data.images import IMAGE_SUFFIXES


class PathList(Sequence[Path]):
    """Paths as one string of bytes and their places in it: a path object of its own takes ten times the memory."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.text = b"".join(encoded)
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    @classmethod
    def joined(cls, parts: Iterable[PathList]) -> PathList:
        """Return the paths of several lists as one."""
        lists, paths = list(parts), cls([])
        paths.text = b"".join(part.text for part in lists)
        begins = np.cumsum([0, *(len(part.text) for part in lists)])
        paths.ends = np.concatenate([paths.ends, *(part.ends + begin for part, begin in zip(lists, begins, strict=False))])
        return paths

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        """Return a path as text."""
        begin = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.text[begin : int(self.ends[index])])

    def ending(self, suffix: str) -> NDArray[np.bool_]:
        """Return which paths end with a suffix, in any case."""
        wanted, text = suffix.lower().encode(), np.frombuffer(self.text, np.uint8)
        begins = np.concatenate([[0], self.ends[:-1]])
        found = self.ends - begins >= len(wanted)
        places = self.ends[found, None] - np.arange(len(wanted), 0, -1)
        letters = text[places]
        lower = np.where((letters >= ord("A")) & (letters <= ord("Z")), letters + 32, letters)
        found[found] = (lower == np.frombuffer(wanted, np.uint8)).all(1)
        return found

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return Path(self.name(range(len(self))[index]))


def list_classes(folder: Path) -> dict[str, PathList]:
    """Return the image files below each folder of a folder, in the order of their paths; hidden ones are left out."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    return {name: PathList(sorted(_files_below(os.path.join(folder, name)), key=lambda path: path.split(os.sep))) for name in classes}


def in_order(names: Iterable[str]) -> list[str]:
    """Sort the names of classes; where all are numbers, by their values."""
    found = sorted(names)
    return sorted(found, key=int) if all(name.isdecimal() and name.isascii() for name in found) else found


def _files_below(folder: str) -> Iterator[str]:
    """Yield the image files in a folder and in those below it that are no links."""
    inner = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                inner.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                yield entry.path
    for path in inner:
        yield from _files_below(path)
