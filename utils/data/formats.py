"""Image files beyond what OpenCV reads: HEIC, AVIF and JPEG XL through Pillow; and the size that a header promises."""

from __future__ import annotations

import io
import struct
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PIXELS = 1 << 27  # of an image: 134 million, 400 MB once decoded
# Suffix -> format; each is read by Pillow, most with a plug-in.
BY_PILLOW = {".heic": "HEIC", ".heif": "HEIC", ".hif": "HEIC", ".avif": "AVIF", ".jxl": "JPEG XL"}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"hevc"), "HEIC")
LUMA = (9797, 19234, 3737)  # of red, green and blue in 1 / 32768: OpenCV's grey of a colour PNG, to the bit
_JXL = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a")
_PNG = b"\x89PNG\r\n\x1a\n"
_WANTED_BEFORE_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf")  # others say how to show the colours, and make libpng write warnings


class TooManyPixels(Exception):
    """An image has more pixels than are allowed."""


def by_pillow(data: bytes) -> str | None:
    """Return the format of a file that Pillow is to read: "HEIC", "AVIF", "JPEG XL"; None for one that OpenCV reads."""
    if data.startswith(_JXL):
        return "JPEG XL"
    return _BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None


@cache
def lacking(kind: str) -> str | None:
    """Return what to install so that files of a format can be read; None if they can."""
    if kind == "HEIC":
        return None if find_spec("pillow_heif") else "pip install pillow-heif"
    if kind == "JPEG XL":
        return None if find_spec("pillow_jxl") else "pip install pillow-jxl-plugin"
    from PIL import features

    return None if features.check("avif") or find_spec("pillow_avif") else "pip install 'pillow>=11.3'"


def unreadable_here(kind: str) -> str | None:
    """Return why files of a format can't be read, and what to install; None if they can."""
    command = lacking(kind)
    return f"{kind} can't be read here; to read it: {command}" if command else None


def read_by_pillow(data: bytes, kind: str, channels: int, max_pixels: int) -> NDArray[np.uint8]:
    """Decode a file to uint8 [H, W, channels], orientation applied.

    Raises:
        TooManyPixels: its header promises more than ``max_pixels``.
        OSError, ValueError, SyntaxError: what Pillow raises for a damaged file.
    """
    from PIL import Image, ImageOps

    _register(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's own limit, and of odd metadata
        try:
            image: Any = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError:
            raise TooManyPixels("far too many pixels") from None
        check_pixels(image.height, image.width, max_pixels)
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if channels == 3:
        return pixels
    grey = (pixels.astype(np.int32) @ np.array(LUMA)) >> 15
    return grey.astype(np.uint8)[:, :, None]


def _register(kind: str) -> None:
    """Let Pillow's plug-in for a format take part."""
    if kind == "HEIC":
        from pillow_heif import register_heif_opener

        register_heif_opener()
    elif kind == "JPEG XL":
        import pillow_jxl  # noqa: F401
    elif find_spec("pillow_avif"):
        import pillow_avif  # noqa: F401


def size_by_pillow(path: Path, kind: str) -> tuple[int, int] | None:
    """Return (height, width) of a file of one of these formats as it is shown, from its header."""
    from PIL import ExifTags, Image

    _register(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
                return (image.width, image.height) if turned else (image.height, image.width)
        except Exception:  # a plug-in can raise anything; decoding will say what is wrong
            return None


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image of too many pixels.

    Raises:
        TooManyPixels: it has more than ``max_pixels``.
    """
    if height * width > max_pixels:
        raise TooManyPixels(f"{width:,} x {height:,} pixels, more than --max-pixels {max_pixels:,}")


def promised_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) as the header of a PNG, BMP, WebP or GIF says; None of another format, or if it says nothing."""
    if data.startswith(_PNG) and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
    elif data.startswith(b"BM") and len(data) >= 26:
        width, height = struct.unpack_from("<ii", data, 18)
    elif data.startswith(b"GIF8") and len(data) >= 10:
        width, height = struct.unpack_from("<HH", data, 6)
    elif data[:4] == b"RIFF" and data[12:16] == b"VP8X" and len(data) >= 30:
        width, height = 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    elif data[:4] == b"RIFF" and data[12:16] == b"VP8L" and len(data) >= 25:
        both = int.from_bytes(data[21:25], "little")
        width, height = 1 + (both & 0x3FFF), 1 + (both >> 14 & 0x3FFF)
    elif data[:4] == b"RIFF" and data[12:16] == b"VP8 " and len(data) >= 30:
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", data, 26))
    else:
        return _size_by_pillow(data) if data.startswith((b"II", b"MM", b"P", b"\x00\x00\x00\x0cjP", b"\xff\x4f\xff\x51")) else None
    return abs(height), abs(width)


def _size_by_pillow(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a TIFF, PNM or JPEG 2000 file, whose headers are long."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                return image.height, image.width
        except Image.DecompressionBombError:
            raise TooManyPixels("far too many pixels") from None
        except Exception:  # OpenCV may read what Pillow does not
            return None


def without_colour_profile(data: bytes) -> bytes:
    """Return a PNG without the chunks before its pixels that say how to show the colours, of which libpng warns on the terminal."""
    if not data.startswith(_PNG):
        return data
    place, kept = 8, [data[:8]]
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind in (b"IDAT", b"IEND", b"fcTL", b"acTL"):
            break
        if kind in _WANTED_BEFORE_PIXELS:
            kept.append(data[place : place + 12 + length])
        place += 12 + length
    return b"".join([*kept, data[place:]])
