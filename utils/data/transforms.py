"""Augmentation of training images, seeded per image: presets, crops, colours, automatic policies, mixup and cutmix.

Crops and colours follow torchvision's distributions but run as one OpenCV crop and one colour matrix, about ten times
faster than its separate transforms; everything else is torchvision's v2.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.data.images import Image, as_bytes, letterbox, preprocess, resize
from utils.errors import UserError, unknown
from utils.spec import ModelSpec


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented.

    Attributes:
        scale: range of the crop's area, as a share of the image's; None means the crop of validation.
        ratio: range of the crop's width / height.
        fliplr: probability of a horizontal flip.
        jitter: brightness, contrast and saturation are scaled by factors in [1 - jitter, 1 + jitter].
        jitter_probability: probability that the colours change.
        policy: "none", "trivial" (TrivialAugment, arXiv:2103.10158) or "rand" (RandAugment, arXiv:1909.13719).
        erasing: probability that a rectangle is erased (arXiv:1708.04896).
    """

    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    fliplr: float = 0.5
    jitter: float = 0.0
    jitter_probability: float = 0.5
    policy: str = "none"
    erasing: float = 0.0

    @property
    def is_heavy(self) -> bool:
        """Whether images go through torchvision's transforms, which take ten times as long as the rest."""
        return self.policy != "none" or self.erasing > 0


PRESETS: dict[str, Augmentation] = {
    "none": Augmentation(scale=None, fliplr=0.0),
    "light": Augmentation(scale=(0.6, 1.0)),
    "default": Augmentation(jitter=0.4),  # YOLOv5's
    "strong": Augmentation(jitter=0.4, policy="trivial", erasing=0.25),
}
POLICIES = ("none", "trivial", "rand")


def augmentation(preset: str, *, fliplr: float | None, policy: str | None = None, erasing: float | None = None) -> Augmentation:
    """Return a preset with some of its values replaced; None keeps the preset's.

    Raises:
        UserError: the preset or policy is unknown, or a probability out of range.
    """
    if preset not in PRESETS:
        raise unknown("augmentation preset", preset, PRESETS)
    if policy is not None and policy not in POLICIES:
        raise unknown("augmentation policy", policy, POLICIES)
    for name, value in (("fliplr", fliplr), ("erasing", erasing)):
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; it is a probability in [0, 1]")
    given = {"fliplr": None if preset == "none" else fliplr, "policy": policy, "erasing": erasing}
    return replace(PRESETS[preset], **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]


class TrainTransform:
    """Augments one image, uint8 [H, W, C] -> uint8 of the network's size, as a pure function of (image, seed)."""

    def __init__(self, augmentation: Augmentation, spec: ModelSpec) -> None:
        self.augmentation, self.spec = augmentation, spec
        self.policies: list[Callable[[Tensor], Tensor]] | None = None

    def __call__(self, image: Image, seed: int) -> Image:
        what, draw = self.augmentation, random.Random(seed)
        if what.scale is None:
            out = preprocess(image, self.spec)
        else:
            image = letterbox(image, self.spec) if self.spec.fit == "letterbox" else image
            low, high = (aspect * self._aspect(image) for aspect in what.ratio)
            top, left, height, width = random_crop(image.shape[0], image.shape[1], what.scale, (low, high), draw)
            out = resize(image[top : top + height, left : left + width], *self.spec.size)
        if draw.random() < what.fliplr:
            out = out[:, ::-1]
        if what.jitter and draw.random() < what.jitter_probability:
            out = jitter_colours(out, what.jitter, draw)
        if what.is_heavy:
            out = self._apply_policies(out, draw.getrandbits(63))
        return out

    def _aspect(self, image: Image) -> float:
        """Return the width of a crop that is not distorted otherwise than validation's, in heights."""
        height, width = image.shape[:2] if self.spec.fit == "squash" else self.spec.size
        return width / height

    def _apply_policies(self, image: Image, seed: int) -> Image:
        if self.policies is None:  # made on first use: torchvision takes seconds to import
            self.policies = _torchvision_policies(self.augmentation)
        tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(seed)
            for policy in self.policies:
                tensor = policy(tensor)
        return tensor.permute(1, 2, 0).numpy()


def _torchvision_policies(what: Augmentation) -> list[Callable[[Tensor], Tensor]]:
    from torchvision.transforms import v2

    named: dict[str, list[Callable[[Tensor], Tensor]]] = {"none": [], "trivial": [v2.TrivialAugmentWide()], "rand": [v2.RandAugment()]}
    return named[what.policy] + ([v2.RandomErasing(p=what.erasing)] if what.erasing else [])


def random_crop(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draw: random.Random
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) as torchvision's RandomResizedCrop does (arXiv:1409.4842)."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, height - h), draw.randint(0, width - w), h, w
    # No such crop fits an image this long or thin: take the centre, as close to the allowed ratios as possible.
    w, h = min(width, max(round(height * ratio[1]), 1)), min(height, max(round(width / ratio[0]), 1))
    return (height - h) // 2, (width - w) // 2, h, w


LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as torchvision's grey conversion


def jitter_colours(image: Image, strength: float, draw: random.Random) -> Image:
    """Scale brightness, contrast and saturation by random factors in [1 - strength, 1 + strength].

    Each of the three is an affine map of the colours, so they are composed and applied at once.
    Differs: torchvision clamps to [0, 255] after each of the three and shuffles them; here the order is fixed, with one clamp.
    """
    brightness, contrast, saturation = (draw.uniform(max(0.0, 1 - strength), 1 + strength) for _ in range(3))
    image = np.ascontiguousarray(image)
    means = np.array(cv2.mean(image)[: image.shape[2]], dtype=np.float32) * brightness
    if image.shape[2] == 1:
        affine = np.array([[brightness * contrast, means[0] * (1 - contrast)]], np.float32)
        return as_bytes(cv2.transform(image, affine).reshape(image.shape))
    colours = saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * LUMA  # each row mixes in the luma
    offset = (1 - contrast) * float(LUMA @ means)
    matrix = np.concatenate([brightness * contrast * colours, np.full((3, 1), offset, np.float32)], axis=1)
    return np.asarray(cv2.transform(image, matrix))


def normalise(images: Tensor, spec: ModelSpec) -> Tensor:
    """Return (x / 255 - mean) / std: uint8 [B, H, W, C] -> float32 [B, C, H, W], channels-last in memory."""
    mean = torch.tensor(spec.mean, device=images.device) * 255
    scale = 1 / (torch.tensor(spec.std, device=images.device) * 255)
    return images.float().sub_(mean).mul_(scale).permute(0, 3, 1, 2)


def normalisation_tables(spec: ModelSpec) -> NDArray[np.float32]:
    """Return the result of ``normalise`` for every value of a byte: [C, 256]."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(1, 256, 1, spec.channels)
    return normalise(values, spec)[0, :, :, 0].contiguous().numpy()


def normalise_by_table(images: NDArray[np.uint8], tables: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute ``normalise``, to the same bits, without torch: [B, H, W, C] -> [B, C, H, W], contiguous.

    torch's threads keep spinning after an operation, on cores that another runtime needs next: a ResNet-50 in OpenVINO's
    int8 took 12 ms after ``normalise`` and takes 8 ms after this.
    """
    batch, height, width, channels = images.shape
    planes = np.empty((batch, channels, height, width), np.float32)
    for image, plane in zip(images, planes, strict=True):
        for channel in range(channels):
            cv2.LUT(image[..., channel], tables[channel], dst=plane[channel])
    return planes


class Mixing:
    """Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) of a batch, by torchvision's v2.

    Args:
        mixup, cutmix: share of the batches that get each; the sum must not exceed 1.
        num_classes: length of the soft labels.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        if min(mixup, cutmix) < 0 or mixup + cutmix > 1:
            raise UserError(f"mixup {mixup} and cutmix {cutmix} are shares of the batches: at least 0, together at most 1")
        self.mixup, self.cutmix, self.num_classes = mixup, cutmix, num_classes

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix float images [B, C, H, W] and labels [B] with torch's global generator; labels may become [B, classes]."""
        if self.mixup + self.cutmix == 0 or len(images) < 2:
            return images, labels
        from torchvision.transforms import v2

        draw = float(torch.rand(()))
        if draw >= self.mixup + self.cutmix:
            return images, labels
        mix = v2.MixUp(alpha=0.2, num_classes=self.num_classes) if draw < self.mixup else v2.CutMix(alpha=1.0, num_classes=self.num_classes)
        mixed, soft = mix(images, labels)
        return mixed, soft
