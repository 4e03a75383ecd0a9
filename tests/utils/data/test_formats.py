"""Formats that Pillow reads, images that promise too many pixels, and what libpng would say on the terminal."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from utils.data import formats
from utils.data.images import UnreadableImage, decode, defect, is_turned


def pixels(height: int = 20, width: int = 28) -> np.ndarray:
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return smooth


def as_file(array: np.ndarray, kind: str, **options: object) -> bytes:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if kind == "JXL":
        pytest.importorskip("pillow_jxl")
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "JXL"])
def test_what_pillow_reads_has_the_pixels_that_it_has_as_png(kind, channels):
    data = as_file(pixels(), kind)
    with Image.open(io.BytesIO(data)) as image:
        same = as_file(np.asarray(image.convert("RGB")), "PNG")
    ours, theirs = decode(data, channels), decode(same, channels)
    assert ours.shape == theirs.shape == (20, 28, channels)
    assert np.array_equal(ours, theirs)


def test_the_orientation_of_a_photo_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode(as_file(pixels(), "AVIF", exif=exif), 3).shape == (28, 20, 3)


def test_a_large_one_is_reduced():
    assert decode(as_file(pixels(200, 300), "AVIF"), 3, min_side=40).shape == (50, 75, 3)


@pytest.mark.parametrize(("kind", "data"), [("HEIC", b"\0\0\0\x18ftypheic"), ("JPEG XL", b"\xff\x0a\0\0"), ("AVIF", b"\0\0\0\x18ftypavif")])
def test_a_format_without_its_plug_in_is_named_with_the_command(kind, data, monkeypatch):
    monkeypatch.setattr(formats, "lacking", lambda kind: "pip install something")
    assert defect(data) == f"{kind} can't be read here; to read it: pip install something"
    with pytest.raises(UnreadableImage, match="to read it: pip install something"):
        decode(data, 3)


def test_what_is_lacking_follows_from_what_is_installed(monkeypatch):
    formats.lacking.cache_clear()
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    assert formats.lacking("HEIC") == "pip install pillow-heif"
    assert formats.lacking("JPEG XL") == "pip install pillow-jxl-plugin"
    formats.lacking.cache_clear()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:60] + bytes(len(data) - 60), lambda data: data[: len(data) // 2]], ids=["zeros", "cut"]
)
@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "JXL"])
def test_a_damaged_one_is_one_line(kind, damage):
    with pytest.raises(UnreadableImage) as error:
        decode(damage(as_file(pixels(), kind)), 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}], ids=["VP8", "VP8L", "VP8X"])
def test_the_size_of_every_kind_of_webp_is_known(options, request):
    data = as_file(pixels(), "WEBP", **options)
    assert data[12:16].decode().strip() == request.node.callspec.id
    assert formats.promised_size(data) == (20, 28)


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, False), (5, True), (6, True), (8, True)])
def test_a_turned_jpeg_is_known_by_its_header(orientation, turned):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    exif[0x0112] = orientation
    data = as_file(pixels(), "JPEG", exif=exif)
    assert is_turned(data) == turned
    assert decode(data, 3).shape[:2] == ((28, 20) if turned else (20, 28))
    for end in range(0, 120, 7):
        is_turned(data[:end])  # a header that is cut off does no harm


def test_a_photo_without_exif_is_not_turned():
    assert not is_turned(as_file(pixels(), "JPEG"))


@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "JXL"])
def test_sizes_are_those_that_are_shown(kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "x"
    path.write_bytes(as_file(pixels(), kind, **({} if kind == "JXL" else {"exif": exif})))
    data = path.read_bytes()
    assert formats.size_by_pillow(path, formats.by_pillow(data)) == decode(data, 3).shape[:2]
    path.write_bytes(data[:30])
    assert formats.size_by_pillow(path, formats.by_pillow(data)) is None


def bomb(width: int, height: int) -> bytes:
    """A PNG of zeros, which packs a thousand to one."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header():
    with pytest.raises(UnreadableImage, match=r"^30,000 x 30,000 pixels, more than --max-pixels 134,217,728$"):
        decode(bomb(30_000, 30_000), 3)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "PPM", "WEBP", "JPEG2000", "JPEG", "AVIF", "HEIF", "JXL"])
def test_every_format_is_held_to_the_limit(kind):
    data = as_file(pixels(), kind)
    with pytest.raises(UnreadableImage, match=r"28 x 20 pixels, more than --max-pixels 559"):
        decode(data, 3, max_pixels=559)
    if kind != "GIF":
        assert decode(data, 3, max_pixels=560).shape == (20, 28, 3)


def test_a_jpeg_counts_as_it_is_once_reduced():
    data = as_file(pixels(400, 400), "JPEG")
    assert decode(data, 3, min_side=100, max_pixels=10_000).shape == (100, 100, 3)
    with pytest.raises(UnreadableImage, match="400 x 400"):
        decode(data, 3, max_pixels=10_000)


def test_a_colour_profile_is_not_handed_to_libpng_and_changes_no_pixel(capfd, tmp_path):
    plain = as_file(pixels(), "PNG")
    with_profile = as_file(pixels(), "PNG", icc_profile=b"no profile at all" * 9)
    stripped = formats.without_colour_profile(with_profile)
    assert b"iCCP" in with_profile
    assert b"iCCP" not in stripped
    assert np.array_equal(decode(with_profile, 3), decode(plain, 3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("length", range(0, 60, 3))
def test_a_short_png_does_no_harm(length):
    data = bomb(3, 3)[:length]
    assert isinstance(formats.without_colour_profile(data), bytes)
    formats.promised_size(data)
