"""From image files to arrays: decoding with OpenCV, a check for truncated files, and the network's pre-processing."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.data.formats import (
    BY_PILLOW,
    MAX_PIXELS,
    TooManyPixels,
    by_pillow,
    check_pixels,
    promised_size,
    read_by_pillow,
    unreadable_here,
    without_colour_profile,
)
from utils.errors import UserError
from utils.spec import ModelSpec

Image = NDArray[np.uint8]  # [H, W, C], RGB or grey

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".dng", ".mpo", ".jfif", *BY_PILLOW}
)
ORIENTATION = 0x0112  # EXIF's tag
READ_MARGIN = 2  # images are read at 1/2, 1/4 or 1/8 size as long as the shorter side stays this many times the input's

_REDUCED_COLOR = {1: cv2.IMREAD_COLOR_RGB, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
_REDUCED_GREY = {
    1: cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

# BMP, WebP, TIFF (either byte order), PNM, JPEG 2000 (file and stream), GIF, AVIF and HEIF.
_OTHER_SIGNATURES = (b"BM", b"RIFF", b"II*\x00", b"MM\x00*", b"P", b"\x00\x00\x00", b"\xff\x4f\xff\x51", b"GIF8")


class UnreadableImage(Exception):
    """The file is missing, truncated or not an image; the message says which."""


def is_hidden(path: Path, root: Path | None = None) -> bool:
    """Whether the name of a path, or of a folder between it and ``root``, begins with a dot."""
    parts = path.relative_to(root).parts if root else (path.name,)
    return any(part.startswith(".") for part in parts)


def is_image_file(path: Path, root: Path | None = None) -> bool:
    """Whether a path has the suffix of an image and neither it nor a folder below ``root`` is hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path, root)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) from a JPEG's frame header, or None if it has none."""
    return _jpeg_header(data)[0]


def _jpeg_header(data: bytes) -> tuple[tuple[int, int] | None, int]:
    """Return (height, width) and the start of the first scan, or -1; thumbnails lie inside other segments, which are skipped."""
    position, size = 2, None
    while position + 9 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:
            return size, position
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            size = struct.unpack_from(">HH", data, position + 5)
        position += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", data, position + 2)[0]
    return size, -1


def is_turned(data: bytes) -> bool:
    """Whether a JPEG's EXIF says that it is shown with its sides exchanged."""
    begin = data.find(b"Exif\x00\x00", 0, 1 << 12) + 6
    order = {b"II": "<", b"MM": ">"}.get(data[begin : begin + 2]) if begin > 5 else None
    if order is None or len(data) < begin + 10:
        return False
    place = begin + struct.unpack_from(f"{order}I", data, begin + 4)[0]
    count = struct.unpack_from(f"{order}H", data, place)[0] if place + 2 <= len(data) else 0
    for entry in range(place + 2, min(place + 2 + 12 * count, len(data) - 11), 12):
        if struct.unpack_from(f"{order}H", data, entry)[0] == ORIENTATION:
            return struct.unpack_from(f"{order}H", data, entry + 8)[0] in (5, 6, 7, 8)
    return False


def defect(data: bytes) -> str | None:
    """Return what is wrong with an image file, judged by its markers alone, or None.

    A truncated JPEG decodes to a half-grey image without any error, so its end marker is looked for: compressed data
    can't contain EOI, so there must be one after the first SOS. What follows it does not matter.
    """
    if not data:
        return "empty file"
    if data.startswith(b"\xff\xd8"):
        size, scan = _jpeg_header(data)
        if size is None:
            return "JPEG without a frame header"
        return None if scan > 0 and data.find(b"\xff\xd9", scan) > 0 else "truncated JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None if data.rfind(b"IEND") > 0 else "truncated PNG"
    if kind := by_pillow(data):
        return unreadable_here(kind)
    return None if data.startswith(_OTHER_SIGNATURES) else "not an image"


def decode(data: bytes, channels: int, min_side: int = 0, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode an image file's bytes to uint8 [H, W, channels], EXIF orientation applied.

    Args:
        data: the whole file.
        channels: 1 for grey, 3 for RGB.
        min_side: the image is reduced by 2, 4 or 8 as long as its shorter side stays at least this; 0: never.
            JPEGs are reduced inside the decoder, which is several times faster.
        max_pixels: an image of more, once reduced, is not decoded.

    Raises:
        UnreadableImage: the file is truncated, too large or not an image.
    """
    if reason := defect(data):
        raise UnreadableImage(reason)
    is_jpeg = data.startswith(b"\xff\xd8")
    size = jpeg_size(data) if is_jpeg else None
    factor = _reduction(min(size), min_side) if size and min_side else 1
    try:
        if kind := by_pillow(data):
            image: Any = read_by_pillow(data, kind, channels, max_pixels)
        else:
            if promised := size or promised_size(data):
                check_pixels(promised[0] // factor, promised[1] // factor, max_pixels)
            flags = (_REDUCED_GREY if channels == 1 else _REDUCED_COLOR)[factor]
            image = cv2.imdecode(np.frombuffer(without_colour_profile(data), np.uint8), flags)
    except TooManyPixels as error:
        raise UnreadableImage(str(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:  # what Pillow and its plug-ins raise
        raise UnreadableImage(f"damaged ({' '.join(str(error).split())[:80]})") from None
    except cv2.error as error:
        raise UnreadableImage(f"OpenCV refuses it ({error.err})") from None
    if image is None:
        raise UnreadableImage("not an image, or damaged")
    if channels == 3 and factor > 1:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # the reduced modes only decode to BGR
    if min_side and not is_jpeg and (factor := _reduction(min(image.shape[:2]), min_side)) > 1:
        height, width = image.shape[:2]
        image = cv2.resize(image, (width // factor, height // factor), interpolation=cv2.INTER_AREA)
    return as_channels(as_bytes(image), channels)


def _reduction(side: int, min_side: int) -> int:
    return next((factor for factor in (8, 4, 2) if side // factor >= min_side), 1)


def read_image(path: Path, channels: int, min_side: int = 0, max_pixels: int = MAX_PIXELS) -> Image:
    """Read and decode an image file; see ``decode``, which also says what is raised."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(error.strerror or "can't be read") from None
    return decode(data, channels, min_side, max_pixels)


def as_bytes(array: NDArray[Any]) -> Image:
    """Return an array as uint8, copied only if it has another type."""
    return array.astype(np.uint8, copy=False)


def as_pixels(image: Any) -> Image:
    """Return an image or a batch, an array or what becomes one, as uint8 [H, W], [H, W, C] or [N, H, W, C].

    Raises:
        UserError: it is of another type, or has other dimensions.
    """
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3, 4) or (array.ndim > 2 and array.shape[-1] not in (1, 3)):
        shape = " x ".join(map(str, array.shape))
        raise UserError(f"an image is uint8, [H, W], [H, W, 1] or [H, W, 3], a batch [N, H, W, C]; this one is {array.dtype}, [{shape}]")
    return array


def as_channels(image: Image, channels: int) -> Image:
    """Convert grey [H, W], grey [H, W, 1] or RGB [H, W, 3] to [H, W, channels]."""
    if image.ndim == 2:
        image = image[:, :, None]
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image[:, :, :1], 3, axis=2)
    return as_bytes(cv2.cvtColor(image[:, :, :3], cv2.COLOR_RGB2GRAY)[:, :, None])


def resize(image: Image, height: int, width: int) -> Image:
    """Resize [H, W, C]: by pixel area if both sides shrink (no aliasing), else bilinearly."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return as_bytes(resized.reshape(height, width, image.shape[2]))


def preprocess(image: Image, spec: ModelSpec) -> Image:
    """Bring an image to the network's size as ``spec.fit`` says: crop the middle, squash it, or show it whole with bars.

    Validation, prediction and exported files share it; ``transforms.normalise`` then scales the pixels.
    """
    (height, width), (to_height, to_width) = image.shape[:2], spec.size
    if spec.fit == "squash":
        return resize(image, to_height, to_width)
    if spec.fit == "letterbox":
        return letterbox(image, spec)
    if height * to_width <= width * to_height:  # the image is wider
        whole = height * spec.crop_fraction
        h, w = round(whole), round(whole * (to_width / to_height))
    else:
        whole = width * spec.crop_fraction
        h, w = round(whole * (to_height / to_width)), round(whole)
    h, w = min(max(h, 1), height), min(max(w, 1), width)
    top, left = (height - h) // 2, (width - w) // 2
    return resize(image[top : top + h, left : left + w], to_height, to_width)


def letterbox(image: Image, spec: ModelSpec) -> Image:
    """Resize an image so that all of it fits into the network's input, with bars of the mean colour on both sides."""
    (height, width), (to_height, to_width) = image.shape[:2], spec.size
    scale = min(to_height / height, to_width / width)
    h, w = min(max(round(height * scale), 1), to_height), min(max(round(width * scale), 1), to_width)
    top, left = (to_height - h) // 2, (to_width - w) // 2
    boxed = np.empty((to_height, to_width, image.shape[2]), np.uint8)
    boxed[:] = np.round(np.array(spec.mean) * 255).astype(np.uint8)
    boxed[top : top + h, left : left + w] = resize(image, h, w)
    return boxed
