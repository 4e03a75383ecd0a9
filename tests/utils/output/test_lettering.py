"""Class names of any script in pictures: drawn where a font has them, else replaced, and no library warns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.output import lettering
from utils.output.plots import annotate, mosaic, plot_confusion

NAMES = ("caf\u00e9", "\u03a9\u03bc\u03ad\u03b3\u03b1", "\u043a\u043e\u0442", "\u732b\u200d", "\U0001f431 cat", "$5 & \\x")


def test_characters_that_no_font_has_are_replaced():
    assert lettering.drawable(" ".join(NAMES[:3])) == " ".join(NAMES[:3])
    assert lettering.drawable("a\ue123b") == f"a{lettering.MISSING}b"
    assert lettering.drawable("x\ufe0fy\u200dz") == "xyz"
    assert lettering.text_width("ab", 12) > lettering.text_width("a", 12) > 0


@pytest.mark.usefixtures("plots")
def test_pictures_of_any_names_are_written_without_a_warning(tmp_path, capfd):
    plot_confusion(torch.eye(len(NAMES), dtype=torch.int64) * 3, NAMES, tmp_path / "confusion.png")
    images = [np.full((20, 60, 3), 40 * i, np.uint8) for i in range(len(NAMES))]
    mosaic(images, NAMES, tmp_path / "mosaic.jpg", [(200, 0, 0)] * len(NAMES))
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    assert (tmp_path / "mosaic.jpg").stat().st_size > 1000
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["plain", "caf\u00e9", "\u732b", "\ue000"])
def test_text_is_drawn_inside_the_picture_in_its_colour(text):
    canvas = np.zeros((40, 120, 3), np.uint8)
    lettering.draw_text(canvas, text, 4, 30, 20, (255, 0, 0))
    assert canvas[:, :, 0].max() > 200
    assert canvas[:, :, 1:].max() == 0
    assert annotate(np.zeros((200, 200, 3), np.uint8), [text]).max() > 150
    lettering.draw_text(canvas, text * 50, 110, 38, 20, (0, 255, 0))  # runs out of the picture
    lettering.draw_text(canvas, text, 500, 500, 20, (0, 0, 255))
    assert canvas[:, :, 2].max() == 0
