"""Refit: the weights that remain make up for the channels that were cut.

Layer by layer in forward order, the weights are the ridge solution from what the narrow network now feeds the layer (with all
earlier layers refitted) to what the dense network puts out there, before the norm (arXiv:1707.06168, equation 4). Where the
output is added to a shortcut, the target is the dense sum minus the narrow shortcut, so that a residual stream's error does not
grow from block to block. Labels are not used. A batch norm behind a layer without a bias takes the shift into its mean.

A quarter of the images is held out of the fit: it chooses the ridge, and a layer whose error it does not lower keeps its weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression.layers.calls import LAYERS, ForwardCalls, LayerCall, find_layer_calls
from compression.layers.moments import Moments
from compression.layers.pieces import in_pieces
from compression.layers.samples import LayerSamples, layer_samples, positions_for, sampled
from compression.tracing.graph import ChannelGraph, Keep
from utils.modes import eval_mode

HELD_OUT = 4  # one image of so many is held out
RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
FIRST_RIDGE = 1e-2  # the search begins here and goes where the held-out error falls
NEGLIGIBLE = 1e-9  # of the variance: an error that only comes from rounding
SMALLEST_SCALE = 1e-2  # of a norm's largest scale: a channel below it does not show what is added to it
LARGEST_SYSTEM = 10_000  # inputs of an output: a layer of more keeps its weights (a Gram matrix of 25,088 takes 5 GB)
LARGEST_TENSOR = 1 << 30  # bytes: all images pass through the narrow network at once


@dataclass(frozen=True)
class RefittedLayer:
    """What refitting a layer has done to its held-out error, as shares of the target's variance; ridge is None if it kept its weights."""

    weight: str
    before: float
    after: float
    ridge: float | None


@dataclass
class Refit:
    """A refit: how many images it used, its layers, and the seconds it took."""

    images: int
    layers: list[RefittedLayer]
    seconds: float


@torch.no_grad()
def refit_(narrow: nn.Module, dense: nn.Module, graph: ChannelGraph, keep: Keep, batches: Iterable[Tensor], seed: int = 0) -> Refit:
    """Refit the weights of a narrow network, in place, to the outputs of the dense one that it was cut from.

    It costs one forward pass of each network, and a system of linear equations for each layer.

    Args:
        narrow: the network after ``shrink_``, on the same device as ``dense``.
        dense: the network before.
        graph: the dense network's channel groups.
        keep: the units that were kept.
        batches: normalised inputs, several or one, [B, C, H, W], ``HELD_OUT`` images at least. All pass through the narrow network at
            once; if its largest tensor would exceed ``LARGEST_TENSOR``, the last ones are left out.
        seed: of the positions that are sampled.
    """
    begin, batches = time.perf_counter(), [batches] if isinstance(batches, Tensor) else list(batches)
    inputs = torch.cat(batches)
    with eval_mode(dense), eval_mode(narrow):
        calls = find_layer_calls(dense, inputs[:HELD_OUT])
        inputs = inputs[: max(LARGEST_TENSOR // _largest_tensor(dense, inputs[:1]), HELD_OUT)]
        plan = _Plan(calls, _kept_outputs(graph, keep), len(inputs), seed)
        targets = _Targets(plan)
        for piece in in_pieces(inputs, dense):
            with targets:
                dense(piece)
            targets.next_batch(len(piece))
        with _Refitter(plan, targets, narrow) as refitter:
            narrow(inputs)
    return Refit(len(inputs), refitter.layers, time.perf_counter() - begin)


def _kept_outputs(graph: ChannelGraph, keep: Keep) -> dict[str, Tensor]:
    """Return, for each weight, which of the layer's outputs stay: bool [channels]."""
    removed = graph.removed(keep)
    return {contraction.weight: ~removed[contraction.out] for contraction in graph.contractions}


def _largest_tensor(model: nn.Module, example: Tensor) -> int:
    """Return the bytes of the largest tensor that a forward pass makes."""

    class Sizes(ForwardCalls):
        largest = 1

        def on_call(self, number: int, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                self.largest = max(self.largest, result.numel() * result.element_size())
            return result

    with Sizes() as sizes:
        model(example)
    return sizes.largest


@dataclass(frozen=True)
class _Plan:
    """What is refitted: the calls by their numbers, the outputs that stay of a weight, the number of images."""

    calls: dict[int, LayerCall]
    kept: dict[str, Tensor]
    images: int
    seed: int

    @property
    def addends(self) -> set[int]:
        return {call.addend for call in self.calls.values() if call.addend is not None}

    def sampled(self, call: LayerCall, func: Any, outputs: Tensor, first: int = 0) -> Tensor:
        return sampled(outputs, func, positions_for(self.images), self.seed + call.number, first, self.images)


class _Targets(ForwardCalls):
    """Records the dense network's outputs of the layers, and what is added to them, at the sampled positions."""

    def __init__(self, plan: _Plan) -> None:
        super().__init__()
        self.plan, self.first = plan, 0
        self.outputs: dict[int, list[Tensor]] = {}
        self.added: dict[int, list[Tensor]] = {}
        self.addends: dict[int, Tensor] = {}

    def next_batch(self, images: int) -> None:
        """Begin the next forward pass."""
        self.first += images
        self.number = 0
        self.addends.clear()

    def on_call(self, number: int, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and number in self.plan.addends:
            self.addends[number] = result.clone()  # what follows may write into it
        if func in LAYERS and (call := self.plan.calls.get(number)):
            self.outputs.setdefault(number, []).append(self._kept(call, func, result))
            if call.addend is not None:
                self.added.setdefault(number, []).append(self._kept(call, func, self.addends[call.addend]))
        return result

    def _kept(self, call: LayerCall, func: Any, outputs: Tensor) -> Tensor:
        values = self.plan.sampled(call, func, outputs, self.first)
        kept = self.plan.kept.get(call.weight)
        return values if kept is None else values[..., kept.to(values.device)]


class _Refitter(ForwardCalls):
    """Refits every layer of the narrow network at the moment at which it is called."""

    def __init__(self, plan: _Plan, targets: _Targets, narrow: nn.Module) -> None:
        super().__init__()
        self.plan, self.targets, self.narrow = plan, targets, narrow
        self.addends: dict[int, Tensor] = {}
        self.layers: list[RefittedLayer] = []

    def on_call(self, number: int, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func in LAYERS and (call := self.plan.calls.get(number)) and len(args[0]) == self.plan.images:
            self._refit(call, func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and number in self.plan.addends:
            self.addends[number] = result.clone()
        return result

    def _refit(self, call: LayerCall, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if args[1][0].numel() > LARGEST_SYSTEM:
            return
        samples = layer_samples(func, args, kwargs, positions_for(self.plan.images), self.plan.seed + call.number)
        module = self.narrow.get_submodule(call.norm) if call.norm else None
        norm = module if isinstance(module, nn.modules.batchnorm._BatchNorm) else None
        scale = _scale_of(norm, samples)
        targets = torch.cat(self.targets.outputs.pop(call.number)).double()
        if call.addend is not None:
            gap = torch.cat(self.targets.added.pop(call.number)) - self.plan.sampled(call, func, self.addends[call.addend])
            shown = scale.reshape(-1).abs() > SMALLEST_SCALE * scale.abs().max()
            targets = targets + torch.where(shown, gap.double() / torch.where(shown, scale.reshape(-1), 1.0), 0.0)
        fitted = self.plan.images - self.plan.images // HELD_OUT
        problem = _Problem(
            Moments.of(samples, targets, 0, fitted), Moments.of(samples, targets, fitted, self.plan.images), samples.matrix, scale
        )
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        mean = norm.running_mean if norm and bias is None else None
        old = torch.zeros_like(scale) if bias is None else bias.double().reshape(scale.shape)
        solution = problem.solve(old, shifts=bias is not None or mean is not None)
        self.layers.append(RefittedLayer(call.weight, problem.share(problem.error(samples.matrix, old)), solution.share, solution.ridge))
        if solution.ridge is None:
            return
        args[1].copy_(samples.restore(solution.matrix))
        if bias is not None:
            bias.copy_(solution.bias.reshape(-1))
        elif mean is not None:
            mean.sub_(solution.bias.reshape(-1))


def _scale_of(norm: nn.modules.batchnorm._BatchNorm | None, samples: LayerSamples) -> Tensor:
    """Return what the norm behind a layer multiplies each output by, [groups, 1, outputs of a group]; 1 without a norm."""
    groups, _, outputs = samples.matrix.shape
    if norm is None or norm.running_var is None:
        return samples.matrix.new_ones(groups, 1, outputs)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    return (scale * norm.weight.double() if norm.affine else scale).reshape(groups, 1, outputs)


@dataclass(frozen=True)
class _Solution:
    matrix: Tensor
    bias: Tensor
    ridge: float | None
    share: float


@dataclass(frozen=True)
class _Problem:
    """The least squares of one layer: moments to fit and to choose by, the weights as they are, the norm's scale."""

    fit: Moments
    held_out: Moments
    matrix: Tensor
    scale: Tensor

    def error(self, matrix: Tensor, bias: Tensor) -> float:
        """Return the held-out squared error behind the norm."""
        return float((self.held_out.errors(matrix, bias) * self.scale**2).sum())

    def share(self, error: float) -> float:
        """Return an error as a share of the target's variance."""
        return error / max(float((self.held_out.variance() * self.scale**2).sum()), 1e-30)

    def solve(self, bias: Tensor, shifts: bool) -> _Solution:
        """Return the ridge solution for all images with the ridge of least held-out error, or the weights as they are if none lowers it."""
        share = self.share(self.error(self.matrix, bias))
        ridge = None
        place = RIDGES.index(FIRST_RIDGE)
        for steps in (range(place, -1, -1), range(place + 1, len(RIDGES))):  # towards less, then towards more
            for step in steps if share > NEGLIGIBLE else ():
                found = self._fit(self.fit, RIDGES[step], bias, shifts)
                if found is None or not (error := self.share(self.error(*found))) < share:
                    break
                ridge, share = RIDGES[step], error
        found = None if ridge is None else self._fit(self.fit + self.held_out, ridge, bias, shifts)
        return _Solution(self.matrix, bias, None, share) if found is None else _Solution(*found, ridge, share)

    def _fit(self, moments: Moments, ridge: float, bias: Tensor, shifts: bool) -> tuple[Tensor, Tensor] | None:
        """Return matrix and bias; None if the system is singular."""
        matrix = (moments.centred() if shifts else moments).ridge(self.matrix, ridge)
        return None if matrix is None else (matrix, moments.bias(matrix) if shifts else bias)
