import cv2
import numpy as np
import pytest
from PIL import Image as Pillow

from utils.data import datasets
from utils.data.datasets import load_data, with_validation
from utils.data.images import UnreadableImage
from utils.data.splits import ArrayImages, FileImages, ImageData, PillowImages, Split
from utils.errors import UserError


def fill(folder, images, suffix=".png"):
    """Write ``images[class]`` pictures into ``folder/class``, each filled with its number."""
    for name, count in images.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            cv2.imwrite(str(folder / name / f"{i}{suffix}"), np.full((8, 8, 3), i, np.uint8))


def classes_of(data, split):
    """Return (class folder, class name) of every image."""
    part = data.splits[split]
    return {(part.images.paths[row].parent.name, data.class_names[label]) for row, label in zip(part.rows, part.labels, strict=True)}


def yaml_file(folder, text):
    (folder / "set.yaml").write_text(text, encoding="utf-8")
    return str(folder / "set.yaml")


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation"])
@pytest.mark.parametrize("test", ["test", "testing"])
def test_split_folders_go_by_their_usual_names(tmp_path, train, val, test):
    for folder, count in ((train, 3), (val, 2), (test, 1)):
        fill(tmp_path / folder, {"cat": count, "dog": count})
    data = load_data(str(tmp_path))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 6, "val": 4, "test": 2}


def test_plain_class_folders_are_training_images_in_any_depth(tmp_path):
    fill(tmp_path, {"dog": 1, "cat": 1, "cat/young": 2, ".git": 1})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"")
    data = load_data(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert data.splits["train"].labels.tolist() == [0, 0, 0, 1]
    assert data.unreadable == []


def test_classes_that_are_all_numbers_are_in_the_order_of_their_values(tmp_path):
    fill(tmp_path / "a", dict.fromkeys(("10", "9", "2", "0"), 1))
    data = load_data(str(tmp_path / "a"))
    assert data.class_names == ("0", "2", "9", "10")
    assert classes_of(data, "train") == {(name, name) for name in data.class_names}
    assert data.for_classes(["0", "10", "2", "9"]).splits["train"].labels.tolist() == [0, 1, 2, 3]  # as older checkpoints have them
    fill(tmp_path / "b", dict.fromkeys(("10", "9", "x"), 1))
    assert load_data(str(tmp_path / "b")).class_names == ("10", "9", "x")


def test_images_in_hidden_folders_do_not_count(tmp_path):
    fill(tmp_path, {"cat": 2, "dog": 2, "dog/.ipynb_checkpoints": 2})
    assert len(load_data(str(tmp_path)).splits["train"]) == 4


def test_classes_are_matched_by_name_where_a_split_lacks_one(tmp_path):
    fill(tmp_path / "train", {"ant": 1, "bee": 1, "cat": 1})
    fill(tmp_path / "val", {"ant": 1, "cat": 2})
    data = load_data(str(tmp_path))
    assert data.class_names == ("ant", "bee", "cat")
    assert data.splits["val"].labels.tolist() == [0, 2, 2]
    assert classes_of(data, "val") == {("ant", "ant"), ("cat", "cat")}


def test_class_that_train_does_not_have_is_refused_with_the_nearest(tmp_path):
    fill(tmp_path / "train", {"ant": 1, "beetle": 1})
    fill(tmp_path / "val", {"ant": 1, "beetles": 1, "empty": 0})
    with pytest.raises(UserError, match=r"val has the class 'beetles'.*Did you mean 'beetle'"):
        load_data(str(tmp_path))


def test_data_without_train_take_their_names_from_all_splits(tmp_path):
    fill(tmp_path / "val", {"bee": 1})
    fill(tmp_path / "test", {"ant": 1})
    data = load_data(str(tmp_path))
    assert data.class_names == ("ant", "bee")
    assert data.splits["val"].labels.tolist() == [1]


def test_yaml_names_give_the_order_of_the_outputs(tmp_path):
    fill(tmp_path / "a", {"ant": 1, "bee": 1})
    fill(tmp_path / "b", {"ant": 1, "bee": 2})
    data = load_data(yaml_file(tmp_path, "train: a\nval: b\nnames: [bee, ant]\nimgsz: 48\nchannels: 1\naugment: light\nfliplr: 0"))
    assert data.class_names == ("bee", "ant")
    assert data.splits["val"].labels.tolist() == [1, 0, 0]
    assert classes_of(data, "train") == {("ant", "ant"), ("bee", "bee")}
    assert (data.imgsz, data.channels, data.augment, data.fliplr) == (48, 1, "light", 0)
    data = load_data(yaml_file(tmp_path, "train: a\nnames: {0: bee, 1: ant, 2: cow}"))
    assert data.class_names == ("bee", "ant", "cow")
    assert data.splits["train"].labels.tolist() == [1, 0]


def test_yaml_names_by_folder_rename_the_classes(tmp_path):
    fill(tmp_path / "train", {"n01": 1, "n02": 1})
    data = load_data(yaml_file(tmp_path, f"path: {tmp_path}\nnames: {{n02: tench, n01: shark}}"))
    assert data.class_names == ("shark", "tench")
    assert classes_of(data, "train") == {("n01", "shark"), ("n02", "tench")}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["set.yaml is not valid YAML"]),
        ("- a", ["set.yaml must hold a mapping, not list"]),
        ("names: [a]\nnames: [b]", ["set.yaml: the key 'names' stands twice"]),
        ("trian: a", ["'trian'", "Did you mean 'train'", "val"]),
        ("train: absent", ["'train' is", "absent"]),
        ("path: absent", ["'path' is", "absent"]),
        ("train: a\nimgsz: big", ["'imgsz' is 'big'", "number"]),
        ("train: a\nfliplr: [1]", ["'fliplr' is [1]", "number"]),
        ("train: a\naugment: 3", ["'augment' is 3", "text"]),
        ("train: a\nnames: 3", ["'names' must be a list"]),
        ("train: a\nnames: {ant: A}", ["'bee'", "'names'"]),
        ("train: a\nnames: [ant, been]", ["bee", "Did you mean 'been'"]),
        ("train: a\nnames: [ant, bee, ant]", ["ant", "names"]),
        ("train: a\nnames: {ant: x, bee: x}", ["x", "names"]),
    ],
)
def test_wrong_yaml_names_the_key_and_the_choices(tmp_path, text, words):
    fill(tmp_path / "a", {"ant": 1, "bee": 1})
    with pytest.raises(UserError) as caught:
        load_data(yaml_file(tmp_path, text))
    assert all(word in str(caught.value) for word in words)


def test_class_missing_from_yaml_names_is_told_of_the_yaml_and_not_of_weights(tmp_path):
    fill(tmp_path / "a", {"ant": 1, "bee": 1})
    with pytest.raises(UserError, match="bee") as caught:
        load_data(yaml_file(tmp_path, "train: a\nnames: [ant]"))
    assert "weights" not in str(caught.value)


def test_unreadable_files_are_left_out_and_listed(tmp_path):
    fill(tmp_path, {"ant": 3, "bee": 2}, ".jpg")
    broken, empty = tmp_path / "ant" / "1.jpg", tmp_path / "bee" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:-20])
    empty.write_bytes(b"")
    data = load_data(str(tmp_path))
    assert data.unreadable == [f"{broken}: truncated JPEG", f"{empty}: empty file"]
    assert data.splits["train"].labels.tolist() == [0, 0, 1]
    assert [data.splits["train"].name(i)[-9:] for i in range(3)] == ["ant/0.jpg", "ant/2.jpg", "bee/1.jpg"]


def test_data_that_are_not_there_are_named(tmp_path):
    (tmp_path / "file.bin").write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    fill(tmp_path / "bad", {"ant": 1, "bee": 1})
    for path in (tmp_path / "bad").rglob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    for data, words in {
        "cifar11": "unknown data .*'cifar11'. Did you mean 'cifar10'.*digits",
        "./absent": "no folder ./absent",
        str(tmp_path / "absent.yaml"): "no data file .*absent.yaml",
        str(tmp_path / "file.bin"): "file.bin' is a file; valid: a folder",
        str(tmp_path / "nothing"): "nothing' has no class folders",
        str(tmp_path / "bad"): r"no image of split 'train' is readable \(.*truncated PNG\)",
    }.items():
        with pytest.raises(UserError, match=words):
            load_data(data)


def test_split_folder_without_images_is_refused_before_training(tmp_path):
    fill(tmp_path / "train", {"ant": 4, "bee": 4})
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="val"):
        with_validation(load_data(str(tmp_path)), 0.25, 0)


def arrays(labels, name="set", **more):
    images = ArrayImages(np.arange(len(labels), dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2), name)
    names = tuple(f"c{i}" for i in range(max(labels) + 1))
    return ImageData(name, names, {"train": Split.of(images, labels), **more})


def test_held_out_part_is_stratified_seeded_and_leaves_test_alone():
    test = Split.of(ArrayImages(np.zeros((3, 4, 4), np.uint8), "t"), [0, 1, 2])
    data = arrays([0] * 40 + [1] * 20 + [2] * 2 + [3], test=test)
    held = with_validation(data, 0.2, seed=1)
    # 0.2 * 40 = 8, 0.2 * 20 = 4, 0.2 * 2 = 0.4 but at least one, of a single image none
    assert np.bincount(held.splits["val"].labels, minlength=4).tolist() == [8, 4, 1, 0]
    assert np.bincount(held.splits["train"].labels, minlength=4).tolist() == [32, 16, 1, 1]
    assert sorted([*held.splits["train"].rows, *held.splits["val"].rows]) == list(range(63))
    assert held.splits["test"] is test
    assert held.splits["val"].digest() == with_validation(data, 0.2, seed=1).splits["val"].digest()
    assert held.splits["val"].digest() != with_validation(data, 0.2, seed=2).splits["val"].digest()
    own = arrays([0, 1], val=test)
    assert with_validation(own, 0.2, 0) is own


@pytest.mark.parametrize(
    ("labels", "fraction", "words"),
    [
        ([0, 0, 0], 0.2, r"one class \(c0\)"),
        ([1], 0.2, r"has 1 readable training image\(s\)"),
        ([0, 1], 0.2, "one image per class"),
        ([0, 0, 1, 1], 0.0, "val-fraction is 0.0.*between 0 and 1"),
        ([0, 0, 1, 1], 1.0, "val-fraction is 1.0"),
        ([0, 0, 1, 1], float("nan"), "val-fraction is nan"),
    ],
)
def test_training_data_that_can_not_be_split_are_refused(labels, fraction, words):
    with pytest.raises(UserError, match=words):
        with_validation(arrays(labels), fraction, 0)


def test_missing_splits_and_classes_are_named():
    data = ImageData("set", ("ant", "bee"), {"test": arrays([0, 1]).splits["train"]})
    with pytest.raises(UserError, match="'set' has no training images; it has: test"):
        with_validation(data, 0.2, 0)
    with pytest.raises(UserError, match="no split 'val'; it has: test"):
        data.split("val")
    assert data.for_classes(["bee", "cat", "ant"]).split("test").labels.tolist() == [2, 0]
    with pytest.raises(UserError, match="the weights have several classes named 'bee', so the data's class of that name fits none"):
        data.for_classes(["bee", "ant", "bee"])
    assert data.for_classes(["bee", "crane", "ant", "crane"]).split("test").labels.tolist() == [2, 0]  # ImageNet has two cranes
    with pytest.raises(UserError, match=r"the weights know 2; unknown to them: ant.*Did you mean 'ants'"):
        data.for_classes(["bee", "ants"])


def test_digits_are_whole_and_their_test_split_is_fixed():
    data = load_data("digits")
    assert (len(data.splits["train"]) + len(data.splits["test"]), data.imgsz, data.channels, data.fliplr) == (1797, 32, 1, 0.0)
    assert not set(data.splits["train"].rows) & set(data.splits["test"].rows)
    assert data.splits["train"].images.read(0, 1, 0).shape == (8, 8, 1)
    assert data.class_names == tuple("0123456789")


def test_image_containers_read_name_and_check(tmp_path):
    gone = FileImages([tmp_path / "gone.png"])
    assert "No such file" in gone.check(0)
    pillow = PillowImages([(Pillow.new("P", (3, 2), 7), 0)], "p")
    assert (pillow.read(0, 3, 0).shape, pillow.read(0, 1, 0).shape, pillow.name(0), pillow.check(0)) == ((2, 3, 3), (2, 3, 1), "p/0", None)

    class Broken:
        def __getitem__(self, index):
            raise OSError("image file is truncated")

    with pytest.raises(UnreadableImage, match="truncated"):
        PillowImages(Broken(), "p").read(0, 3, 0)


def test_built_in_names_are_found_in_either_case(monkeypatch):
    monkeypatch.setattr(datasets, "load_catalogued", lambda name, root, download: arrays([0, 1], name))
    assert load_data("MNIST").name == "mnist"
    assert load_data("Digits").name == "digits"
