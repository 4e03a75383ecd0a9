"""Text in pictures: in a font that has its characters, and with a sign in place of those that no font here has."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.images import Image

MISSING = "\N{WHITE SQUARE}"
# Families beyond the one that matplotlib brings, in the order in which they are asked for a character.
FAMILIES = ("Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "IPAGothic", "Arial Unicode MS", "Unifont", "Symbola")


@cache
def fonts() -> dict[str, Path]:
    """Return the files of the fonts that may be used, by family; DejaVu Sans, which is always there, is the first."""
    from matplotlib import font_manager

    files = {entry.name: Path(entry.fname) for entry in reversed(font_manager.fontManager.ttflist) if entry.name in FAMILIES}
    own = Path(font_manager.findfont("DejaVu Sans"))
    return {"DejaVu Sans": own, **{family: files[family] for family in FAMILIES if family in files}}


@cache
def _characters(file: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(file)).get_charmap())


def drawable(text: str) -> str:
    """Return a text with a sign in place of each character that no font has; what only changes others is left out."""
    shown = [char for char in text if not (0xFE00 <= ord(char) <= 0xFE0F or char == "\N{ZERO WIDTH JOINER}")]
    return "".join(
        char if char.isascii() or any(ord(char) in _characters(file) for file in fonts().values()) else MISSING for char in shown
    )


def draw_text(canvas: Image, text: str, left: int, baseline: int, height: int, colour: tuple[int, int, int]) -> None:
    """Draw a line of text into an RGB image, in place.

    Args:
        left, baseline: where it begins, pixels.
        height: of the font, pixels.
        colour: RGB.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw

    text = drawable(text)
    top, bottom, right = (
        max(baseline - height, 0),
        min(baseline + height // 2, len(canvas)),
        min(left + text_width(text, height), canvas.shape[1]),
    )
    if top >= bottom or left >= right:
        return
    picture = Pillow.fromarray(np.ascontiguousarray(canvas[top:bottom, left:right]))
    brush, place = ImageDraw.Draw(picture), 0.0
    for part, font in _parts(text, height):
        brush.text((place, baseline - top), part, fill=colour, font=font, anchor="ls")
        place += font.getlength(part)
    canvas[top:bottom, left:right] = np.asarray(picture)


def text_width(text: str, height: int) -> int:
    """Return the width of a line of text, pixels."""
    return int(np.ceil(sum(font.getlength(part) for part, font in _parts(drawable(text), height)))) + 1


def _parts(text: str, height: int) -> list[tuple[str, Any]]:
    """Split a text into runs of one font each."""
    parts: list[tuple[str, Any]] = []
    for char in text:
        file = next((file for file in fonts().values() if ord(char) in _characters(file)), fonts()["DejaVu Sans"])
        font = _font(file, height)
        if parts and parts[-1][1] is font:
            parts[-1] = (parts[-1][0] + char, font)
        else:
            parts.append((char, font))
    return parts


@cache
def _font(file: Path, height: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(str(file), height)
