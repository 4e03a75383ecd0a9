"""Multiply-adds and parameters as functions of the groups' widths, without building anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compression.tracing.graph import ChannelGraph, Keep

Widths = NDArray[np.float64]


class Cost:
    """A sum of products of sizes, each an affine function of the widths (units kept per group), and of what each unit costs itself.

    The cost at widths is the mean over all choices of so many units. Mostly each unit has the same number of channels,
    and all choices cost the same; ``of`` is exact in any case.

    Args:
        graph: the network's channel groups.
        terms: (tensor, factor): the sum is of factor * elements of the tensor.
        rest: what does not depend on the widths.
        products: (nodes, cost of each) of products of activations.
    """

    def __init__(
        self, graph: ChannelGraph, terms: Sequence[tuple[str, int]], rest: int, products: Sequence[tuple[Tensor, int]] = ()
    ) -> None:
        self.graph, self.terms, self.products = graph, terms, products
        self.names = [group.name for group in graph.groups]
        self.full = np.array([group.size for group in graph.groups], dtype=np.float64)
        place = {name: i for i, name in enumerate(self.names)}
        depth = max((len(graph.shapes[name]) for name, _ in terms), default=1) or 1
        self.factors = np.array([factor for _, factor in terms], dtype=np.float64)
        self.constant = np.ones((depth, len(terms)))
        self.slope = np.zeros((depth, len(terms), len(self.names)))
        per_unit: dict[tuple[str, int], dict[int, float]] = {}
        for group in graph.groups:
            for member in group.members:
                free = sum(unit not in group.fixed for unit in member.units.tolist())  # what must stay counts as constant
                per_unit.setdefault((member.tensor, member.dim), {})[place[group.name]] = free / max(group.size - len(group.fixed), 1)
        for t, (name, _) in enumerate(terms):
            for dim, size in enumerate(graph.shapes[name]):
                shares = per_unit.get((name, dim), {})
                for g, share in shares.items():
                    self.slope[dim, t, g] = share
                self.constant[dim, t] = size - sum(share * self.full[g] for g, share in shares.items())
        self.active = [dim for dim in range(depth) if self.slope[dim].any()]
        self.fixed = self.factors * np.prod([self.constant[dim] for dim in range(depth) if dim not in self.active] or [1.0], axis=0)
        self.rest = rest
        self.of_unit, self.unmoved = np.zeros(len(self.names)), 0
        for nodes, each in products:
            for component in graph.component[nodes].tolist():
                if component in graph.units:
                    g = place[graph.units[component][0]]
                    self.of_unit[g] += each / self.full[g]
                else:
                    self.unmoved += each

    def vector(self, widths: Mapping[str, int]) -> Widths:
        """Return widths in the order of the groups; groups that are not named are whole."""
        return np.array([widths.get(name, size) for name, size in zip(self.names, self.full, strict=True)], dtype=np.float64)

    def sizes(self, widths: Widths) -> Widths:
        """Return the sizes of the terms' tensors [dims, terms] at widths; at many, [N, groups], those of each [dims, N, terms]."""
        return np.stack([constant + widths @ slope.T for constant, slope in zip(self.constant, self.slope, strict=True)])

    def __call__(self, widths: Widths) -> float:
        """Return the cost at widths."""
        product = self.fixed
        for dim in self.active:
            product = product * (self.constant[dim] + self.slope[dim] @ widths)
        return float(product.sum() + self.of_unit @ widths) + self.unmoved + self.rest

    def of(self, keep: Keep) -> int:
        """Return the cost of a keep-set, exactly."""
        indices = self.graph.indices(keep)
        of_weights = sum(factor * self.graph.numel(name, indices) for name, factor in self.terms)
        gone = self.graph.removed(keep)
        return of_weights + sum(each * int((~gone[nodes]).sum()) for nodes, each in self.products) + self.rest


def macs_cost(graph: ChannelGraph, total: int) -> Cost:
    """Return the multiply-adds for one image; ``total``: the dense network's, some of which may belong to no weight."""
    terms = [(contraction.weight, contraction.repeats) for contraction in graph.contractions]
    return Cost(graph, terms, total - graph.macs({}), graph.record.products)


def params_cost(graph: ChannelGraph, names: Sequence[str]) -> Cost:
    """Return the elements of the named parameters."""
    return Cost(graph, [(name, 1) for name in names], 0)
