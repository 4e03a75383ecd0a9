"""torchvision's classification data sets by name; torchvision is imported only when one is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.data.splits import ArrayImages, ImageData, Images, PillowImages, Split
from utils.errors import UserError


@dataclass(frozen=True)
class Entry:
    """How torchvision makes one data set.

    Attributes:
        class_name: its class in ``torchvision.datasets``.
        splits: the constructor's arguments for each of our splits.
        imgsz, channels, fliplr: the data set's own defaults.
        options: further arguments of the constructor, for every split.
    """

    class_name: str
    splits: dict[str, dict[str, Any]]
    imgsz: int = 224
    channels: int = 3
    fliplr: float = 0.5
    options: dict[str, Any] = field(default_factory=dict)


_TRAIN_TEST_FLAG = {"train": {"train": True}, "test": {"train": False}}
_TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_VAL_TEST = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}

CATALOGUE: dict[str, Entry] = {
    "cifar10": Entry("CIFAR10", _TRAIN_TEST_FLAG, imgsz=32),
    "cifar100": Entry("CIFAR100", _TRAIN_TEST_FLAG, imgsz=32),
    "mnist": Entry("MNIST", _TRAIN_TEST_FLAG, imgsz=32, channels=1, fliplr=0.0),
    "fashion-mnist": Entry("FashionMNIST", _TRAIN_TEST_FLAG, imgsz=32, channels=1),
    "kmnist": Entry("KMNIST", _TRAIN_TEST_FLAG, imgsz=32, channels=1, fliplr=0.0),
    "usps": Entry("USPS", _TRAIN_TEST_FLAG, imgsz=32, channels=1, fliplr=0.0),
    "svhn": Entry("SVHN", _TRAIN_TEST, imgsz=32, fliplr=0.0),
    "stl10": Entry("STL10", _TRAIN_TEST, imgsz=96),
    "gtsrb": Entry("GTSRB", _TRAIN_TEST, imgsz=64, fliplr=0.0),
    "imagenette": Entry("Imagenette", {"train": {"split": "train"}, "val": {"split": "val"}}, options={"size": "320px"}),
    "eurosat": Entry("EuroSAT", {"train": {}}, imgsz=64),
    "flowers102": Entry("Flowers102", _TRAIN_VAL_TEST),
    "food101": Entry("Food101", _TRAIN_TEST),
    "dtd": Entry("DTD", _TRAIN_VAL_TEST),
    "fgvc-aircraft": Entry("FGVCAircraft", _TRAIN_VAL_TEST),
    "oxford-iiit-pet": Entry("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "caltech101": Entry("Caltech101", {"train": {}}),
    "caltech256": Entry("Caltech256", {"train": {}}),
    "country211": Entry("Country211", {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}}),
    "pcam": Entry("PCAM", _TRAIN_VAL_TEST, imgsz=96),
    "sun397": Entry("SUN397", {"train": {}}),
    "places365": Entry("Places365", {"train": {"split": "train-standard"}, "val": {"split": "val"}}, options={"small": True}),
}


def load_catalogued(name: str, root: Path, download: bool) -> ImageData:
    """Load one of torchvision's data sets from ``root``, after downloading it if need be and allowed.

    Raises:
        UserError: it is not there and may not be downloaded, or it can't be downloaded or read.
    """
    import torchvision.datasets  # takes seconds, and most data sets do without it

    entry = CATALOGUE[name]
    constructor = getattr(torchvision.datasets, entry.class_name)
    splits = {}
    for split, arguments in entry.splits.items():
        options: dict[str, Any] = {**entry.options, **arguments, "root": str(root)}
        try:
            present = _construct(constructor, options, download=False)
            dataset = present if present is not None or not download else _construct(constructor, options, download=True)
        except (OSError, RuntimeError, ValueError, ModuleNotFoundError) as error:
            raise UserError(f"data '{name}' can't be fetched or read: {' '.join(str(error).split())[:200]}") from None
        if dataset is None:
            raise UserError(f"data '{name}' is not in {root}; add --download to fetch it")
        splits[split] = Split.of(_images(dataset, f"{name}/{split}"), _labels(dataset))
    class_names = _class_names(dataset, max(int(split.labels.max()) for split in splits.values()) + 1)
    return ImageData(name, class_names, splits, entry.imgsz, entry.channels, fliplr=entry.fliplr)


def _construct(constructor: Any, options: dict[str, Any], download: bool) -> Any:
    """Make the data set, or return None if its files are missing and may not be downloaded."""
    try:
        return constructor(**options, download=download)
    except (RuntimeError, FileNotFoundError):
        if download:
            raise
        return None


def _images(dataset: Any, prefix: str) -> Images:
    """Use the data set's own array if it has one of the usual layout, which avoids Pillow images."""
    data: Any = getattr(dataset, "data", None)
    array: Any = data.numpy() if hasattr(data, "numpy") else data
    if getattr(array, "dtype", None) == "uint8" and array.ndim in (3, 4) and len(array) == len(dataset):
        if array.ndim == 3 or array.shape[-1] == 3:
            return ArrayImages(array, prefix)
        if array.shape[1] == 3:
            return ArrayImages(array.transpose(0, 2, 3, 1), prefix)
    return PillowImages(dataset, prefix)


def _labels(dataset: Any) -> list[int]:
    for attribute in ("targets", "labels", "_labels", "y"):
        values = getattr(dataset, attribute, None)
        if values is not None and len(values) == len(dataset):
            return [int(value) for value in values]
    if hasattr(dataset, "_samples") and len(dataset._samples) == len(dataset):
        return [int(label) for _, label in dataset._samples]
    return [int(dataset[i][1]) for i in range(len(dataset))]


def _class_names(dataset: Any, count: int) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or []
    # Imagenette's entries are tuples of synonyms; the first is the common name.
    names = [name[0] if isinstance(name, tuple) else str(name) for name in names]
    return tuple(names) if len(names) >= count else tuple(str(i) for i in range(count))
