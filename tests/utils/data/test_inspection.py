"""The look at the data: each finding by hand, on few small files; listing; what is looked at without decoding."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.data import checking, listing
from utils.data.checking import look_at, unreadable_notes
from utils.data.datasets import load_data, with_validation
from utils.data.inspection import inspect
from utils.data.listing import PathList, list_classes
from utils.spec import ModelSpec


def draw(path: Path, seed: int, height: int = 32, width: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))
    return path


def fill(folder: Path, name: str, count: int, seed: int, **size: int) -> list[Path]:
    return [draw(folder / name / f"{i}.png", seed + i, **size) for i in range(count)]


def findings(root: Path, imgsz: int = 32) -> dict[str, tuple[int, str]]:
    data = with_validation(load_data(str(root)), 0.2, 0)
    return {finding.kind: (finding.count, finding.text) for finding in inspect(data, ModelSpec("x", 2, imgsz))}


def test_clean_data_give_no_finding(tmp_path):
    for i, name in enumerate("ab"):
        fill(tmp_path / "train", name, 20, 1000 * i)
        fill(tmp_path / "val", name, 10, 1000 * i + 500)
    assert findings(tmp_path) == {}


def test_the_same_image_in_both_splits_twice_in_a_class_and_in_two_classes(tmp_path):
    for i, name in enumerate("ab"):
        fill(tmp_path / "train", name, 20, 1000 * i)
        fill(tmp_path / "val", name, 10, 1000 * i + 10)  # all of which train has
    (tmp_path / "train/a/again.png").write_bytes((tmp_path / "train/a/3.png").read_bytes())
    (tmp_path / "train/b/stray.png").write_bytes((tmp_path / "train/a/4.png").read_bytes())
    found = findings(tmp_path)
    assert found["val_in_train"] == (20, "20 of the 20 images of val are in train too")
    assert found["duplicates"] == (1, "1 images of train are there more than once")
    assert found["label_conflicts"][0] == 1
    assert found["label_conflicts"][1].endswith("stray.png")
    assert "a/4.png" in found["label_conflicts"][1]


def test_few_images_and_skew(tmp_path):
    fill(tmp_path / "train", "many", 60, 0)
    fill(tmp_path / "train", "few", 5, 1000)
    fill(tmp_path / "val", "many", 3, 2000)
    found = findings(tmp_path)
    assert found["few"] == (1, "1 classes have fewer than 10 training images: few (5)")
    assert found["skew"] == (12, "60 images of many, 5 of few: try --balance sampler or weights")


def test_splits_of_another_mix(tmp_path):
    for name, train, val in (("a", 40, 5), ("b", 10, 20)):
        fill(tmp_path / "train", name, train, ord(name) * 1000)
        fill(tmp_path / "val", name, val, ord(name) * 1000 + 500)
    # train 80 and 20 %, val 20 and 80 %: 60 % of val's 25 images
    assert findings(tmp_path)["other_mix"] == (15, "the classes of val are mixed otherwise than those of train: 60% of its images")


def test_small_images_and_long_ones(tmp_path):
    for i, name in enumerate("ab"):
        fill(tmp_path / "train", name, 20, 1000 * i, height=16, width=64)
        fill(tmp_path / "val", name, 10, 1000 * i + 500)
    found = findings(tmp_path, imgsz=64)
    assert found["small"][1] == "40 images of train are smaller than half of the network's 64 px; the median's shorter side is 16"
    assert found["cropped"] == (
        40,
        "the centre crop leaves out 75% of the median image of train; --fit squash or letterbox and --imgsz HEIGHT WIDTH show more",
    )
    assert "small" not in findings(tmp_path, imgsz=32)


def test_built_in_data_are_looked_at_as_far_as_they_go():
    assert [finding.kind for finding in inspect(with_validation(load_data("digits"), 0.1, 0), ModelSpec("x", 10, 32))] == []


@pytest.mark.parametrize("whole", [1 << 17, 100])
def test_both_ends_of_a_large_file_tell_what_the_whole_tells(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(checking, "WHOLE", whole)
    monkeypatch.setattr(checking, "END", 64)
    good = [draw(tmp_path / f"good.{kind}", 1) for kind in ("jpg", "png", "bmp")]
    cut = []
    for path in good:
        cut.append(path.with_name(f"cut{path.suffix}"))
        cut[-1].write_bytes(path.read_bytes()[:-40])
    trailing = tmp_path / "trailing.jpg"
    trailing.write_bytes((tmp_path / "good.jpg").read_bytes() + bytes(500))
    empty, gone = tmp_path / "empty.jpg", tmp_path / "gone.jpg"
    empty.write_bytes(b"")
    looks = look_at([*good, *cut, trailing, empty, gone])
    assert looks.reasons == [None] * 3 + ["truncated JPEG", "truncated PNG", None, None, "empty file", "No such file or directory"]
    if whole > 100:  # the header of a JPEG may lie behind the first bytes
        assert looks.sizes[:3].tolist() == [[32, 32]] * 3
    assert len(set(looks.prints[:3].tolist())) == 3


@pytest.mark.parametrize("slow", [-1.0, 1.0])
def test_several_threads_see_what_one_sees_in_the_same_order(tmp_path, monkeypatch, slow):
    paths = fill(tmp_path, "a", 9, 0)
    expected = look_at(paths)
    monkeypatch.setattr(checking, "CHUNK", 2)
    monkeypatch.setattr(checking, "SLOW", slow)
    found = look_at(paths)
    assert found.prints.tolist() == expected.prints.tolist()
    assert len(set(found.prints.tolist())) == 9
    assert found.reasons == [None] * 9


def test_of_very_many_files_none_is_looked_at(tmp_path, monkeypatch):
    fill(tmp_path / "train", "a", 2, 0)
    fill(tmp_path / "train", "b", 2, 100)
    (tmp_path / "train/a/bad.png").write_bytes(b"no image")
    assert len(load_data(str(tmp_path)).split("train")) == 4
    monkeypatch.setattr(checking, "MOST", 3)
    data = load_data(str(tmp_path))
    assert (len(data.split("train")), data.unreadable) == (5, [])


def test_of_very_many_files_those_without_a_plug_in_are_known_by_their_suffix(tmp_path, monkeypatch):
    fill(tmp_path / "train", "a", 2, 0)
    fill(tmp_path / "train", "b", 2, 100)
    for name in ("a/x.JXL", "b/y.jxl", "b/z.heic"):
        (tmp_path / "train" / name).write_bytes(b"anything")
    monkeypatch.setattr(checking, "MOST", 3)
    monkeypatch.setattr(
        checking, "unreadable_here", lambda kind: f"{kind} can't be read here; to read it: x" if kind == "JPEG XL" else None
    )
    data = load_data(str(tmp_path))
    assert len(data.split("train")) == 5
    assert unreadable_notes(data.unreadable, listed=False)[0] == "2 images are left out: JPEG XL can't be read here; to read it: x"
    found = findings(tmp_path)
    assert found["not_looked_at"] == (3, "3 images were not compared; the same one twice, or in train and val, would go unnoticed")


def test_formats_without_a_plug_in_are_counted_with_the_command():
    lines = [f"a: b/{i}.heic: HEIC can't be read here; to read it: pip install pillow-heif" for i in range(2)] + ["x.jpg: empty file"]
    assert unreadable_notes(lines) == [
        "2 images are left out: HEIC can't be read here; to read it: pip install pillow-heif",
        "3 images can't be read and are skipped; unreadable.txt in the run's folder lists them",
    ]
    assert unreadable_notes(lines, listed=False)[1].endswith(f"are skipped, such as {lines[0]}")
    assert unreadable_notes([]) == []


def test_paths_are_held_as_text_and_handed_out_as_paths():
    names = ["b/\u00e9.jpg", "a", os.fsdecode(b"latin_\xe9.jpg")]
    paths = PathList(names)
    assert len(paths) == 3
    assert [paths[0], paths[-1]] == [Path(names[0]), Path(names[2])]
    assert paths[1:] == [Path("a"), Path(names[2])]
    assert [paths.name(i) for i in range(3)] == names
    assert list(paths) == [Path(name) for name in names]
    with pytest.raises(IndexError):
        paths[3]
    both = PathList.joined([paths, PathList([]), PathList(["x"])])
    assert [both.name(i) for i in range(4)] == [*names, "x"]
    assert len(PathList.joined([])) == 0


def test_suffixes_are_found_in_any_case():
    paths = PathList(["a/x.jxl", "b.JXL/y.png", "c.JXL", "jxl", ".jxl", ""])
    assert paths.ending(".jxl").tolist() == [True, False, True, False, True, False]
    assert PathList([]).ending(".jxl").tolist() == []


def test_files_are_listed_in_the_order_of_their_paths_without_hidden_ones(tmp_path):
    for name in ("z.png", "a/b.JPG", "a.png", "a-b/c.webp", ".hidden.png", ".inner/x.png", "notes.txt", "d/e/f.heic"):
        (tmp_path / "cls" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cls" / name).touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / "loose.png").touch()
    expected = sorted((path for path in (tmp_path / "cls").rglob("*") if listing.IMAGE_SUFFIXES & {path.suffix.lower()}), key=str)
    expected = [path for path in sorted(expected) if not any(part.startswith(".") for part in path.relative_to(tmp_path).parts)]
    assert {name: list(paths) for name, paths in list_classes(tmp_path).items()} == {"cls": expected}
