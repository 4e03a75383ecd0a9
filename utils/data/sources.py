"""Sources of images for prediction: files, folders, globs, lists, videos, webcams, streams."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2

from utils.data.formats import BY_PILLOW, MAX_PIXELS, unreadable_here
from utils.data.images import IMAGE_SUFFIXES, Image, UnreadableImage, as_bytes, as_channels, is_hidden, read_image
from utils.errors import UserError, shown

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts", ".gif"})
STREAM_PREFIXES = ("rtsp://", "rtmp://", "http://", "https://", "tcp://", "udp://")
STREAM_RETRIES = 3


@dataclass(frozen=True)
class Item:
    """One image to classify.

    Attributes:
        path: the name by which a user knows it.
        output: path of its annotated copy, relative to the run's folder.
        label: the beginning of its console line.
        read: (channels, min_side) -> image, like ``images.read_image``.
        frame: number of the frame in a video or stream, from 1; 0 for a picture.
        fps: of the video to which the frame belongs.
    """

    path: str
    output: Path
    label: str
    read: Callable[[int, int], Image]
    frame: int = 0
    fps: float = 0.0


@dataclass(frozen=True)
class Source:
    """Images to classify, in order.

    Attributes:
        files: the number of files that they come from, 0 for a live source.
        notes: which of them can't be read for want of a plug-in.
    """

    items: Callable[[], Iterator[Item]]
    files: int = 0
    notes: tuple[str, ...] = ()

    @property
    def live(self) -> bool:
        """Whether the images come from a camera or stream and must be handled one by one."""
        return self.files == 0


def open_source(source: str, stride: int = 1, max_pixels: int = MAX_PIXELS) -> Source:
    """Open what ``--source`` names.

    Args:
        source: image, video, folder (recursive), glob, .txt list of paths, webcam number, or stream URL.
        stride: of videos and streams, every ``stride``-th frame is taken.
        max_pixels: see ``images.decode``.

    Raises:
        UserError: there is nothing there, or nothing readable.
    """
    if stride < 1:
        raise UserError(f"vid-stride is {stride}; it must be at least 1")
    if source.isdecimal():
        webcam = _open(int(source), f"webcam {source}")
        return Source(lambda: _frames(webcam, f"webcam {source}", Path(f"webcam{source}.mp4"), stride))
    if source.lower().startswith(STREAM_PREFIXES):
        stream = _open(source, source)
        return Source(lambda: _frames(stream, source, Path("stream.mp4"), stride))
    paths, root = _list_files(source)
    return Source(lambda: _files(paths, root, stride, max_pixels), len(paths), _notes(paths))


def _notes(paths: list[Path]) -> tuple[str, ...]:
    kinds = Counter(BY_PILLOW[suffix] for path in paths if (suffix := path.suffix.lower()) in BY_PILLOW)
    return tuple(f"{count:,} images are left out: {reason}" for kind, count in kinds.items() if (reason := unreadable_here(kind)))


def _list_files(source: str) -> tuple[list[Path], Path]:
    """Return the files that a source names, and the folder whose structure their outputs repeat."""
    path = Path(source)
    if path.is_dir():
        found, root = sorted(p for p in path.rglob("*") if p.is_file()), path
        found = [p for p in found if _is_readable(p, root)]
        if not found:
            raise UserError(f"no images or videos in {source}")
    elif path.suffix.lower() == ".txt" and path.is_file():
        try:
            if "\0" in (text := path.read_text(encoding="utf-8-sig")):
                raise UserError(f"{source} is no list of paths: it has zero bytes")
            lines = [line.strip() for line in text.splitlines()]
        except UnicodeDecodeError:
            raise UserError(f"{source} is no list of paths in UTF-8") from None
        found = [Path(line) if os.path.isabs(line) or os.path.exists(line) else path.parent / line for line in lines if line]
        root = _common_folder(found)
        if not found:
            raise UserError(f"{source} lists no files")
    elif path.is_file():
        if not _is_readable(path):
            raise UserError(f"{source} is neither an image nor a video (by its suffix '{path.suffix}')")
        found, root = [path], path.parent
    else:
        if not glob.has_magic(source):
            raise UserError(f"no file or folder {source}; a source is an image, video, folder, glob, .txt list, webcam number or URL")
        found = sorted(Path(p) for p in glob.glob(source, recursive=True) if _is_readable(Path(p)))
        root = _common_folder(found)
        if not found:
            raise UserError(f"the pattern {source} matches no images or videos")
    return found, root


def _is_readable(path: Path, root: Path | None = None) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not is_hidden(path, root)


def _common_folder(paths: list[Path]) -> Path:
    return Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths])) if paths else Path()


def _files(paths: list[Path], root: Path, stride: int, max_pixels: int) -> Iterator[Item]:
    base = os.path.abspath(root)
    for number, path in enumerate(paths, 1):
        output = Path(os.path.relpath(os.path.abspath(path), base))
        if path.suffix.lower() in VIDEO_SUFFIXES:
            label = f"video {number}/{len(paths)}"
            try:
                yield from _frames(_open(str(path), str(path)), str(path), output.with_suffix(".mp4"), stride, label)
            except UserError:  # one bad file among many is skipped like a bad image
                yield Item(str(path), output, f"{label} {shown(path)}", _unreadable("no video that OpenCV can read"))
        else:
            yield Item(str(path), output, f"image {number}/{len(paths)} {shown(path)}", partial(read_image, path, max_pixels=max_pixels))


def _open(origin: int | str, name: str) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(origin)
    if not capture.isOpened():
        raise UserError(f"can't open {name}: no such camera or stream, or no video that OpenCV can read")
    return capture


def _frames(capture: cv2.VideoCapture, name: str, output: Path, stride: int, label: str = "") -> Iterator[Item]:
    """Yield every ``stride``-th frame of a video, webcam or stream."""
    try:
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = float(capture.get(cv2.CAP_PROP_FPS)) or 30.0
        frame = failures = 0
        while True:
            frame += 1
            if not capture.grab():
                failures += 1
                if total > 0 or failures >= STREAM_RETRIES:  # a file has ended; a stream gets a few more chances
                    break
                continue
            failures = 0
            if (frame - 1) % stride:
                continue
            ok, pixels = capture.retrieve()
            read = _frame_reader(as_bytes(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))) if ok else _unreadable("damaged frame")
            count = f"frame {frame}/{total}" if total > 0 else f"frame {frame}"
            yield Item(name, output, f"{label} ({count}) {name}".strip(), read, frame, fps / stride)
    finally:
        capture.release()


def _frame_reader(image: Image) -> Callable[[int, int], Image]:
    return lambda channels, min_side: as_channels(image, channels)


def _unreadable(reason: str) -> Callable[[int, int], Image]:
    def read(channels: int, min_side: int) -> Image:
        raise UnreadableImage(reason)

    return read
