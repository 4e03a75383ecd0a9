"""What people would want to know of their data before they train on it: the same image twice, few or many of a class, small ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from utils.data import checking
from utils.data.shards import ShardImages
from utils.data.splits import ImageData, Split
from utils.spec import ModelSpec

FEW = 10  # images of a class
SKEW = 10.0  # times as many images of the largest class as of the smallest
SMALL = 0.5  # of the network's input
CROPPED = 1 / 3  # of the median image that a centre crop leaves out
OTHER_MIX = 0.2  # of the images of a split would have to change class for the mix of train's
NAMED = 3  # classes in a line


@dataclass(frozen=True)
class Finding:
    """Something about the data that is often a mistake.

    Attributes:
        kind: its name in results.json.
        count: of images or classes.
        text: a line for people.
    """

    kind: str
    count: int
    text: str

    def to_dict(self) -> dict[str, object]:
        """Return values for JSON."""
        return asdict(self)


def inspect(data: ImageData, spec: ModelSpec) -> list[Finding]:
    """Look for what is often a mistake; what files contain is known from ``Split.looks``, where there are any.

    Args:
        data: with a training split.
        spec: of the network, for the size of its input.
    """
    return [*_not_looked_at(data), *_repeated(data), *_classes(data), *_mixes(data), *_sizes(data, spec)]


def _not_looked_at(data: ImageData) -> Iterator[Finding]:
    train = data.splits["train"]
    if isinstance(train.images, ShardImages) or (train.looks and len(train.looks.reasons) > checking.MOST):
        text = f"{len(train):,} images were not compared; the same one twice, or in train and val, would go unnoticed"
        yield Finding("not_looked_at", len(train), text)


def _repeated(data: ImageData) -> Iterator[Finding]:
    train = data.splits["train"]
    prints = _prints(train)
    for name in ("val", "test"):
        if name in data.splits and (shared := int(np.isin(_prints(data.splits[name]), prints[prints > 0]).sum())):
            yield Finding(f"{name}_in_train", shared, f"{shared:,} of the {len(data.splits[name]):,} images of {name} are in train too")
    known = np.flatnonzero(prints)
    _, first, group, counts = np.unique(prints[known], return_index=True, return_inverse=True, return_counts=True)
    twice = int((counts - 1).sum())
    labels = train.labels[known]
    conflicts = int((labels != labels[first[group]]).sum()) if twice else 0
    if twice - conflicts:
        yield Finding("duplicates", twice - conflicts, f"{twice - conflicts:,} images of train are there more than once")
    if conflicts:
        place = int(np.flatnonzero(labels != labels[first[group]])[0])
        other = first[group][place]
        names = f"{train.name(int(known[other]))} and {train.name(int(known[place]))}"
        yield Finding("label_conflicts", conflicts, f"{conflicts:,} images of train are in two classes, such as {names}")


def _classes(data: ImageData) -> Iterator[Finding]:
    counts = np.bincount(data.splits["train"].labels, minlength=len(data.class_names))
    few = [f"{data.class_names[i]} ({counts[i]})" for i in np.argsort(counts, kind="stable") if counts[i] < FEW]
    if few:
        more = f" and {len(few) - NAMED} more" if len(few) > NAMED else ""
        yield Finding("few", len(few), f"{len(few)} classes have fewer than {FEW} training images: {', '.join(few[:NAMED])}{more}")
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    if counts[largest] > SKEW * max(counts[smallest], 1):
        ratio = f"{counts[largest]:,} images of {data.class_names[largest]}, {counts[smallest]:,} of {data.class_names[smallest]}"
        yield Finding("skew", round(counts[largest] / max(counts[smallest], 1)), f"{ratio}: try --balance sampler or weights")


def _mixes(data: ImageData) -> Iterator[Finding]:
    """Compare the classes' shares; so many images of val can't differ by chance alone in a random split."""
    shares = {
        name: np.bincount(split.labels, minlength=len(data.class_names)) / max(len(split), 1)
        for name, split in data.splits.items()
        if name in ("train", "val") and len(split) >= FEW * len(data.class_names)
    }
    if len(shares) == 2 and (moved := float(np.abs(shares["train"] - shares["val"]).sum() / 2)) > OTHER_MIX:
        count = round(moved * len(data.splits["val"]))
        yield Finding("other_mix", count, f"the classes of val are mixed otherwise than those of train: {moved:.0%} of its images")


def _sizes(data: ImageData, spec: ModelSpec) -> Iterator[Finding]:
    train = data.splits["train"]
    sizes = train.looks.sizes[train.rows] if train.looks else np.zeros((0, 2), np.int64)
    sizes = sizes[sizes.min(1) > 0] if len(sizes) else sizes
    if not len(sizes):
        return
    short, (height, width) = sizes.min(1), spec.size
    if small := int((short < SMALL * min(spec.size)).sum()):
        middle = int(np.median(short))
        text = f"{small:,} images of train are smaller than half of the network's {spec.size_text}; the median's shorter side is {middle}"
        yield Finding("small", small, text)
    aspects = sizes[:, 1] / sizes[:, 0] / (width / height)
    lost = 1 - np.minimum(aspects, 1 / aspects)
    if spec.fit == "crop" and float(np.median(lost)) > CROPPED:
        count, share = int((lost > CROPPED).sum()), f"{float(np.median(lost)):.0%}"
        text = (
            f"the centre crop leaves out {share} of the median image of train; --fit squash or letterbox and --imgsz HEIGHT WIDTH show more"
        )
        yield Finding("cropped", count, text)


def _prints(split: Split) -> NDArray[np.uint64]:
    return split.looks.prints[split.rows] if split.looks else np.zeros(len(split), np.uint64)
