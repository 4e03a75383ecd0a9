"""Decoded images kept in memory or in a file, so that each is decoded once and not in every epoch."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.data.images import Image, UnreadableImage
from utils.data.splits import Split
from utils.errors import UserError, unknown
from utils.files.checkpoint import atomic_write

CACHES = ("ram", "disk")
CHUNK = 512  # images decoded between two writes
MEMORY_SHARE = 0.8  # of what is free


@dataclass(frozen=True)
class CachedImages:
    """Images in one flat uint8 buffer that worker processes share: forked memory, or a mapped file.

    Attributes:
        buffer: all pixels, one image after another.
        offsets: int64[N]; where each image starts, or -1 if it could not be decoded.
        shapes: int64[N, 3]; height, width, channels.
        original: the images that were decoded.
    """

    buffer: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    shapes: NDArray[np.int64]
    original: Split

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int, channels: int, min_side: int) -> Image:
        start, shape = int(self.offsets[index]), self.shapes[index]
        if start < 0:
            raise UnreadableImage("could not be decoded")
        return self.buffer[start : start + int(shape.prod())].reshape(*shape)

    def name(self, index: int) -> str:
        return self.original.name(index)

    def check(self, index: int) -> str | None:
        return None if self.offsets[index] >= 0 else "could not be decoded"


def cache_split(split: Split, kind: str, channels: int, min_side: int, folder: Path) -> tuple[Split, str]:
    """Decode a split once and keep its images.

    Args:
        split: the images.
        kind: "ram", or "disk" for a file in ``folder`` that later runs use again.
        channels, min_side: as ``Images.read`` takes them.
        folder: for the files of "disk".

    Returns:
        The split that reads from the cache (the original one if memory is too small for "ram"), and a line that says
        how much is cached or why nothing is.

    Raises:
        UserError: unknown kind of cache, or no image can be decoded.
        OSError: the file can't be written.
    """
    if kind not in CACHES:
        raise unknown("cache", kind, CACHES)
    if kind == "ram":
        needed, free = _estimate_bytes(split, channels, min_side), _free_memory()
        if needed > free * MEMORY_SHARE:
            return split, f"not cached: {needed / 1e9:.1f} GB of pixels, {free / 1e9:.1f} GB of memory free; try --cache disk"
        pixels = bytearray()
        offsets, shapes = _decode_all(split, channels, min_side, pixels.extend)
        buffer = np.frombuffer(pixels, np.uint8)
    else:
        buffer, offsets, shapes = _disk_cache(split, channels, min_side, folder)
    images = CachedImages(buffer, offsets, shapes, split)
    return Split(images, split.labels, np.arange(len(split))), f"{len(split)} images, {buffer.nbytes / 1e6:.1f} MB in {kind}"


def _decode_all(
    split: Split, channels: int, min_side: int, write: Callable[[bytes], object]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    offsets, shapes = np.full(len(split), -1), np.zeros((len(split), 3), np.int64)

    def decode(index: int) -> Image | None:
        try:
            return split.read(index, channels, min_side)
        except UnreadableImage:
            return None

    position = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(split), CHUNK):
            for index, image in enumerate(pool.map(decode, range(start, min(start + CHUNK, len(split)))), start):
                if image is not None:
                    write(image.tobytes())
                    offsets[index], shapes[index] = position, image.shape
                    position += image.nbytes
    return offsets, shapes


def _disk_cache(split: Split, channels: int, min_side: int, folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Map the file of this split, after writing it if need be; its name is a hash of all that its pixels depend on."""
    path = folder / f"{_fingerprint(split, channels, min_side)}.pixels"
    table = path.with_suffix(".npz")
    if not (path.exists() and table.exists()):
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            offsets, shapes = _decode_all(split, channels, min_side, file.write)
        with atomic_write(table) as temporary, temporary.open("wb") as file:
            np.savez(file, offsets=offsets, shapes=shapes)
    with np.load(table) as arrays:
        offsets, shapes = arrays["offsets"], arrays["shapes"]
    if path.stat().st_size == 0:
        raise UserError(f"no image of the split could be decoded for the cache {path}")
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8), offsets, shapes


def _fingerprint(split: Split, channels: int, min_side: int) -> str:
    digest = hashlib.sha256(f"{channels} {min_side}".encode())
    for name in map(split.name, range(len(split))):
        digest.update(os.fsencode(name))
        if os.path.exists(name):
            status = os.stat(name)
            digest.update(os.fsencode(f"{os.path.abspath(name)} {status.st_size} {status.st_mtime_ns}"))
    return digest.hexdigest()[:24]


def _estimate_bytes(split: Split, channels: int, min_side: int, samples: int = 64) -> int:
    """Estimate a split's decoded size from evenly spaced samples."""
    positions = np.unique(np.linspace(0, len(split) - 1, min(samples, len(split))).astype(int))
    sizes = []
    for position in positions:
        try:
            sizes.append(split.read(int(position), channels, min_side).nbytes)
        except UnreadableImage:
            continue
    return int(np.mean(sizes) * len(split)) if sizes else 0


def _free_memory() -> int:
    """Return the bytes available without swapping; if the system does not tell, as good as infinite."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 60
