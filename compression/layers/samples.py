"""Outputs of a convolution or linear layer as a matrix product, at some of its positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compression.layers.calls import CONVOLUTIONS, TRANSPOSED

SAMPLE_BYTES = 1 << 27  # of samples at a time
SAMPLES = 1 << 15  # of all images together, as far as the next line allows
POSITIONS = (16, 64)  # outputs of an image that are sampled: at least, at most


def positions_for(images: int) -> int:
    """Return how many outputs of each image are sampled: more images say more than more positions of the same ones."""
    least, most = POSITIONS
    return min(max(SAMPLES // max(images, 1), least), most)


@dataclass(frozen=True)
class LayerSamples:
    """A layer's outputs as a matrix product: output = samples @ matrix + bias.

    Attributes:
        images: inputs of the equivalent plain convolution, [N, ..., C], padded; of a linear layer [N, P, C].
        places: for each spatial dimension the first input position of each sampled output, [N, P]; none for a linear layer.
        kernel, dilation: of the convolution.
        groups: of the convolution.
        matrix: the weight as [groups, inputs of an output, outputs of a group].
        restore: makes a weight of such a matrix.
    """

    images: Tensor
    places: tuple[Tensor, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    matrix: Tensor
    restore: Callable[[Tensor], Tensor]

    @property
    def per_image(self) -> int:
        """How many outputs of an image are sampled."""
        return self.places[0].shape[1] if self.places else self.images.shape[1]

    def chunks(self, begin: int, end: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the images, and their samples, [groups, images x P, inputs of an output]."""
        step = max(1, SAMPLE_BYTES // (8 * self.groups * self.per_image * self.matrix.shape[1]))
        for first in range(begin, end, step):
            chosen = slice(first, min(first + step, end))
            yield chosen, self._of(chosen).to(dtype)

    def _of(self, chosen: slice) -> Tensor:
        images = self.images[chosen]
        if self.places:
            count, dims = len(images), len(self.kernel)
            index: list[Tensor] = [torch.arange(count, device=images.device).view(-1, *[1] * (dims + 1))]
            for dim, (places, size, dilation) in enumerate(zip(self.places, self.kernel, self.dilation, strict=True)):
                steps = torch.arange(size, device=images.device) * dilation
                index.append(places[chosen].view(count, -1, *[1] * dims) + steps.view(*[-1 if d == dim else 1 for d in range(dims)]))
            images = images[tuple(index)]  # [images, P, *kernel, C]
        width = images.shape[-1] // self.groups
        parts = images.reshape(-1, math.prod(self.kernel), self.groups, width)
        return parts.permute(2, 0, 3, 1).reshape(self.groups, len(parts), -1)


def output_places(count: int, sizes: Sequence[int], most: int, seed: int) -> Tensor:
    """Draw up to ``most`` output positions (flat) for each of ``count`` images, [count, P]; all of them where there are no more."""
    total = math.prod(sizes)
    if total <= most:
        return torch.arange(total).expand(count, -1)
    return torch.randint(total, (count, most), generator=torch.Generator().manual_seed(seed))


def layer_samples(func: Any, args: Sequence[Any], kwargs: dict[str, Any], most: int, seed: int) -> LayerSamples:
    """Describe a call of a convolution (plain, grouped, transposed; 1-D to 3-D) or linear layer as a matrix product.

    Args:
        func, args, kwargs: the call, as ``torch.conv2d``, ``F.linear`` and the like take it.
        most: outputs to sample of an image.
        seed: of the samples.
    """
    images, weight = args[0], args[1]
    if func is F.linear:
        matrix = weight.double().t().unsqueeze(0)
        return LayerSamples(images.reshape(len(images), -1, images.shape[-1]), (), (), (), 1, matrix, lambda found: found[0].t())
    dims = CONVOLUTIONS.get(func) or TRANSPOSED[func]
    names: tuple[str, ...] = ("stride", "padding", "dilation", "groups")
    if func in TRANSPOSED:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
    options: dict[str, Any] = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
    options |= dict(zip(names, args[3:], strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    groups, kernel = options["groups"], tuple(weight.shape[2:])
    stride, dilation, extra = (_each(options[name], dims) for name in ("stride", "dilation", "output_padding"))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if func in TRANSPOSED:
        padding = _each(options["padding"], dims)
        images = _spread(images, stride)
        margins = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
        stride = (1,) * dims
        plain = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1).flip(list(range(2, 2 + dims)))
    else:
        same = options["padding"] == "same"
        padding = _each(0 if isinstance(options["padding"], str) else options["padding"], dims)
        margins = [(r // 2, r - r // 2) if same else (p, p) for r, p in zip(reach, padding, strict=True)]
        plain = weight
    images = F.pad(images, [margin for pair in reversed(margins) for margin in pair])
    sizes = [(size - r - 1) // s + 1 for size, r, s in zip(images.shape[2:], reach, stride, strict=True)]
    flat = output_places(len(images), sizes, most, seed).to(images.device)
    places = tuple(place * s for place, s in zip(_unravel(flat, sizes), stride, strict=True))
    matrix = plain.double().reshape(groups, len(plain) // groups, -1).transpose(1, 2)

    def restore(found: Tensor) -> Tensor:
        new = found.transpose(1, 2).reshape(plain.shape)
        if func in TRANSPOSED:
            new = new.flip(list(range(2, 2 + dims))).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return new.reshape(weight.shape)

    return LayerSamples(images.movedim(1, -1), places, kernel, dilation, groups, matrix, restore)


def sampled(outputs: Tensor, func: Any, most: int, seed: int, first: int = 0, count: int | None = None) -> Tensor:
    """Return a layer's outputs at the sampled positions, [N, P, channels].

    Args:
        outputs: of the images from ``first`` on, of ``count`` in all.
        func, most, seed: as given to ``layer_samples``.
    """
    if func is F.linear:
        return outputs.reshape(len(outputs), -1, outputs.shape[-1])
    flat = output_places(count or len(outputs), outputs.shape[2:], most, seed)[first : first + len(outputs)].to(outputs.device)
    return outputs.flatten(2).gather(2, flat.unsqueeze(1).expand(-1, outputs.shape[1], -1)).transpose(1, 2)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _spread(images: Tensor, stride: Sequence[int]) -> Tensor:
    """Put zeros between the pixels, as a transposed convolution of that stride does."""
    sizes = [(size - 1) * s + 1 for size, s in zip(images.shape[2:], stride, strict=True)]
    spread = images.new_zeros(*images.shape[:2], *sizes)
    every = [slice(None), slice(None), *(slice(None, None, step) for step in stride)]
    spread[tuple(every)] = images
    return spread


def _unravel(flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    places = []
    for size in reversed(sizes):
        places.append(flat % size)
        flat = flat // size
    return places[::-1]
