from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from utils.data import sources
from utils.data.images import UnreadableImage
from utils.data.sources import STREAM_RETRIES, open_source
from utils.errors import UserError


def write(path, value=0, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((side, side, 3), value, np.uint8))
    return path


def write_video(path, frames=7, fps=10.0):
    """Frame number n, from 1, is filled with 30 * n."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, (32, 32))
    assert writer.isOpened()
    for n in range(1, frames + 1):
        writer.write(np.full((32, 32, 3), (0, 0, 30 * n), np.uint8))
    writer.release()
    return path


def listed(source, **options):
    """Return the paths below the working folder and the outputs of a source's items."""
    return [(str(Path(item.path)), str(item.output)) for item in open_source(str(source), **options).items()]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.JPG", "deep/er/c.bmp", "deep/d.png", ".hidden.png"):
        write(Path("in") / name)
    Path("in/notes.md").write_text("no image")
    return tmp_path


def test_folder_is_searched_in_depth_and_its_outputs_mirror_it(tree):
    assert listed("in") == [
        ("in/a.JPG", "a.JPG"),
        ("in/b.png", "b.png"),
        ("in/deep/d.png", "deep/d.png"),
        ("in/deep/er/c.bmp", "deep/er/c.bmp"),
    ]
    source = open_source("in")
    assert (source.files, source.live) == (4, False)
    assert [item.label for item in source.items()][2] == "image 3/4 in/deep/d.png"
    assert len(list(source.items())) == 4  # can be gone through again


def test_hidden_folders_are_left_out(tree):
    write(Path("in/.cache/e.png"))
    assert len(listed("in")) == 4


def test_single_image_and_its_pixels(tree):
    write(Path("in/b.png"), value=77)
    [item] = open_source("in/b.png").items()
    assert (item.path, item.output, item.frame) == ("in/b.png", Path("b.png"), 0)
    assert item.read(3, 0).shape == (8, 8, 3)
    assert item.read(1, 0).tolist() == [[[77]] * 8] * 8
    assert item.read(3, 4).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("pattern", "outputs"),
    [
        ("in/*.png", ["b.png"]),
        ("in/**/*.png", ["b.png", "deep/d.png"]),
        ("in/[ab].*", ["a.JPG", "b.png"]),
        ("in/*", ["a.JPG", "b.png"]),
        ("in/deep/er/*", ["c.bmp"]),
    ],
)
def test_globs(tree, pattern, outputs):
    assert [output for _, output in listed(pattern)] == outputs


def test_names_with_glob_characters_are_taken_literally(tree):
    write(Path("odd[1]/x[2].png"))
    assert listed("odd[1]") == [("odd[1]/x[2].png", "x[2].png")]
    assert listed("odd[1]/x[2].png") == [("odd[1]/x[2].png", "x[2].png")]


def test_list_of_paths_that_are_relative_to_it_or_to_here_or_absolute(tree):
    lines = ["deep/d.png", "", "  in/b.png  ", str(tree / "in" / "a.JPG"), "absent.png"]
    Path("in/list.txt").write_text("\n".join(lines), encoding="utf-8")
    found = listed("in/list.txt")
    assert [output for _, output in found] == ["deep/d.png", "b.png", "a.JPG", "absent.png"]
    items = list(open_source("in/list.txt").items())
    assert items[0].read(3, 0).shape == (8, 8, 3)
    with pytest.raises(UnreadableImage, match="No such file"):
        items[3].read(3, 0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_list_in_utf_8_with_or_without_its_mark(tree, encoding):
    write(Path("in/käfer.png"))
    Path("in/list.txt").write_text("käfer.png\n", encoding=encoding)
    [item] = open_source("in/list.txt").items()
    assert item.read(1, 0).shape == (8, 8, 1)


def test_list_that_is_no_utf_8_is_refused(tree):
    Path("list.txt").write_bytes("in/käfer.png".encode("latin-1"))
    with pytest.raises(UserError, match=r"list\.txt"):
        open_source("list.txt")


@pytest.mark.parametrize("stride", [1, 2, 3, 9])
def test_every_stride_th_frame_of_a_video(tmp_path, stride):
    video = write_video(tmp_path / "v.avi")
    items = list(open_source(str(video), stride).items())
    numbers = {1: [1, 2, 3, 4, 5, 6, 7], 2: [1, 3, 5, 7], 3: [1, 4, 7], 9: [1]}[stride]
    assert [item.frame for item in items] == numbers
    assert [item.fps for item in items] == [10.0 / stride] * len(numbers)
    assert {str(item.output) for item in items} == {"v.mp4"}
    assert items[-1].label == f"video 1/1 (frame {numbers[-1]}/7) {video}"
    for item in items:
        red, green, blue = item.read(3, 0)[16, 16].astype(int)
        assert abs(red - 30 * item.frame) <= 6  # MJPG is lossy
        assert max(green, blue) <= 6
        assert item.read(1, 0).shape == (32, 32, 1)


def test_folder_mixes_images_and_videos_in_order(tmp_path):
    write(tmp_path / "a.png")
    write_video(tmp_path / "sub" / "b.avi", frames=2)
    write(tmp_path / "z.png")
    source = open_source(str(tmp_path))
    assert source.files == 3
    assert [(str(item.output), item.frame) for item in source.items()] == [("a.png", 0), ("sub/b.mp4", 1), ("sub/b.mp4", 2), ("z.png", 0)]


class Camera:
    """A stream without a known length, some of whose frames fail to arrive."""

    def __init__(self, grabs, damaged=()):
        self.grabs, self.damaged, self.number, self.released = list(grabs), damaged, 0, False

    def __call__(self, origin):
        self.origin = origin
        return self

    def isOpened(self):  # noqa: N802
        return self.origin != "rtsp://gone"

    def get(self, _):
        return 0.0

    def grab(self):
        self.number += 1
        return self.grabs.pop(0) if self.grabs else False

    def retrieve(self):
        good = self.number not in self.damaged
        return good, np.full((4, 4, 3), self.number, np.uint8) if good else None

    def release(self):
        self.released = True


@pytest.mark.parametrize(("source", "origin", "output"), [("0", 0, "webcam0.mp4"), ("rtsp://cam/1", "rtsp://cam/1", "stream.mp4")])
def test_live_source_survives_a_few_lost_frames(source, origin, output, monkeypatch):
    camera = Camera([True, False, False, True, False, False, True, *[False] * STREAM_RETRIES, True], damaged={7})
    monkeypatch.setattr(sources, "cv2", SimpleNamespace(**{**vars(cv2), "VideoCapture": camera}))
    opened = open_source(source)
    assert (opened.live, opened.files) == (True, 0)
    items = list(opened.items())
    assert camera.origin == origin
    assert camera.released
    assert [item.frame for item in items] == [1, 4, 7]
    assert {(str(item.output), item.fps) for item in items} == {(output, 30.0)}
    assert items[1].read(3, 0)[0, 0].tolist() == [4, 4, 4]
    with pytest.raises(UnreadableImage, match="damaged frame"):
        items[2].read(3, 0)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent", "no file or folder absent; a source is an image, video, folder"),
        ("absent.png", "no file or folder absent.png"),
        ("in/*.webp", r"the pattern in/\*.webp matches no images or videos"),
        ("in/notes.md", "in/notes.md is neither an image nor a video .*'.md'"),
        ("empty", "no images or videos in empty"),
        ("blank.txt", "blank.txt lists no files"),
        ("zero.txt", "zero.txt is no list of paths: it has zero bytes"),
    ],
)
def test_source_without_images_is_refused_before_any_work(tree, source, words):
    Path("empty").mkdir()
    Path("blank.txt").write_text("\n \n")
    Path("zero.txt").write_bytes(b"in/a.png\0\n")
    with pytest.raises(UserError, match=words):
        open_source(source)


@pytest.mark.parametrize("stride", [0, -2])
def test_stride_below_one_is_refused(tree, stride):
    with pytest.raises(UserError, match=f"vid-stride is {stride}; it must be at least 1"):
        open_source("in", stride)


def test_video_that_can_not_be_opened_is_named(tmp_path):
    (tmp_path / "v.avi").write_bytes(b"no video")
    [item] = open_source(str(tmp_path / "v.avi")).items()
    assert item.path == str(tmp_path / "v.avi")
    with pytest.raises(UnreadableImage, match="no video that OpenCV can read"):
        item.read(3, 0)


def test_stream_that_can_not_be_opened_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(sources, "cv2", SimpleNamespace(**{**vars(cv2), "VideoCapture": Camera([])}))
    with pytest.raises(UserError, match="can't open rtsp://gone: no such camera or stream"):
        open_source("rtsp://gone")


def test_broken_video_in_a_folder_does_not_hide_the_other_files(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "b.avi").write_bytes(b"no video")
    write(tmp_path / "c.png")
    items = list(open_source(str(tmp_path)).items())
    assert [item.output.name for item in items][0::2] == ["a.png", "c.png"]
    with pytest.raises(UnreadableImage):
        items[1].read(3, 0)
