"""Tar files in WebDataset's layout: what is found in them, the same pixels as from files, faults, and the kept index."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.data import shards
from utils.data.datasets import load_data, with_validation
from utils.data.shards import expand
from utils.errors import UserError


def picture(seed: int) -> bytes:
    _, data = cv2.imencode(".png", np.random.default_rng(seed).integers(0, 255, (12, 12, 3), np.uint8))
    return data.tobytes()


def pack(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def numbered(first: int, count: int) -> dict[str, bytes]:
    """Samples of classes 0, 1 and 2 by turns."""
    files = {}
    for i in range(first, first + count):
        files |= {f"{i:05d}.png": picture(i), f"{i:05d}.cls": str(i % 3).encode(), f"{i:05d}.json": b"{}"}
    return files


@pytest.fixture
def data(tmp_path):
    for k in range(3):
        pack(tmp_path / f"train-{k:03d}.tar", numbered(10 * k, 10))
    pack(tmp_path / "val-000.tar", numbered(100, 9))
    return tmp_path


def test_shards_are_read_like_files(data):
    found = load_data(f"{data}/train-{{000..002}}.tar")
    assert found.class_names == ("0", "1", "2")
    train = found.split("train")
    assert (len(train), len(found.split("val"))) == (30, 9)
    assert train.labels.tolist() == [i % 3 for i in range(30)]
    assert train.name(11) == f"{data}/train-001.tar/00011.png"
    for i in (0, 9, 10, 29):
        expected = cv2.cvtColor(cv2.imdecode(np.frombuffer(picture(i), np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        assert np.array_equal(train.read(i, 3, 0), expected)
    assert load_data(f"{data}/train-*.tar").split("train").labels.tolist() == train.labels.tolist()


def test_without_val_shards_a_part_is_held_out_and_folders_name_classes(tmp_path):
    files = {f"{name}/{i}.png": picture(i) for name in ("cat", "dog") for i in range(10)}
    pack(tmp_path / "photos.tar", files | {"readme.txt": b"hello", "loose.png": picture(99)})
    found = with_validation(load_data(str(tmp_path / "photos.tar")), 0.2, 0)
    assert found.class_names == ("cat", "dog")
    assert (len(found.split("train")), len(found.split("val"))) == (16, 4)


def test_the_index_is_kept_and_made_anew_when_a_shard_changes(data, monkeypatch):
    pattern = f"{data}/train-{{000..002}}.tar"
    first = load_data(pattern).split("train")
    kept = list(data.glob(".rankcut-*.npz"))
    assert len(kept) == 2  # train's and val's
    monkeypatch.setattr(shards, "_members", lambda path: pytest.fail("read again"))
    again = load_data(pattern).split("train")
    assert [again.name(i) for i in range(30)] == [first.name(i) for i in range(30)]
    assert again.digest() == first.digest()
    monkeypatch.undo()
    pack(data / "train-001.tar", numbered(10, 8))
    assert len(load_data(pattern).split("train")) == 28


def test_unreadable_members_are_left_out_and_counted(data):
    pack(data / "train-002.tar", {"a.png": b"no image", "a.cls": b"1", "b.png": picture(1)[:40], "b.cls": b"0"} | numbered(50, 3))
    found = load_data(f"{data}/train-{{000..002}}.tar")
    assert len(found.split("train")) == 23
    assert sorted(line.rpartition("/")[2] for line in found.unreadable) == ["a.png: not an image", "b.png: truncated PNG"]


def test_a_yaml_names_the_classes_of_shards(data):
    (data / "d.yaml").write_text("train: 'train-{000..001}.tar'\nval: val-000.tar\nnames: {'0': cat, '1': dog, '2': cow}\n")
    found = load_data(str(data / "d.yaml"))
    assert found.class_names == ("cat", "dog", "cow")
    assert (len(found.split("train")), len(found.split("val"))) == (20, 9)


def test_patterns():
    assert shards.BRACES.split("a{1..2}b")[1] == "1..2"
    with pytest.raises(UserError, match=r"no shard x-08.tar: 3 of the 3 files of 'x-\{08..10\}.tar' are not there"):
        expand("x-{08..10}.tar")
    with pytest.raises(UserError, match=r"no shard a-1-x.tar: 4 of the 4"):
        expand("a-{1,2}-{x,y}.tar")
    with pytest.raises(UserError, match="must go up"):
        expand("x-{10..08}.tar")
    with pytest.raises(UserError, match="matches no files"):
        expand("nothing-*.tar")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.tar", b"no tar at all" * 100, "is no tar file, or is damaged"),
        ("packed.tar.gz", None, "a packed one can't be read at any place, unpack it"),
        ("empty.tar", {}, "hold no images with a label"),
        ("unlabelled.tar", {"a.png": b"x"}, "hold no images with a label"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pack(path, content if content is not None else numbered(0, 3), "w:gz" if content is None else "w")
    with pytest.raises(UserError, match=message) as error:
        load_data(str(path))
    assert "\n" not in str(error.value)
