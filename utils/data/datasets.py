"""Loading what ``--data`` names: a built-in data set, a folder of class folders, or a YAML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.catalogue import CATALOGUE, load_catalogued
from utils.data.formats import MAX_PIXELS
from utils.data.listing import PathList, in_order, list_classes
from utils.data.shards import ShardImages, expand, is_shards, load_shards, splits_of
from utils.data.splits import ArrayImages, FileImages, ImageData, Split
from utils.errors import UserError, nearest, unknown
from utils.files.yaml_files import read_yaml

DATA_DIR = Path(__file__).resolve().parents[2] / "data"
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def load_data(data: str, *, download: bool = False, max_pixels: int = MAX_PIXELS) -> ImageData:
    """Load a data set by its built-in name, folder, tar files, or YAML file.

    Unreadable files are left out and listed in ``unreadable``, unless there are so many files that none is looked at.

    Raises:
        UserError: there is no such data, or it has no images, classes or readable files.
    """
    path = Path(data)
    if path.suffix in (".yaml", ".yml"):
        found = _from_yaml(path)
    elif is_shards(data):
        found = load_shards(data, max_pixels)
    elif path.is_dir():
        found = _from_folder(path, str(path))
    elif data.lower() == "digits":
        found = _digits()
    elif path.exists():
        raise UserError(f"data '{data}' is a file; valid: a folder of class folders, a YAML, or a built-in name")
    else:
        if data.lower() not in CATALOGUE:
            if "/" in data or "\\" in data or data.startswith("."):
                raise UserError(f"no folder {data}")
            raise unknown("data (and no such folder):", data, ["digits", *CATALOGUE])
        found = load_catalogued(data.lower(), DATA_DIR, download)
    if not any(len(split) for split in found.splits.values()):
        raise UserError(f"data '{data}' holds no images")
    splits, unreadable = {}, []
    for name, split in found.splits.items():
        if isinstance(split.images, FileImages | ShardImages):
            split = replace(split, images=replace(split.images, max_pixels=max_pixels))
        splits[name], bad = split.readable()
        unreadable += bad
        if bad and not len(splits[name]):
            raise UserError(f"data '{data}': no image of split '{name}' is readable ({bad[0]})")
    return replace(found, splits=splits, unreadable=unreadable)


def with_validation(data: ImageData, fraction: float, seed: int) -> ImageData:
    """Return the data with a validation split: its own, or a stratified, seeded part of train; never a part of test.

    Raises:
        UserError: the data has no training images, fewer than two classes, or too few images; or the fraction is out of range.
    """
    if "train" not in data.splits:
        raise UserError(f"data '{data.name}' has no training images; it has: {', '.join(data.splits)}")
    if len(data.class_names) < 2:
        raise UserError(f"data '{data.name}' has one class ({data.class_names[0]}); a classifier needs at least two class folders")
    if len(data.splits["train"]) < 2:
        raise UserError(f"data '{data.name}' has {len(data.splits['train'])} readable training image(s); training needs at least two")
    if "val" in data.splits:
        return data
    if not 0 < fraction < 1:
        raise UserError(f"val-fraction is {fraction}; it must lie between 0 and 1")
    train = data.splits["train"]
    generator = np.random.default_rng([seed, 0x5A1])
    held = np.zeros(len(train), dtype=bool)
    for label in np.unique(train.labels):
        members = generator.permutation(np.flatnonzero(train.labels == label))
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held[members[:count]] = True
    if not held.any():
        raise UserError(f"data '{data.name}' has one image per class: too few to hold any out; add images or a val folder")
    rest = {name: split for name, split in data.splits.items() if name != "train"}
    return replace(data, splits={"train": train.take(~held), "val": train.take(held), **rest})


def _digits() -> ImageData:
    """The 1,797 handwritten digits of UCI, 8x8 grey (archive.ics.uci.edu/dataset/80); a fixed fifth is the test split."""
    with np.load(DATA_DIR / "digits.npz") as file:
        images, labels, test = file["images"], file["labels"], file["test"]
    whole = Split.of(ArrayImages(images, "digits"), labels)
    splits = {"train": whole.take(~test), "test": whole.take(test)}
    # A mirrored digit is no digit, so no flips.
    return ImageData("digits", tuple("0123456789"), splits, imgsz=32, channels=1, augment="light", fliplr=0.0)


def _from_folder(root: Path, name: str) -> ImageData:
    present = {split: [root / folder for folder in folders if (root / folder).is_dir()] for split, folders in SPLIT_FOLDERS.items()}
    folders = {split: found[0] for split, found in present.items() if found}
    return _from_folders(folders or {"train": root}, name)


def _from_folders(folders: dict[str, Path], name: str) -> ImageData:
    """Read class folders; the class names are those of train, or of all splits if there is no train."""
    listed = {split: list_classes(folder) for split, folder in folders.items()}
    naming = [listed["train"]] if "train" in listed else list(listed.values())
    folder_names = in_order({class_name for classes in naming for class_name, files in classes.items() if files})
    if not folder_names:
        raise UserError(f"data '{name}' has no class folders with images; expected FOLDER/train/CLASS/IMAGE or FOLDER/CLASS/IMAGE")
    index = {class_name: i for i, class_name in enumerate(folder_names)}
    splits = {}
    for split, classes in listed.items():
        if strangers := [c for c, files in classes.items() if files and c not in index]:
            raise UserError(
                f"{folders[split]} has the class '{strangers[0]}', which the training images do not have."
                f"{nearest(strangers[0], folder_names)} Classes are matched by folder name"
            )
        if not any(classes.values()):
            raise UserError(f"{folders[split]} holds no class folders with images; fill it, or remove it")
        paths = PathList.joined(files for _, files in sorted(classes.items()))
        labels = [np.full(len(files), index.get(c, -1), np.int64) for c, files in sorted(classes.items())]
        splits[split] = Split.of(FileImages(paths), np.concatenate(labels))
    return ImageData(name, tuple(folder_names), splits)


YAML_KEYS = ("path", "train", "val", "test", "names", "imgsz", "channels", "augment", "fliplr")


def _from_yaml(path: Path) -> ImageData:
    """Read a data set's YAML; see data/README.md for the keys."""
    content = read_yaml(path, "data")
    for key in content:
        if key not in YAML_KEYS:
            raise unknown(f"key in {path}:", str(key), YAML_KEYS)
    root = Path(str(content.get("path", ".")))
    root = root if root.is_absolute() else path.parent / root
    folders = {split: root / str(content[split]) for split in SPLIT_FOLDERS if content.get(split)}
    shards = {split: expand(str(folder)) for split, folder in folders.items() if is_shards(str(folder))}
    if shards and len(shards) < len(folders):
        raise UserError(f"{path}: {', '.join(shards)} are tar files and the other splits are not; they must all be of one kind")
    for split, folder in folders.items():
        if not (shards or folder.is_dir()):
            raise UserError(f"{path}: '{split}' is {folder}, which is no folder")
    if not folders and not root.is_dir():
        raise UserError(f"{path}: 'path' is {root}, which is no folder")
    found = splits_of(shards, path.stem) if shards else _from_folders(folders, path.stem) if folders else _from_folder(root, path.stem)
    kinds: dict[str, Any] = {"imgsz": int, "channels": int, "augment": str, "fliplr": (int, float)}
    options = {key: content[key] for key in kinds if key in content}
    pair = options.get("imgsz")
    if isinstance(pair, list) and len(pair) == 2 and all(type(side) is int for side in pair):
        options["imgsz"] = tuple(pair)
        del kinds["imgsz"]
    for key, value in options.items():
        if (key in kinds and not isinstance(value, kinds[key])) or isinstance(value, bool):
            raise UserError(f"{path}: '{key}' is {value!r}, which is no {'text' if key == 'augment' else 'number'}")
    return _apply_names(replace(found, **options), content.get("names"), path)


def _apply_names(data: ImageData, names: Any, path: Path) -> ImageData:
    """Apply ``names``: a list (or YOLO's ``{0: name}``) sets the order of the classes, ``{folder: name}`` renames them."""
    if names is None:
        return data
    if isinstance(names, dict) and all(isinstance(key, int) for key in names):
        names = [names[key] for key in sorted(names)]
    if isinstance(names, list):
        ordered = _distinct([str(name) for name in names], path)
        if missing := [c for c in data.class_names if c not in ordered]:
            raise UserError(f"{path}: 'names' lacks the class folder '{missing[0]}'.{nearest(missing[0], ordered)}")
        return data.for_classes(ordered)
    if isinstance(names, dict):
        if missing := [c for c in data.class_names if c not in names]:
            raise UserError(f"{path}: 'names' does not say what '{missing[0]}' is called")
        return replace(data, class_names=tuple(_distinct([str(names[c]) for c in data.class_names], path)))
    raise UserError(f"{path}: 'names' must be a list of class names or a mapping from folder to name")


def _distinct(names: list[str], path: Path) -> list[str]:
    """Check that no name appears twice, since classes are matched by name."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: 'names' has '{twice[0]}' twice; every class needs a name of its own")
    return names
