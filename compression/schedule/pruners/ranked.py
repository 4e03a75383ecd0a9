"""Base of the pruners that rank the structures of a weight and prune the lowest.

A subclass defines the scores; ``sparsities`` defines how many structures are pruned. Structures whose weights are all 0
are pruned first, whatever their score: they contribute nothing, and a mask that kept them would cost others.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from compression.schedule.pruners.counts import share, without_lowest
from compression.schedule.pruners.pruner import Decision, Pruner, PruningTask
from compression.structures import BLOCK_SHAPE, STRUCTURES, Structure
from utils.errors import UserError, unknown
from utils.options import Place, choice, integer, listed, mapping, number, option, optional, parameters, text

FILTERS = ("Filters", "3D")
KINDS = (*FILTERS, "Channels", "Rows", "Blocks")


def _block_shape(value: Any, place: Place) -> dict[str, tuple[int, ...]]:
    given = mapping(value, place)
    if set(given) != {"block_shape"}:
        raise place.error("takes block_shape and nothing else")
    return {"block_shape": listed(integer(1), 4)(given["block_shape"], place / "block_shape")}


@dataclass(kw_only=True)
class RankedPruner(Pruner):
    """Prunes the lowest structures of each weight and keeps at least one.

    Attributes:
        weights: the parameters to prune, in this order.
        group_type: the kind of structure. "Rows" are the inputs of a linear layer: rows of its matrix as [in, out], which
            are the columns of PyTorch's weight.
        group_dependency: None: each weight has its own mask. "Leader": all use the mask of the first weight. "Average": all
            use one mask by their mean scores; the scores of each weight are divided by their mean first.
        kwargs: ``block_shape`` of "Blocks": repetitions, depth, height, width.
        group_size: number of neighbouring structures that are pruned together, by their mean score.
        rounding_fn: the number of structures to prune is rounded down.
        noise: scores are multiplied by 1 + noise * N(0, 1).
    """

    kinds: ClassVar[tuple[str, ...]] = KINDS

    weights: tuple[str, ...] = option(parameters, ())
    group_type: str = option(text, "")
    group_dependency: str | None = option(choice(None, "Leader", "Average"), None)
    kwargs: Mapping[str, tuple[int, ...]] | None = option(optional(_block_shape), None)
    group_size: int = option(integer(1), 1)
    rounding_fn: str = option(choice("math.floor", "floor"), "math.floor")
    noise: float = option(number(least=0), 0.0)

    def __post_init__(self) -> None:
        if not self.weights:
            raise UserError("'weights' is missing")
        for kind in map(self.kind, self.weights):
            if not kind:
                raise UserError("'group_type' is missing")
            if kind not in self.kinds:
                raise unknown("group_type", kind, self.kinds)
            if STRUCTURES[kind].by_shape and self.kwargs is None:
                raise UserError(f"group_type {kind} needs kwargs: {{block_shape: {BLOCK_SHAPE}}}")
        if self.kwargs and not any(STRUCTURES[self.kind(name)].by_shape for name in self.weights):
            raise UserError("block_shape is for group_type Blocks")

    @abstractmethod
    def scores(self, task: PruningTask, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return scores [structures] of some of the weights; the lowest are pruned."""

    @abstractmethod
    def level(self, name: str, task: PruningTask) -> float | Fraction:
        """Return the fraction of a weight's structures to prune."""

    def parameters(self) -> tuple[str, ...]:
        return self.weights

    def kind(self, name: str) -> str:
        """Return the kind of structure of a weight, as the file names it."""
        return self.group_type

    def view(self, name: str, weight: Tensor) -> Tensor:
        """Return a tensor of a weight's shape as [structures, elements of each].

        Raises:
            UserError: the weight has no such structures.
        """
        try:
            return self._structure(name).view(weight, self._block_shape)
        except UserError as error:
            raise UserError(f"{name} (group_type {self.kind(name)}): {error}") from None

    def check(self, weights: Mapping[str, Tensor]) -> None:
        counts = {name: len(self.view(name, weights[name])) for name in self.weights}
        leader = self.weights[0]
        for name, count in counts.items():
            if count % self.group_size:
                raise UserError(f"{name} has {count} structures ({self.kind(name)}), which is no multiple of group_size {self.group_size}")
            if self.group_dependency and count != counts[leader]:
                raise UserError(
                    f"group_dependency {self.group_dependency}: {leader} has {counts[leader]} structures "
                    f"({self.kind(leader)}), {name} has {count} ({self.kind(name)})"
                )

    def decide(self, task: PruningTask) -> Decision:
        self.check(task.weights)
        leader = self.weights[0]
        asked = self.weights[:1] if self.group_dependency == "Leader" else self.weights
        scores = {name: found.double() for name, found in self.scores(task, asked).items()}
        empty = {name: (self.view(name, task.weights[name]) == 0).all(1) for name in asked}
        if self.group_dependency is None:
            kept = {name: self.kept(scores[name], empty[name], self.level(name, task), task) for name in self.weights}
        else:
            mean = torch.stack([found / found.mean().clamp(min=1e-300) for found in scores.values()]).mean(0)
            alike = self.kept(mean, torch.stack(list(empty.values())).all(0), self.level(leader, task), task)
            kept = dict.fromkeys(self.weights, alike)
        return Decision({name: self._expanded(name, kept[name], task.weights[name]) for name in self.weights})

    def kept(self, scores: Tensor, empty: Tensor, level: float | Fraction, task: PruningTask) -> Tensor:
        """Return 1 for each structure that is kept and 0 for the others.

        Args:
            scores: float64 [structures].
            empty: bool [structures]: all weights are 0.
            level: fraction to prune.
            task: its generator is used for random draws.
        """
        if self.noise:
            scores = scores * (1 + self.noise * drawn(torch.randn, scores, task))
        chunks = scores.view(-1, self.group_size).mean(1)
        chunks = chunks.masked_fill(empty.to(scores.device).view(-1, self.group_size).all(1), -math.inf)
        keep = without_lowest(chunks, min(share(level, len(chunks)), len(chunks) - 1))
        return keep.repeat_interleave(self.group_size).double()

    def _expanded(self, name: str, kept: Tensor, weight: Tensor) -> Tensor:
        return self._structure(name).expand(kept.to(weight), weight.shape, self._block_shape)

    def _structure(self, name: str) -> Structure:
        kind = self.kind(name)
        return STRUCTURES["Cols" if kind == "Rows" else kind]

    @property
    def _block_shape(self) -> tuple[int, ...] | None:
        return self.kwargs["block_shape"] if self.kwargs else None


def drawn(draw: Any, like: Tensor, task: PruningTask) -> Tensor:
    """Draw from the task's generator with ``draw`` (torch.rand, torch.randn), in the shape of ``like``."""
    return draw(like.shape, generator=task.generator, device=task.generator.device, dtype=torch.float64).to(like.device)


def covered(found: Mapping[str, Tensor], names: tuple[str, ...], what: str) -> dict[str, Tensor]:
    """Return the measured values of the named weights.

    Raises:
        UserError: one was not measured.
    """
    for name in names:
        if name not in found:
            raise UserError(f"there is no {what} for {name}; there is one for {', '.join(found) or 'no weight'}")
    return {name: found[name] for name in names}
