"""The specification of a classifier as plain data: enough to rebuild it and to prepare its input."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from utils.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_GRAY = ((0.449,), (0.226,))  # the means of the three channels' values

ImageSize = int | tuple[int, int]  # a side; or height and width, if they differ
CHANNELS = (1, 3)  # grey, RGB
FITS = ("crop", "squash", "letterbox")
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 4096


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and not any(unicodedata.category(char) == "Cc" for char in value)


def image_size(value: Sequence[int] | int | None) -> ImageSize | None:
    """Return the size of a network's input from what --imgsz or a file says: a side, or height and width.

    Raises:
        UserError: there are more than two numbers.
    """
    if value is None or isinstance(value, int):
        return value
    if len(value) not in (1, 2):
        raise UserError(f"imgsz is {' '.join(map(str, value))}; it takes one number, or height and width")
    return value[0] if value[0] == value[-1] else (value[0], value[1])


@dataclass(frozen=True)
class ModelSpec:
    """A classifier's architecture, classes, input and pre-processing.

    Attributes:
        name: an architecture's name (``models.ARCHITECTURES``, torchvision, timm) or a YAML file's stem.
        num_classes: outputs of the last linear layer.
        imgsz: side of the square input, pixels; of another shape height and width.
        channels: input channels, 1 (grey) or 3 (RGB).
        class_names: one name per output, in the order of the outputs.
        mean, std: per input channel, for pixels in [0, 1].
        definition: the parsed YAML of a network that a file describes, so that its checkpoint does without the file.
        dropout: probability of all dropout layers; None leaves that of the architecture.
        crop_fraction: size of the part in the middle that is resized to imgsz, as a share of the largest one of that shape.
        fit: what happens to an image of another shape: "crop" takes that part, "squash" distorts the whole image, "letterbox"
            shows it whole with bars of the mean colour.
        norm_eps: eps of normalisation layers (by module name), if not the architecture's; a state dict has no eps, so an
            imported network would otherwise change on reload.
        groups: numbers of groups of convolutions and group norms (by module name) that a cut has changed; no tensor's
            shape tells them.
        plain_weights: whether weights that the architecture computes (weight standardisation) were folded into plain ones.
        quantization: how modules (by name) were replaced by quantized ones, as ``models.quantized.recipe_of`` says it.
    """

    name: str
    num_classes: int
    imgsz: ImageSize = 224
    channels: int = 3
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    definition: dict[str, Any] | None = None
    dropout: float | None = None
    crop_fraction: float = 1.0
    fit: str = "crop"
    norm_eps: dict[str, float] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    plain_weights: bool = False
    quantization: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_classes", "channels"):
            if type(getattr(self, name)) is not int:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be a whole number")
        if self.num_classes < 1:
            raise UserError(f"num_classes is {self.num_classes}; it must be at least 1")
        if self.channels not in CHANNELS:
            raise UserError(f"channels is {self.channels}; valid: 1 (grey), 3 (RGB)")
        sides = self.imgsz if isinstance(self.imgsz, tuple) and len(self.imgsz) == 2 else (self.imgsz, self.imgsz)
        for side in sides:
            if type(side) is not int:
                raise UserError(f"imgsz is {self.imgsz!r}; it must be a whole number, or two")
            if not MIN_IMAGE_SIZE <= side <= MAX_IMAGE_SIZE:
                raise UserError(f"image size is {side}; it must lie in {MIN_IMAGE_SIZE}..{MAX_IMAGE_SIZE}")
        if sides[0] == sides[1]:
            object.__setattr__(self, "imgsz", sides[0])
        if self.fit not in FITS:
            raise UserError(f"fit is {self.fit!r}; valid: {', '.join(FITS)}")
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(f"class{i}" for i in range(self.num_classes)))
        if not isinstance(self.class_names, tuple) or not all(_is_line(name) for name in self.class_names):
            raise UserError("class_names must be a list of texts, each on one line and without control characters")
        if len(self.class_names) != self.num_classes:
            raise UserError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        if len(self.mean) != self.channels and self.mean == IMAGENET_MEAN and self.std == IMAGENET_STD:
            mean, std = IMAGENET_GRAY
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "std", std)
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise UserError(f"mean and std have {len(self.mean)} and {len(self.std)} entries for {self.channels} channels")
        if not all(_is_finite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise UserError(f"mean {self.mean} and std {self.std} must be finite numbers, those of std above 0")
        if not _is_finite(self.crop_fraction) or not 0 < self.crop_fraction <= 1:
            raise UserError(f"crop_fraction is {self.crop_fraction!r}; it must lie in (0, 1]")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.imgsz if isinstance(self.imgsz, tuple) else (self.imgsz, self.imgsz)

    @property
    def longest(self) -> int:
        """The longer side of the input."""
        return max(self.size)

    @property
    def size_text(self) -> str:
        """The input's size as people write it: "224 px", "64 x 160 px"."""
        return f"{' x '.join(map(str, self.size))} px" if isinstance(self.imgsz, tuple) else f"{self.imgsz} px"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values; ``from_dict`` is the inverse."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """Rebuild a spec from ``to_dict``'s values.

        Raises:
            UserError: a value is missing, unknown or out of range.
        """
        known = {f.name for f in fields(cls)}
        if unknown_keys := sorted(set(values) - known):
            raise UserError(f"the model spec has unknown entries {unknown_keys}; the file is of a newer version")
        try:
            arguments: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            return cls(**arguments)
        except TypeError as error:
            raise UserError(f"the model spec is incomplete: {error}") from None

    def with_(self, **changes: Any) -> ModelSpec:
        """Return a copy with some values changed."""
        return replace(self, **changes)
