"""Structures: the parts of a weight that are pruned or regularized as one, and the weight as a stack of them.

Every structure is a block: a weight [d0, d1, ...] is cut into blocks [b0, b1, ...], counted row by row. A filter of
[O, I, h, w] is a block [1, I, h, w], an input channel [O, 1, h, w], a kernel [1, 1, h, w].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError

Shape = Sequence[int]


@dataclass(frozen=True)
class Structure:
    """A way to cut weights into parts.

    Attributes:
        name: its name in ``STRUCTURES``.
        meaning: what one part is, and of which weights.
        dims: fewest and most dimensions of a weight that has such parts.
        block: the shape of one part, from the weight's shape.
        by_shape: whether the schedule gives the shape of a part (``block_shape``).
    """

    name: str
    meaning: str
    dims: tuple[float, float]
    block: Callable[[Shape], Shape]
    by_shape: bool = False

    def view(self, weight: Tensor, block_shape: Shape | None = None) -> Tensor:
        """Return a weight as [structures, elements of each], which gradients pass through; see ``block_of``."""
        block = self.block_of(weight.shape, block_shape)
        cut = [size for whole, part in zip(weight.shape, block, strict=True) for size in (whole // part, part)]
        order = [*range(0, len(cut), 2), *range(1, len(cut), 2)]  # the counts of blocks, then their insides
        return weight.reshape(cut).permute(order).reshape(-1, math.prod(block))

    def expand(self, values: Tensor, shape: Shape, block_shape: Shape | None = None) -> Tensor:
        """Return a tensor of a weight's shape in which each structure has its value of ``values`` [structures]."""
        block = self.block_of(shape, block_shape)
        counts = [whole // part for whole, part in zip(shape, block, strict=True)]
        spread = values.reshape([size for count in counts for size in (count, 1)])
        whole = spread.expand([size for pair in zip(counts, block, strict=True) for size in pair]).reshape(tuple(shape))
        return whole.clone(memory_format=torch.contiguous_format)  # reshape may return a view in which elements share memory

    def block_of(self, shape: Shape, block_shape: Shape | None = None) -> Shape:
        """Return the shape of one structure.

        Raises:
            UserError: a weight of this shape has no such structures.
        """
        if not self.dims[0] <= len(shape) <= self.dims[1] or 0 in shape:
            raise UserError(f"structure '{self.name}' is {self.meaning}; a weight of shape {list(shape)} has none")
        if not self.by_shape:
            return self.block(shape)
        if block_shape is None:
            raise UserError(f"structure '{self.name}' is {self.meaning}; give block_shape: {BLOCK_SHAPE}")
        if len(block_shape) != len(shape) or any(part < 1 or whole % part for whole, part in zip(shape, block_shape, strict=True)):
            raise UserError(f"block_shape {list(block_shape)} does not divide a weight of shape {list(shape)}; it is {BLOCK_SHAPE}")
        return block_shape


BLOCK_SHAPE = "[repetitions, depth, height, width]"
_FILTER = "a filter (dim 0) of a weight of 3 dimensions or more, as of a convolution"

STRUCTURES: dict[str, Structure] = {
    structure.name: structure
    for structure in (
        Structure("Filters", _FILTER, (3, math.inf), lambda shape: (1, *shape[1:])),
        Structure("3D", _FILTER, (3, math.inf), lambda shape: (1, *shape[1:])),
        Structure("Channels", "an input channel (dim 1) of a weight", (2, math.inf), lambda shape: (shape[0], 1, *shape[2:])),
        Structure("2D", "a kernel of a weight of 3 dimensions or more", (3, math.inf), lambda shape: (1, 1, *shape[2:])),
        Structure("4D", "a whole weight", (1, math.inf), lambda shape: shape),
        Structure("Rows", "a row (dim 0) of a matrix, as of a linear layer", (2, 2), lambda shape: (1, shape[1])),
        Structure("Cols", "a column (dim 1) of a matrix, as of a linear layer", (2, 2), lambda shape: (shape[0], 1)),
        Structure("Blocks", "a block of a weight of 4 dimensions", (4, 4), lambda shape: shape, by_shape=True),
    )
}

# Pairs of structures that a regularizer may act on at the same time.
COMBINATIONS: dict[str, tuple[Structure, ...]] = {
    names: tuple(STRUCTURES[name] for name in names.split("+")) for names in ("Rows+Cols", "Cols+Rows", "Channels+4D", "4D+Channels")
}
