"""The time of a network as a function of its widths, fitted to measured ones.

A layer's time is a sum of terms that can't be negative: its multiply-adds, those of widths filled up to the blocks in which kernels
work, what it reads and writes, and what it costs that a width is no multiple of a block. The factors are the same for all layers, but
for the multiply-adds, which have factors of their own for each kind of layer (kernel, stride, groups, size of the map).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compression.tracing.costs import Cost, Widths
from compression.tracing.graph import ChannelGraph
from compression.tracing.record import Contraction

BLOCKS = (8, 16)  # channels that kernels take together
RIDGE = 1e-3
SWEEPS = 3000
HELD_OUT = 5  # every fifth measured network checks the fit


@dataclass(frozen=True)
class Timed:
    """A network whose time was measured: the widths of the groups in the graph's order, and milliseconds."""

    widths: Widths
    ms: float


class LatencyModel:
    """Predicts milliseconds.

    Args:
        graph: of the dense network.
        timed: what was measured, the dense network among it.

    Attributes:
        error: the mean relative error on networks that a fit did not see.
    """

    def __init__(self, graph: ChannelGraph, timed: Sequence[Timed]) -> None:
        layers = list(graph.contractions)
        self.sizes = Cost(graph, [(layer.weight, layer.repeats) for layer in layers], 0)
        self.names, self.full = self.sizes.names, self.sizes.full
        self.repeats = np.array([layer.repeats for layer in layers], dtype=np.float64)
        self.kernel = np.array([math.prod(graph.shapes[layer.weight][2:]) for layer in layers], dtype=np.float64)
        kinds = [_kind(graph, layer) for layer in layers]
        self.of_kind = np.array([[kind == one for one in sorted(set(kinds))] for kind in kinds], dtype=np.float64)
        self.scale = np.maximum(self._terms(np.stack([one.widths for one in timed])).max(0), 1e-12)
        held_out = [one for i, one in enumerate(timed) if i % HELD_OUT == HELD_OUT - 1]
        self.factors = self._fit([one for i, one in enumerate(timed) if i % HELD_OUT != HELD_OUT - 1])
        errors = [abs(self(one.widths) / one.ms - 1) for one in held_out]
        self.error = float(np.mean(errors)) if errors else math.nan
        self.factors = self._fit(timed)

    def __call__(self, widths: Widths) -> float:
        """Return the milliseconds at widths [groups]."""
        return float(self.at(widths[None])[0])

    def at(self, widths: Widths) -> NDArray[np.float64]:
        """Return the milliseconds [N] at widths [N, groups]."""
        return self._terms(widths) / self.scale @ self.factors

    def scaled(self, ratio: float) -> LatencyModel:
        """Return the model with all times longer by a ratio."""
        found = object.__new__(LatencyModel)
        found.__dict__ |= self.__dict__ | {"factors": self.factors * ratio}
        return found

    def _terms(self, widths: Widths) -> NDArray[np.float64]:
        """Return the terms [N, terms]: a constant, sums over all layers, and the multiply-adds by kinds of layers."""
        sizes = self.sizes.sizes(widths)
        out, read = sizes[0], sizes[1] if len(sizes) > 1 else np.ones_like(sizes[0])
        work, maps = self.repeats * self.kernel, self.repeats
        filled = work * _filled(out, BLOCKS[-1]) * read
        both = work * _filled(out, BLOCKS[-1]) * _filled(read, BLOCKS[-1])
        out_fits, read_fits = _fits(out), _fits(read)
        sums = [both, self.kernel * out * read, *(filled * a * b for a in out_fits for b in read_fits)]
        sums += [maps * side * fits for side, each in ((out, out_fits), (read, read_fits)) for fits in each]
        by_kind = [work * out * read, both]
        by_kind = [values @ self.of_kind for values in by_kind]
        sums = [values.sum(-1) for values in sums]
        return np.concatenate([np.ones((len(widths), 1)), np.stack(sums, -1), *by_kind], axis=1)

    def _fit(self, timed: Sequence[Timed]) -> NDArray[np.float64]:
        """Return the factors, none negative, with the least squared relative error."""
        times = np.array([one.ms for one in timed])
        terms = self._terms(np.stack([one.widths for one in timed])) / self.scale / times[:, None]
        return non_negative(terms.T @ terms / len(timed) + RIDGE * np.eye(terms.shape[1]) / times.max() ** 2, terms.mean(0))


def _kind(graph: ChannelGraph, layer: Contraction) -> tuple[int, ...]:
    shape = graph.shapes[layer.weight]
    made_by = {graph.units.get(int(number), ("", 0))[0] for number in graph.component[layer.out]}
    summed = any(len(group.producers) > 1 for group in graph.groups if group.name in made_by)
    return (*shape[2:], layer.repeats, min(layer.groups, 2), int(layer.groups == shape[0]), int(summed))


def _fits(sizes: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Return whether sizes are multiples of no block, of the smaller one only, of the larger."""
    small, large = (sizes % block == 0 for block in BLOCKS)
    return [fits.astype(np.float64) for fits in (~small, small & ~large, large)]


def _filled(sizes: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Return sizes rounded up to whole blocks."""
    return np.ceil(sizes / block) * block


def non_negative(gram: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x >= 0 with the least x'Gx / 2 - t'x, by coordinate descent."""
    found, gradient = np.zeros(len(gram)), -target.copy()
    for _ in range(SWEEPS):
        largest = 0.0
        for i in range(len(gram)):
            new = max(found[i] - gradient[i] / gram[i, i], 0.0)
            if step := new - found[i]:
                gradient += step * gram[i]
                found[i], largest = new, max(largest, abs(step))
        if largest < 1e-9 * max(found.max(), 1e-12):
            break
    return found
