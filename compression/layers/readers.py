"""What the outputs of the weights that read a channel lose with it, after the best refit of the other channels' weights.

For a matrix W [d, o] whose inputs have the covariance C, the inputs S cost its outputs, at least, a mean squared error of

    tr(W_S^T ((C^-1)_SS)^-1 W_S)

and W - C^-1_:S ((C^-1)_SS)^-1 W_S is the matrix that does it (arXiv:2208.11580, equation 3, for blocks of weights: arXiv:2302.04089).
A shift of the outputs costs nothing: a bias or the mean of a batch norm takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compression.layers.calls import LAYERS, ForwardCalls
from compression.layers.moments import gram_matrix
from compression.layers.pieces import in_pieces
from compression.layers.samples import LayerSamples, layer_samples, positions_for
from compression.tracing.graph import ChannelGraph, ChannelGroup
from compression.tracing.record import owned_tensors
from utils.modes import eval_mode

DAMPING = 1e-2  # of the covariance's mean diagonal, added to it
SEEDS = 1 << 20  # apart: more than a forward pass has calls
WORN = 0.8  # share of the inputs that are left, below which the others are left out
LARGEST = 6144  # inputs of an output: no covariance of more is inverted


@dataclass
class InputMoments:
    """Sums over the samples x of a weight's inputs, less a shift near their mean, so that float32 will do within a chunk.

    Attributes:
        shift: s, [groups, 1, d].
        gram: of (x - s) (x - s)^T, [groups, d, d]; of (x - s)^2, [groups, d], where there are more than ``LARGEST`` inputs.
        total: of x - s, [groups, d].
        count: of the samples.
        matrix: the weight, [groups, d, outputs of a group].
        restore: makes a weight of such a matrix.
    """

    shift: Tensor
    gram: Tensor
    total: Tensor
    count: int
    matrix: Tensor
    restore: Callable[[Tensor], Tensor]

    @classmethod
    def near(cls, x: Tensor, samples: LayerSamples) -> InputMoments:
        """Begin sums over no samples, near those of ``x`` [groups, n, d]."""
        groups, _, inputs = x.shape
        gram = torch.zeros(groups, *[inputs] * (2 if inputs <= LARGEST else 1), dtype=torch.float64, device=x.device)
        total = torch.zeros(groups, inputs, dtype=torch.float64, device=x.device)
        return cls(x.double().mean(1, keepdim=True), gram, total, 0, samples.matrix, samples.restore)

    def add_(self, x: Tensor) -> None:
        """Add samples, [groups, n, d]."""
        x = x - self.shift.to(x.dtype)
        self.gram += gram_matrix(x) if self.gram.ndim == 3 else x.square().sum(1)
        self.total += x.sum(1)
        self.count += x.shape[1]

    def covariance(self) -> Tensor:
        """Return the covariance of the inputs, [groups, d, d]; their variances, [groups, d], where there are too many."""
        rest = self.total / self.count
        return self.gram / self.count - (rest.square() if self.gram.ndim == 2 else rest.unsqueeze(2) * rest.unsqueeze(1))

    @cached_property
    def spread(self) -> Tensor:
        """The inverse of the covariance, damped; the variances where there are too many inputs."""
        covariance = self.covariance()
        if covariance.ndim == 2:
            return covariance
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        damping = (DAMPING * diagonal.mean(1, keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
        return torch.cholesky_inverse(torch.linalg.cholesky(covariance + torch.diag_embed(damping.expand_as(diagonal))))

    @cached_property
    def variance(self) -> float:
        """The variance of the outputs, summed over them."""
        covariance = self.covariance()
        made = covariance.unsqueeze(2) * self.matrix if covariance.ndim == 2 else covariance @ self.matrix
        return max(float((self.matrix * made).sum()), 1e-30)

    def mean(self) -> Tensor:
        """Return the mean of the inputs, [groups, 1, d]."""
        return self.shift + (self.total / self.count).unsqueeze(1)


class _Reading(ForwardCalls):
    """Adds up the moments of the inputs of some weights."""

    def __init__(self, wanted: Mapping[int, str], positions: int, seed: int) -> None:
        super().__init__()
        self.wanted, self.positions, self.seed = wanted, positions, seed
        self.moments: dict[str, InputMoments] = {}

    def on_call(self, number: int, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func in LAYERS and (name := self.wanted.get(id(args[1]))):
            samples = layer_samples(func, args, kwargs, self.positions, self.seed + number)
            for _, x in samples.chunks(0, len(args[0]), torch.float32):  # a chunk at a time; the sum over them is in float64
                if name not in self.moments:
                    self.moments[name] = InputMoments.near(x, samples)
                self.moments[name].add_(x)
        return func(*args, **kwargs)


@torch.no_grad()
def measure_readers(
    model: nn.Module, graph: ChannelGraph, batches: Iterable[Tensor], seed: int = 0, images: int = 0
) -> dict[str, InputMoments]:
    """Return the moments of the inputs of all weights that read channels of prunable groups, by the weights' names.

    Cost: one forward pass; d^2 numbers for a weight with d inputs of an output.

    Args:
        model: the network that was traced.
        batches: normalised inputs, [B, C, H, W].
        seed: of the positions that are sampled.
        images: how many there are in all, on which it depends how many positions of each are sampled.
    """
    names = {member.tensor for group in graph.prunable for member in group.readers}
    wanted = {key: name for key, (name, _) in owned_tensors(model).items() if name in names}
    reading = _Reading(wanted, positions_for(images), seed)
    with eval_mode(model):
        for number, piece in (numbered for batch in batches for numbered in enumerate(in_pieces(batch, model))):
            reading.number, reading.seed = 0, seed + number * SEEDS  # the pieces of a batch are sampled at other positions each
            with reading:
                model(piece)
    return reading.moments


class Reader:
    """A weight while channels that it reads go, one after the other, and the weights of the others make up for them.

    Only the inputs of the channels that may go are followed; ``refitted`` works out what that means for all.

    Args:
        name: of the weight.
        moments: of its inputs.
        columns: for each unit the inputs that go with it.
    """

    def __init__(self, name: str, moments: InputMoments, columns: Sequence[Tensor]) -> None:
        self.name, self.moments, self.gone = name, moments, torch.zeros(0, dtype=torch.long)
        self.columns = list(columns)
        places = torch.cat(self.columns).to(moments.matrix.device)
        self.local = list(torch.arange(len(places)).split([len(column) for column in columns]))
        self.left = torch.ones(len(places), dtype=torch.bool)  # of the inputs that are followed
        self.matrix = moments.matrix[:, places]
        spread = moments.spread
        self.spread = spread[:, places] if spread.ndim == 2 else spread[:, places.unsqueeze(1), places]

    def losses(self, units: Sequence[int]) -> Tensor:
        """Return what each unit alone costs, as a share of the outputs' variance: float64 [units]."""
        found = torch.zeros(len(units), dtype=torch.float64)
        for length in {len(self.local[unit]) for unit in units} - {0}:
            places = [place for place, unit in enumerate(units) if len(self.local[unit]) == length]
            chosen = torch.stack([self.local[units[place]] for place in places])
            rows = self.matrix[:, chosen]  # [groups, units, columns, outputs]
            if self.spread.ndim == 2:
                costs = self.spread[:, chosen].unsqueeze(3) * rows.square()
            elif length == 1:
                costs = rows.square() / self.spread[:, chosen, chosen].unsqueeze(3)
            else:
                costs = rows * torch.linalg.solve(self.spread[:, chosen.unsqueeze(2), chosen.unsqueeze(1)], rows)
            found[places] = costs.sum((0, 2, 3)).cpu()
        return found / self.moments.variance

    def remove_(self, units: Sequence[int]) -> float:
        """Take units away together, refit the weights of those that are left, and return what that costs, as ``losses``."""
        self.gone = torch.cat([self.gone, *(self.columns[unit] for unit in units)])
        gone = torch.cat([self.local[unit] for unit in units])
        rows = self.matrix[:, gone]
        if self.spread.ndim == 2:
            cost = (self.spread[:, gone].unsqueeze(2) * rows.square()).sum()
        else:
            columns = self.spread[:, :, gone]
            solved = torch.linalg.solve(columns[:, gone], torch.cat([rows, self.spread[:, gone]], 2))
            outputs = rows.shape[2]
            cost = (rows * solved[..., :outputs]).sum()
            self.matrix -= columns @ solved[..., :outputs]
            self.spread -= columns @ solved[..., outputs:]
            self.spread[:, gone] = self.spread[:, :, gone] = 0  # but for rounding they are
        self.matrix[:, gone] = 0
        self.left[gone] = False
        if int(self.left.sum()) < WORN * len(self.left):
            self._leave_out_what_went()
        return float(cost) / self.moments.variance

    def _leave_out_what_went(self) -> None:
        """Make the matrices smaller: an update costs as much as the square of their size."""
        kept = self.left.nonzero().reshape(-1)
        self.local = [(self.left.cumsum(0) - 1)[places[self.left[places]]] for places in self.local]
        self.matrix = self.matrix[:, kept]
        self.spread = self.spread[:, kept] if self.spread.ndim == 2 else self.spread[:, kept.unsqueeze(1), kept]
        self.left = self.left[kept]

    def refitted(self) -> tuple[Tensor, Tensor]:
        """Return the weight, zero where units went, and what its outputs' mean has lost, [outputs]."""
        moments, gone = self.moments, self.gone.to(self.matrix.device)
        matrix = moments.matrix.clone()
        if moments.spread.ndim == 3:
            columns = moments.spread[:, :, gone]
            matrix -= columns @ torch.linalg.solve(columns[:, gone], matrix[:, gone])
        matrix[:, gone] = 0
        return moments.restore(matrix), (moments.mean() @ (moments.matrix - matrix)).flatten()


def readers_of(group: ChannelGroup, shapes: Mapping[str, Sequence[int]], moments: Mapping[str, InputMoments]) -> list[Reader]:
    """Return the weights that read a group's channels and that were measured; of grouped transposed convolutions none is.

    Args:
        shapes: of all tensors.
        moments: of the weights' inputs, by name.
    """
    readers = []
    for member in group.readers:
        if member.tensor not in moments:
            continue
        groups, inputs, _ = moments[member.tensor].matrix.shape
        if groups > 1 and member.dim == 0:  # each input channel belongs to one of the systems only
            continue
        taps = inputs // shapes[member.tensor][member.dim]  # positions of the kernel
        columns: list[list[int]] = [[] for _ in range(group.size)]
        for position, unit in zip(member.positions.tolist(), member.units.tolist(), strict=True):
            columns[unit] += range(position * taps, (position + 1) * taps)
        readers.append(Reader(member.tensor, moments[member.tensor], [torch.tensor(found, dtype=torch.long) for found in columns]))
    return readers
