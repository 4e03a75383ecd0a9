import os

import cv2
import numpy as np
import pytest

from utils.data import caching
from utils.data.caching import CACHES, cache_split
from utils.data.images import UnreadableImage
from utils.data.splits import ArrayImages, FileImages, Split
from utils.errors import UserError


@pytest.fixture
def split(tmp_path):
    """Seven images of different sizes; the part without the first, in another order."""
    draw, paths = np.random.default_rng(0), []
    for i in range(7):
        paths.append(tmp_path / f"{i}.png")
        cv2.imwrite(str(paths[-1]), draw.integers(0, 256, (20 + i, 30 - i, 3), dtype=np.uint8))
    return Split.of(FileImages(paths), range(7)).take(np.array([6, 1, 2, 3, 5]))


def pixels(split, channels=3, min_side=0):
    return [split.images.read(int(row), channels, min_side) for row in split.rows]


def equal(first, second):
    return len(first) == len(second) and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def count_reads(monkeypatch):
    reads, read = [], FileImages.read
    monkeypatch.setattr(FileImages, "read", lambda self, index, *more: reads.append(index) or read(self, index, *more))
    return reads


@pytest.mark.parametrize("chunk", [2, 512])
@pytest.mark.parametrize("min_side", [0, 6])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", CACHES)
def test_cached_pixels_are_those_of_the_files(split, tmp_path, monkeypatch, kind, channels, min_side, chunk):
    monkeypatch.setattr(caching, "CHUNK", chunk)
    plain = pixels(split, channels, min_side)
    reads = count_reads(monkeypatch)
    cached, line = cache_split(split, kind, channels, min_side, tmp_path / "cache")
    assert {6, 1, 2, 3, 5} == set(reads)  # and not those of other splits
    reads.clear()
    assert equal(pixels(cached, channels, min_side), plain)
    assert reads == []
    assert cached.labels.tolist() == [6, 1, 2, 3, 5]
    assert [cached.name(i) for i in range(5)] == [split.name(i) for i in range(5)]
    assert line == f"5 images, {sum(image.size for image in plain) / 1e6:.1f} MB in {kind}"
    part = cached.take(np.array([3, 0]))
    assert equal(pixels(part, channels, min_side), [plain[3], plain[0]])
    assert (tmp_path / "cache").exists() == (kind == "disk")


def test_disk_cache_is_used_again_until_an_image_changes(split, tmp_path, monkeypatch):
    folder, reads = tmp_path / "cache", count_reads(monkeypatch)
    cache_split(split, "disk", 3, 0, folder)
    assert len(list(folder.iterdir())) == 2
    reads.clear()
    cache_split(split, "disk", 3, 0, folder)
    assert reads == []
    changed = split.images.paths[3]
    cv2.imwrite(str(changed), np.full((4, 5, 3), 9, np.uint8))
    cached, _ = cache_split(split, "disk", 3, 0, folder)
    assert len(reads) == 5
    assert (cached.images.read(3, 3, 0) == 9).all()


@pytest.mark.parametrize("change", ["time", "channels", "min_side", "part"])
def test_whatever_changes_the_pixels_makes_another_disk_cache(split, tmp_path, change):
    folder = tmp_path / "cache"
    cache_split(split, "disk", 3, 0, folder)
    if change == "time":
        os.utime(split.images.paths[5], ns=(1, 1))
    part = split.take(np.arange(4)) if change == "part" else split
    channels, min_side = 1 if change == "channels" else 3, 8 if change == "min_side" else 0
    cached, _ = cache_split(part, "disk", channels, min_side, folder)
    assert len(list(folder.glob("*.pixels"))) == 2
    assert equal(pixels(cached), pixels(part, channels, min_side))


def test_disk_cache_without_its_table_is_made_again(split, tmp_path):
    cache_split(split, "disk", 3, 0, tmp_path / "cache")
    next((tmp_path / "cache").glob("*.npz")).unlink()
    assert equal(pixels(cache_split(split, "disk", 3, 0, tmp_path / "cache")[0]), pixels(split))


def test_failed_write_leaves_no_cache_behind(split, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(caching, "_decode_all", fail)
        with pytest.raises(OSError, match="No space"):
            cache_split(split, "disk", 3, 0, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert equal(pixels(cache_split(split, "disk", 3, 0, tmp_path / "cache")[0]), pixels(split))


@pytest.mark.parametrize("kind", CACHES)
def test_unreadable_images_stay_unreadable(split, tmp_path, kind):
    split.images.paths[2].write_bytes(b"\x89PNG\r\n\x1a\n")
    cached, _ = cache_split(split, kind, 3, 0, tmp_path / "cache")
    with pytest.raises(UnreadableImage):
        cached.images.read(2, 3, 0)
    assert cached.images.check(2) == "could not be decoded"
    assert cached.images.check(3) is None
    plain = pixels(split.take(np.array([0, 1, 3, 4])))
    assert equal(pixels(cached.take(np.array([0, 1, 3, 4]))), plain)


def test_split_without_a_readable_image_is_refused(split, tmp_path):
    for path in split.images.paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no image of the split could be decoded"):
        cache_split(split, "disk", 3, 0, tmp_path / "cache")


def test_too_little_memory_leaves_the_split_as_it_is(tmp_path, monkeypatch):
    split = Split.of(ArrayImages(np.zeros((100, 10, 10, 3), np.uint8), "a"), [0] * 100)
    # 100 images of 300 bytes are 30,000; 0.8 of 37,499 bytes is a little less, of 37,501 a little more
    monkeypatch.setattr(caching, "_free_memory", lambda: 37_499)
    same, line = cache_split(split, "ram", 3, 0, tmp_path)
    assert same is split
    assert line.startswith("not cached")
    assert "--cache disk" in line
    monkeypatch.setattr(caching, "_free_memory", lambda: 37_501)
    assert cache_split(split, "ram", 3, 0, tmp_path)[0] is not split


def test_arrays_can_be_cached_too(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    for kind in CACHES:
        cached, _ = cache_split(Split.of(ArrayImages(array, "a"), [0, 1, 2]), kind, 1, 0, tmp_path)
        assert np.array_equal(np.stack(pixels(cached))[..., 0], array)


def test_unknown_cache_names_the_nearest(split, tmp_path):
    with pytest.raises(UserError, match=r"cache 'dsk'. Did you mean 'disk'\? Valid: ram, disk"):
        cache_split(split, "dsk", 3, 0, tmp_path)
