"""A look at image files before training, which decodes nothing: what can't be read, what is there twice, how large images are."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.data.formats import BY_PILLOW, by_pillow, promised_size, size_by_pillow, unreadable_here
from utils.data.images import defect, is_turned, jpeg_size
from utils.data.listing import PathList

MOST = 100_000  # of more files none is looked at: what can't be read is then met, replaced and counted in training
WHOLE = 1 << 17  # files of so many bytes are read whole, of larger ones both ends
END = 1 << 16  # bytes
THREADS, CHUNK = 8, 512
SLOW = 2e-4  # seconds a file: above it storage is waited for, and threads help; below it they only take turns, three times slower
LACKING = re.compile(r": ([^:]+ can't be read here; .*)$")  # what ``defect`` says of a format without its plug-in
_PNG, _JPEG = b"\x89PNG", b"\xff\xd8"


@dataclass(frozen=True)
class Looks:
    """What was seen of some images, in their order.

    Attributes:
        reasons: why an image can't be read, or None.
        prints: uint64 [N], equal for files of equal content; 0 where it is not known.
        sizes: int64 [N, 2], height and width; 0 where they are not known.
    """

    reasons: list[str | None]
    prints: NDArray[np.uint64]
    sizes: NDArray[np.int64]

    @classmethod
    def nothing(cls, count: int) -> Looks:
        """Return what is known of images that were not looked at."""
        return cls([None] * count, np.zeros(count, np.uint64), np.zeros((count, 2), np.int64))


def look_at(paths: Sequence[Path]) -> Looks:
    """Look at files, several at a time where storage is slow; of more than ``MOST`` at their suffixes alone."""
    if len(paths) > MOST:
        looks = Looks.nothing(len(paths))
        names = paths if isinstance(paths, PathList) else PathList(map(str, paths))
        for suffix, kind in BY_PILLOW.items():
            if reason := unreadable_here(kind):
                for place in np.flatnonzero(names.ending(suffix)).tolist():
                    looks.reasons[place] = reason
        return looks
    chunks = [range(begin, min(begin + CHUNK, len(paths))) for begin in range(0, len(paths), CHUNK)]
    if not chunks:
        return Looks.nothing(0)
    begin = time.perf_counter()
    found = _look_at(paths[place] for place in chunks[0])
    slow = time.perf_counter() - begin > SLOW * len(chunks[0])
    with ThreadPoolExecutor(THREADS if slow else 1) as pool:
        found += [one for chunk in pool.map(lambda chunk: _look_at(paths[place] for place in chunk), chunks[1:]) for one in chunk]
    reasons, prints, sizes = zip(*found, strict=True)
    return Looks(list(reasons), np.array(prints, np.uint64), np.array(sizes, np.int64))


def unreadable_notes(lines: Sequence[str], listed: bool = True) -> list[str]:
    """Return lines for people: how many images can't be read, and of which formats for want of a plug-in.

    Args:
        lines: "name: reason" for each of them.
        listed: whether the run writes them to unreadable.txt.
    """
    if not lines:
        return []
    reasons = Counter(match[1] for line in lines if (match := LACKING.search(line)))
    notes = [f"{count:,} images are left out: {reason}" for reason, count in reasons.most_common()]
    where = "; unreadable.txt in the run's folder lists them" if listed else f", such as {lines[0]}"
    return [*notes, f"{len(lines):,} images can't be read and are skipped{where}"]


def _look_at(paths: Iterable[Path]) -> list[tuple[str | None, int, tuple[int, int]]]:
    return [_look(path) for path in paths]


def _look(path: Path) -> tuple[str | None, int, tuple[int, int]]:
    """Return why a file can't be read, a hash of its content, its height and width."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            head, tail = file.read(size if size <= WHOLE else END) or b"", b""
            if size > WHOLE:
                file.seek(size - END)
                tail = file.read(END) or b""
    except OSError as error:
        return error.strerror or "can't be read", 0, (0, 0)
    reason = defect(path.read_bytes() if size > WHOLE and _needs_all(head, tail) else head + tail)
    content = hashlib.blake2b(head, digest_size=8)
    content.update(tail)
    content.update(size.to_bytes(8, "little"))
    return reason, int.from_bytes(content.digest(), "little"), _shape(path, head, bool(reason)) or (0, 0)


def _shape(path: Path, head: bytes, unreadable: bool) -> tuple[int, int] | None:
    """Return (height, width) as the image is shown, if that is told without decoding it."""
    if unreadable:
        return None
    if kind := by_pillow(head):
        return size_by_pillow(path, kind)
    if head.startswith(_JPEG):
        size = jpeg_size(head)
        return size[::-1] if size and is_turned(head) else size
    return promised_size(head) if head.startswith((_PNG, b"BM", b"RIFF", b"GIF8")) else None


def _needs_all(head: bytes, tail: bytes) -> bool:
    """Return whether both ends of a large file do not tell that it is whole."""
    if head.startswith(_JPEG):
        return jpeg_size(head) is None or b"\xff\xd9" not in tail
    return head.startswith(_PNG) and b"IEND" not in tail
