"""Sums over a layer's samples, from which its least squares are solved."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from compression.layers.samples import LayerSamples

BLOCK = 512  # columns of a Gram matrix that are computed at once


def gram_matrix(x: Tensor) -> Tensor:
    """Return x^T x of the samples x [.., n, d]: [.., d, d]. What lies below the diagonal is copied, which saves almost half of the work."""
    size = x.shape[-1]
    if size < 2 * BLOCK:
        return x.mT @ x
    found = x.new_empty(*x.shape[:-2], size, size)
    for begin in range(0, size, BLOCK):
        block = slice(begin, begin + BLOCK)
        rows = x[..., block].mT @ x[..., begin:]
        found[..., block, begin:] = rows
        found[..., begin:, block] = rows.mT
    return found


@dataclass(frozen=True)
class Moments:
    """Sums over n samples x and targets y, for each group of outputs, in float64.

    Attributes:
        gram, cross: of x x^T [G, d, d] and x y^T [G, d, o].
        x, y, yy: of x [G, 1, d], y and y^2 [G, 1, o].
        count: n.
    """

    gram: Tensor
    cross: Tensor
    x: Tensor
    y: Tensor
    yy: Tensor
    count: int

    @classmethod
    def of(cls, samples: LayerSamples, targets: Tensor, begin: int, end: int) -> Moments:
        """Sum over the images from ``begin`` to ``end``; targets are [N, P, groups x o]."""
        sums: list[Tensor] = []
        for chosen, x in samples.chunks(begin, end):
            y = targets[chosen].double().reshape(x.shape[1], samples.groups, -1).transpose(0, 1)
            parts = (gram_matrix(x), x.transpose(1, 2) @ y, x.sum(1, True), y.sum(1, True), (y * y).sum(1, True))
            sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else list(parts)
        gram, cross, sum_x, sum_y, sum_yy = sums
        return cls(gram, cross, sum_x, sum_y, sum_yy, (end - begin) * samples.per_image)

    def errors(self, matrix: Tensor, bias: Tensor) -> Tensor:
        """Return the summed squared error of each output, [G, 1, o]."""
        product = (matrix * (self.gram @ matrix - 2 * self.cross)).sum(1, keepdim=True)
        return self.yy + product + 2 * bias * (self.x @ matrix - self.y) + self.count * bias * bias

    def variance(self) -> Tensor:
        """Return the summed squared distance of each output from its mean, [G, 1, o]."""
        return self.yy - self.y * self.y / self.count

    def __add__(self, other: Moments) -> Moments:
        """Return the moments over both sets of samples."""
        sums = (getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        return Moments(*sums)

    def centred(self) -> Moments:
        """Return the moments about the means, from which the bias drops out."""
        x, y, n = self.x, self.y, self.count
        gram, cross = self.gram - x.transpose(1, 2) @ x / n, self.cross - x.transpose(1, 2) @ y / n
        return Moments(gram, cross, torch.zeros_like(x), torch.zeros_like(y), self.yy - y * y / n, n)

    def ridge(self, old: Tensor, strength: float) -> Tensor | None:
        """Return the matrix of least squared error + strength x (mean diagonal of the Gram matrix) x |matrix - old|^2.

        None if the Gram matrix is singular in spite of the ridge.
        """
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        ridge = torch.diag_embed((strength * diagonal.mean(1, keepdim=True)).expand_as(diagonal))
        factor, failed = torch.linalg.cholesky_ex(self.gram + ridge)
        return None if failed.any() else old + torch.cholesky_solve(self.cross - self.gram @ old, factor)

    def bias(self, matrix: Tensor) -> Tensor:
        """Return the bias of least squared error, [G, 1, o]."""
        return (self.y - self.x @ matrix) / self.count
