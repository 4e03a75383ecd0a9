"""Image data sets in tar files, in WebDataset's layout: ``key.jpg`` beside ``key.cls``, or images in a folder per class.

A shard's headers are read once; then any image is read by its place in the file. So the order of the images, resuming to the
batch and several processes on several machines work as they do for folders.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from utils.data.checking import MOST
from utils.data.formats import MAX_PIXELS
from utils.data.images import IMAGE_SUFFIXES, Image, UnreadableImage, decode, defect
from utils.data.listing import PathList
from utils.data.splits import ImageData, Split
from utils.errors import UserError
from utils.files.checkpoint import atomic_write

OPEN_FILES = 256
BRACES = re.compile(r"\{([^{}]*)\}")
LABEL = ".cls"


@dataclass(frozen=True)
class ShardImages:
    """Images inside tar files.

    Attributes:
        shards: the files.
        names: of the images, SHARD/MEMBER.
        places: int64 [N, 3]: the shard's number, first byte, bytes.
        max_pixels: an image of more once reduced is unreadable.
    """

    shards: Sequence[str]
    names: PathList
    places: NDArray[np.int64]
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int, channels: int, min_side: int) -> Image:
        return decode(self._bytes(index), channels, min_side, self.max_pixels)

    def name(self, index: int) -> str:
        return self.names.name(index)

    def check(self, index: int) -> str | None:
        if len(self) > MOST:
            return None
        try:
            return defect(self._bytes(index))
        except UnreadableImage as error:
            return str(error)

    def _bytes(self, index: int) -> bytes:
        shard, begin, count = self.places[index].tolist()
        try:
            data = os.pread(_opened(self.shards[shard]).fileno(), count, begin)
        except OSError as error:
            raise UnreadableImage(error.strerror or "can't be read") from None
        if len(data) < count:
            raise UnreadableImage("the shard is cut off")
        return data


@lru_cache(OPEN_FILES)
def _opened(path: str) -> BinaryIO:
    return open(path, "rb")


def is_shards(data: str) -> bool:
    """Return whether --data names tar files."""
    return data.endswith((".tar", ".tar}", ".tar.gz", ".tgz"))


def expand(pattern: str) -> list[str]:
    """Return the files of a pattern with braces, ``{000..099}`` and ``{a,b}``, or with wildcards.

    Raises:
        UserError: a file is not there, or none matches.
    """
    parts = BRACES.split(pattern)
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    paths = ["".join(chosen) for chosen in product(*choices)]
    if glob.has_magic(pattern) and len(paths) == 1:
        paths = sorted(glob.glob(pattern))
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise UserError(f"no shard {missing[0]}: {len(missing)} of the {len(paths)} files of '{pattern}' are not there")
    if not paths:
        raise UserError(f"the pattern {pattern} matches no files")
    return paths


def _choices(part: str) -> list[str]:
    if match := re.fullmatch(r"([0-9]+)\.\.([0-9]+)", part):
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        if not 0 <= last - first < 10**6:
            raise UserError(f"the range {{{part}}} must go up, by less than a million")
        return [f"{number:0{width}d}" for number in range(first, last + 1)]
    return part.split(",")


def load_shards(pattern: str, max_pixels: int = MAX_PIXELS) -> ImageData:
    """Load shards as training images; files beside them that have val or test in the place of train are the other splits.

    Raises:
        UserError: a file is missing, damaged or packed, or its images have no labels.
    """
    files = {"train": expand(pattern)}
    folder, name = os.path.split(pattern)
    for split in ("val", "test"):
        beside = os.path.join(folder, BRACES.sub("*", name).replace("train", split))
        if "train" in name and (found := sorted(glob.glob(beside))):
            files[split] = found
    return splits_of(files, pattern, max_pixels)


def splits_of(files: dict[str, list[str]], name: str, max_pixels: int = MAX_PIXELS) -> ImageData:
    """Return the data of each split's shards; classes are those of train, named by their folders or numbers."""
    indexed = {split: _index(paths) for split, paths in files.items()}
    naming = {label for _, _, labels in (indexed.get("train") or next(iter(indexed.values())),) for label in labels}
    numbered = all(label.isdecimal() for label in naming)
    classes = [str(i) for i in range(max(map(int, naming)) + 1)] if numbered else sorted(naming)
    number = {label: i for i, label in enumerate(classes)}
    splits = {}
    for split, (names, places, labels) in indexed.items():
        labels = [str(int(label)) for label in labels] if numbered and all(label.isdecimal() for label in labels) else labels
        if strangers := set(labels) - set(number):
            raise UserError(f"data '{name}': {split} has the class '{min(strangers)}', which the training images do not have")
        images = ShardImages(files[split], PathList(names), places, max_pixels)
        splits[split] = Split.of(images, [number[label] for label in labels])
    return ImageData(name, tuple(classes), splits)


def _index(paths: list[str]) -> tuple[list[str], NDArray[np.int64], list[str]]:
    """Return names, places and labels of the images of shards; they are kept in a file beside the first for the next time."""
    stamp = "\n".join(f"{path} {(stat := os.stat(path)).st_size} {stat.st_mtime_ns}" for path in paths)
    kept = Path(paths[0]).with_name(f".rankcut-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.npz")
    if kept.exists():
        with np.load(kept, allow_pickle=False) as file:
            return _split(file["names"]), file["places"], _split(file["labels"])
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_members, paths))
    names = [name for members in found for name, *_ in members]
    places = np.array([(i, begin, count) for i, members in enumerate(found) for _, begin, count, _ in members], np.int64).reshape(-1, 3)
    labels = [label for members in found for *_, label in members]
    if not names:
        raise UserError(f"{paths[0]} and the others hold no images with a label: KEY.jpg beside KEY{LABEL}, or images in class folders")
    try:
        with atomic_write(kept) as temporary, temporary.open("wb") as file:
            np.savez(file, names=_joined(names), places=places, labels=_joined(labels))
    except OSError:
        pass  # a folder that can't be written into costs a new look each time
    return names, places, labels


def _joined(texts: list[str]) -> NDArray[np.uint8]:
    """Return texts as one array of bytes, which takes a fraction of NumPy's array of texts."""
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def _split(array: NDArray[np.uint8]) -> list[str]:
    return array.tobytes().decode("utf-8", "surrogateescape").split("\0")


def _members(path: str) -> list[tuple[str, int, int, str]]:
    """Return (name, first byte, bytes, label) of each image of a shard."""
    images, labels = [], {}
    try:
        with tarfile.open(path, "r:") as archive, open(path, "rb") as file:
            for member in _files(archive):
                key = _key(member.name)
                if member.name.endswith(LABEL):
                    labels[key] = os.pread(file.fileno(), member.size, member.offset_data).decode("ascii", "replace").strip()
                elif os.path.splitext(member.name)[1].lower() in IMAGE_SUFFIXES:
                    images.append((member.name, member.offset_data, member.size, key))
    except tarfile.ReadError as error:
        packed = "; a packed one can't be read at any place, unpack it" if path.endswith("gz") else ""
        raise UserError(f"{path} is no tar file, or is damaged ({error}){packed}") from None
    found = []
    for name, begin, count, key in images:
        label = labels.get(key) or name.rpartition("/")[0].rpartition("/")[2]
        if label and label.isprintable():
            found.append((f"{path}/{name}", begin, count, label))
    return found


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while member := archive.next():
        archive.members.clear()  # type: ignore[attr-defined] # or all headers stay in memory
        if member.isreg():
            yield member


def _key(name: str) -> str:
    """Return what the files of a sample have in common: the name up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"
