import io

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow

from utils.data.images import (
    IMAGE_SUFFIXES,
    UnreadableImage,
    as_channels,
    decode,
    defect,
    is_image_file,
    jpeg_size,
    preprocess,
    read_image,
    resize,
)
from utils.spec import ModelSpec


def crop(imgsz, crop_fraction=1.0, fit="crop"):
    return ModelSpec("x", 2, imgsz, crop_fraction=crop_fraction, fit=fit)


def encode(image, suffix, **options):
    """Encode an RGB or grey array."""
    bgr = image if image.ndim == 2 else image[:, :, ::-1]
    ok, data = cv2.imencode(suffix, np.ascontiguousarray(bgr), [v for pair in options.items() for v in (getattr(cv2, pair[0]), pair[1])])
    assert ok
    return data.tobytes()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def with_segment(jpeg, marker, payload):
    return jpeg[:2] + bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload + jpeg[2:]


def with_orientation(image, orientation, form="JPEG"):
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Pillow.fromarray(image).save(file, form, exif=exif, **({"quality": 100, "subsampling": 0} if form == "JPEG" else {}))
    return file.getvalue()


JPEG = encode(noise(48, 64), ".jpg")
PNG = encode(noise(48, 64), ".png")


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_image_suffix_counts_in_either_case_unless_hidden(suffix, tmp_path):
    assert is_image_file(tmp_path / f"a{suffix}")
    assert is_image_file(tmp_path / f"a{suffix.upper()}")
    assert not is_image_file(tmp_path / f".a{suffix}")
    assert not is_image_file(tmp_path / f"a{suffix}.txt")


def test_jpeg_size_is_read_from_the_header_behind_other_segments():
    assert jpeg_size(JPEG) == (48, 64)
    assert jpeg_size(with_segment(JPEG, 0xE1, b"Exif" + b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01" * 3)) == (48, 64)
    assert jpeg_size(encode(noise(33, 7), ".jpg", IMWRITE_JPEG_PROGRESSIVE=1)) == (33, 7)
    assert jpeg_size(b"\xff\xd8\xff\xd9") is None


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif", ".ppm", ".pgm", ".jp2"])
def test_whole_files_have_no_defect_and_decode(suffix):
    data = encode(noise(48, 64) if suffix != ".pgm" else noise(48, 64)[:, :, 0], suffix)
    assert defect(data) is None
    assert decode(data, 3).shape == (48, 64, 3)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95, 0.999])
@pytest.mark.parametrize(("whole", "reason"), [(JPEG, "truncated JPEG"), (PNG, "truncated PNG")])
def test_truncated_files_are_refused(whole, reason, keep):
    part = whole[: int(len(whole) * keep)]
    with pytest.raises(UnreadableImage, match=r"truncated|frame header"):
        decode(part, 3)
    if keep > 0.5:
        assert defect(part) == reason


def test_end_marker_of_an_exif_thumbnail_does_not_hide_a_truncation():
    whole = with_segment(JPEG, 0xE1, b"Exif\x00\x00" + encode(noise(8, 8), ".jpg"))
    assert defect(whole) is None
    assert defect(whole[:-200]) == "truncated JPEG"


def test_jpeg_that_ends_before_its_scan_is_truncated_though_its_thumbnail_is_whole():
    whole = with_segment(JPEG, 0xE1, b"Exif\x00\x00" + encode(noise(8, 8), ".jpg"))
    assert defect(whole[: whole.rfind(b"\xff\xda")]) == "truncated JPEG"


def test_bytes_behind_the_end_of_a_jpeg_do_not_matter():
    # Phones append videos and previews of any content, such as these bytes that look like the start of a scan.
    assert defect(JPEG + b"trailer \xff\xda trailer") is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>", "not an image"),
        (b"\xff\xd8\xff\xd9", "JPEG without a frame header"),
        (b"PK\x03\x04" * 9, "not an image, or damaged"),
    ],
)
def test_what_is_no_image_is_refused(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode(data, 3)


def test_absent_file_and_folder_are_unreadable(tmp_path):
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(tmp_path / "absent.jpg", 3)
    with pytest.raises(UnreadableImage, match="directory"):
        read_image(tmp_path, 3)


def test_colours_are_rgb_and_grey_is_their_luma():
    red = np.zeros((8, 8, 3), np.uint8)
    red[:] = 250, 10, 30
    png = encode(red, ".png")
    assert decode(png, 3)[0, 0].tolist() == [250, 10, 30]
    # 0.299 * 250 + 0.587 * 10 + 0.114 * 30 = 74.75 + 5.87 + 3.42 = 84.04
    assert decode(png, 1).shape == (8, 8, 1)
    assert decode(png, 1)[0, 0].tolist() == [84]
    grey = decode(encode(np.full((8, 8), 77, np.uint8), ".png"), 3)
    assert grey.shape == (8, 8, 3)
    assert (grey == 77).all()


@pytest.mark.parametrize("min_side", [0, 8, 16, 32])
def test_reduced_jpegs_are_rgb_too(min_side):
    red = np.zeros((64, 64, 3), np.uint8)
    red[:] = 250, 10, 30
    pixel = decode(encode(red, ".jpg"), 3, min_side)[2, 2].astype(int)
    assert np.abs(pixel - [250, 10, 30]).max() <= 4  # JPEG is lossy


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize(
    ("min_side", "height", "width"),
    # of 48 x 64: 48 / 2 = 24, 48 / 4 = 12, 48 / 8 = 6
    [(0, 48, 64), (25, 48, 64), (24, 24, 32), (13, 24, 32), (12, 12, 16), (6, 6, 8), (1, 6, 8)],
)
def test_image_is_reduced_while_the_shorter_side_stays_large_enough(suffix, min_side, height, width, channels):
    assert decode(encode(noise(48, 64), suffix), channels, min_side).shape == (height, width, channels)


def test_reduced_png_is_the_mean_of_its_pixels():
    image = np.zeros((4, 4), np.uint8)
    image[:2, :2] = [[10, 20], [30, 40]]  # mean 25
    assert decode(encode(image, ".png"), 1, 2)[:, :, 0].tolist() == [[25, 0], [0, 0]]


@pytest.mark.parametrize(
    ("orientation", "corner"),
    # where the white upper left corner of the stored image is shown: (row, column) of a 2 x 2 grid
    [(1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)), (7, (1, 1)), (8, (1, 0))],
)
@pytest.mark.parametrize("min_side", [0, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_exif_orientation_is_applied(orientation, corner, min_side, channels):
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :32] = 255
    shown = decode(with_orientation(stored, orientation), channels, min_side)
    side = 32 if min_side == 0 else 16
    assert shown.shape[:2] == ((side, 2 * side) if orientation < 5 else (2 * side, side))
    halves = [np.array_split(half, 2, axis=1) for half in np.array_split(shown, 2, axis=0)]
    assert max((halves[r][c].mean(), (r, c)) for r in (0, 1) for c in (0, 1))[1] == corner


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_palettes_and_cmyk_show_the_colours_of_eight_bit_rgb(channels):
    eight = np.zeros((16, 16, 3), np.uint8)
    eight[:8], eight[8:, :8], eight[8:, 8:] = (200, 30, 60), (10, 120, 90), (255, 255, 255)
    plain = decode(encode(eight, ".png"), channels)
    sixteen = encode(eight.astype(np.uint16) * 257, ".png")
    assert np.abs(decode(sixteen, channels).astype(int) - plain).max() <= (channels == 1)  # luma may be rounded before or after

    def saved(image, form, **options):
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    colours = Pillow.fromarray(eight)
    assert np.array_equal(decode(saved(colours.quantize(3), "PNG"), channels), plain)
    cmyk = decode(saved(colours.convert("CMYK"), "JPEG", quality=100, subsampling=0), channels)
    assert np.abs(cmyk.astype(int) - plain)[[2, 12, 12], [2, 3, 12]].max() <= 4  # JPEG is lossy


def test_as_channels_repeats_grey_and_mixes_rgb():
    assert as_channels(np.full((2, 2), 9, np.uint8), 1).tolist() == [[[9], [9]], [[9], [9]]]
    assert as_channels(np.full((1, 1, 1), 9, np.uint8), 3).tolist() == [[[9, 9, 9]]]
    assert as_channels(np.array([[[0, 255, 0]]], np.uint8), 1).tolist() == [[[150]]]  # 0.587 * 255 = 149.7


def test_resize_averages_when_it_shrinks_and_keeps_the_channel_axis():
    image = np.array([[0, 100], [50, 250]], np.uint8)[:, :, None]
    assert resize(image, 1, 1).tolist() == [[[100]]]  # (0 + 100 + 50 + 250) / 4
    assert resize(image, 2, 2) is image
    assert resize(image, 4, 4).shape == (4, 4, 1)


def test_preprocess_cuts_the_centre_square():
    image = np.zeros((2, 6, 1), np.uint8)
    image[:, 2:4] = 200
    assert (preprocess(image, crop(8)) == 200).all()
    assert preprocess(image, crop(8)).shape == (8, 8, 1)
    tall = np.zeros((8, 4, 3), np.uint8)
    tall[3:5, 1:3] = 90  # the centre of 4 * 0.5 = 2 pixels: rows (8 - 2) / 2 = 3, columns (4 - 2) / 2 = 1
    assert preprocess(tall, crop(8, 0.5)).tolist() == [[[90] * 3] * 8] * 8


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(8, 40, 8, 20), (20, 20, 8, 20), (4, 6, 2, 6), (3, 1, 1, 1)])
def test_preprocess_cuts_the_largest_centre_of_the_networks_shape(height, width, rows, columns):
    """Of the shape 2 to 5."""
    image = np.zeros((height, width, 1), np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    image[top : top + rows, left : left + columns] = 100
    assert preprocess(image, crop((8, 20))).tolist() == [[[100]] * 20] * 8


def test_squash_shows_the_whole_image_distorted():
    image = np.zeros((16, 64, 3), np.uint8)
    image[:, 32:] = 200
    out = preprocess(image, crop(16, fit="squash"))
    assert (out[:, :8] == 0).all()
    assert (out[:, 8:] == 200).all()


def test_letterbox_shows_the_whole_image_between_bars_of_the_mean_colour():
    image = np.full((8, 32, 3), 200, np.uint8)
    out = preprocess(image, crop(16, fit="letterbox"))  # 4 x 16, with 6 rows above and below
    assert out.shape == (16, 16, 3)
    assert (out[6:10] == 200).all()
    assert {tuple(pixel) for row in (*out[:6], *out[10:]) for pixel in row} == {(124, 116, 104)}  # ImageNet's mean times 255
    wide = preprocess(np.full((32, 8, 1), 7, np.uint8), ModelSpec("x", 2, (8, 16), channels=1, fit="letterbox"))  # 8 x 2 in 8 x 16
    assert (wide[:, 7:9] == 7).all()
    assert (wide == 7).sum() == 16


def test_preprocess_of_a_single_pixel_keeps_it():
    assert (preprocess(np.full((1, 1, 3), 5, np.uint8), crop(8, 0.1)) == 5).all()
