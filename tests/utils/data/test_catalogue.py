from dataclasses import dataclass, field

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image as Pillow

from utils.data.catalogue import CATALOGUE, load_catalogued
from utils.data.splits import ArrayImages
from utils.errors import UserError


@dataclass
class FakeSet:
    """A torchvision data set with as many images as labels, and whatever attributes a test gives it."""

    labels: list = field(default_factory=lambda: [0, 1, 2])
    attributes: dict = field(default_factory=dict)

    def __post_init__(self):
        self.__dict__.update(self.attributes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Pillow.new("RGB", (6, 5), (index, 0, 0)), self.labels[index]


def test_file_that_can_not_be_fetched_is_told_with_the_reason(tmp_path, monkeypatch):
    def construct(download, **_):
        raise OSError("<urlopen error no route>") if download else RuntimeError("absent")

    monkeypatch.setattr(torchvision.datasets, "STL10", construct)
    with pytest.raises(UserError, match=r"data 'stl10' can't be fetched or read: <urlopen error no route>"):
        load_catalogued("stl10", tmp_path, True)


@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue_constructs_what_torchvision_offers(name, tmp_path, monkeypatch):
    entry, calls = CATALOGUE[name], []

    def construct(**options):
        calls.append(options)
        if not options["download"]:
            raise RuntimeError("Dataset not found")
        return FakeSet(attributes={"classes": ["x", "y", "z"]})

    with pytest.raises(UserError, match=f"data '{name}' is not in {tmp_path}; add --download"):
        load_catalogued(name, tmp_path, download=False)  # torchvision itself takes every option, and finds nothing
    monkeypatch.setattr(torchvision.datasets, entry.class_name, construct)
    with pytest.raises(UserError, match=f"data '{name}' is not in {tmp_path}; add --download"):
        load_catalogued(name, tmp_path, download=False)
    data = load_catalogued(name, tmp_path, download=True)
    assert list(data.splits) == list(entry.splits)
    assert (data.class_names, data.imgsz, data.channels, data.fliplr) == (("x", "y", "z"), entry.imgsz, entry.channels, entry.fliplr)
    assert data.splits["train"].labels.tolist() == [0, 1, 2]
    assert data.splits["train"].images.read(2, 3, 0)[0, 0].tolist() == [2, 0, 0]
    assert all(options["root"] == str(tmp_path) for options in calls)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 8, 3), (3, 3, 8, 8)])
def test_catalogue_uses_the_data_sets_own_array(shape, tmp_path, monkeypatch):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    monkeypatch.setattr(torchvision.datasets, "SVHN", lambda **_: FakeSet(attributes={"data": array}))
    images = load_catalogued("svhn", tmp_path, False).splits["test"].images
    assert isinstance(images, ArrayImages)
    expected = array[1].transpose(1, 2, 0) if shape[1] == 3 else array[1]
    assert np.array_equal(images.read(1, 3, 0).squeeze(), expected if array.ndim == 4 else expected[:, :, None].repeat(3, 2))


@pytest.mark.parametrize("attribute", ["targets", "labels", "_labels", "y", "_samples", "nothing"])
def test_catalogue_finds_labels_wherever_torchvision_keeps_them(attribute, tmp_path, monkeypatch):
    stored = [("a.png", 2), ("b.png", 0), ("c.png", 1)] if attribute == "_samples" else [2, 0, 1]
    images = [Pillow.new("RGB", (4, 4))] * 3

    class Plain:
        classes = (("tench", "Tinca"), ("dog",), ("ox",))

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return images[index], [2, 0, 1][index]

    made = Plain()
    setattr(made, attribute, stored)
    monkeypatch.setattr(torchvision.datasets, "EuroSAT", lambda **_: made)
    data = load_catalogued("eurosat", tmp_path, False)
    assert data.splits["train"].labels.tolist() == [2, 0, 1]
    assert data.class_names == ("tench", "dog", "ox")


def test_catalogue_counts_classes_over_all_splits_where_they_have_no_names(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "SVHN", lambda split, **_: FakeSet([0, 1, 2] if split == "train" else [0, 1]))
    assert load_catalogued("svhn", tmp_path, False).class_names == ("0", "1", "2")
