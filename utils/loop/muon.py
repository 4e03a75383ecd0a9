"""Muon: steps that are orthogonal matrices for convolutions and linear layers, AdamW's for all other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALL = 1 << 16  # elements
BLOCK = 128  # rows that are made orthogonal to each other: the work of a whole matrix grows with the cube of its rows
RMS = 0.2  # of a step of AdamW, about: so both kinds of parameters take one rate


class Muon(Optimizer):
    """Momentum whose steps are made orthogonal (kellerjordan.github.io/posts/muon), as large as AdamW's (arXiv:2502.16982).

    A weight of two or more dimensions is a matrix, [outputs, the rest]. Its step is Nesterov's momentum with all singular
    values brought to about 1, in blocks of ``BLOCK`` rows (or columns, where there are fewer), times ``0.2 * sqrt(max(rows,
    columns))``. All other parameters are trained by AdamW. Weight decay is decoupled.

    Args:
        params: parameters or groups.
        lr: the rate of all parameters.
        momentum: of the matrices.
        betas: of all others.
        weight_decay: of a step, times the rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            matrices = [parameter for parameter in trained if parameter.ndim > 1]
            others = [parameter for parameter in trained if parameter.ndim < 2]
            for members, change_of in ((matrices, self._orthogonal), (others, self._adaptive)):
                if members:
                    changes = change_of(members, [parameter.grad for parameter in members], group)
                    torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_add_(members, changes, alpha=-group["lr"])
        return loss

    def _orthogonal(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        return _all_orthogonal(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))

    def _adaptive(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] |= {"step": torch.zeros(()), **zeros}
        states, (first, second) = [self.state[parameter] for parameter in parameters], group["betas"]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        changes = []
        for state, mean, square in zip(states, means, squares, strict=True):
            state["step"] += 1
            taken = float(state["step"])
            changes.append(mean / (1 - first**taken) / ((square / (1 - second**taken)).sqrt() + group["eps"]))
        return changes


def _all_orthogonal(steps: Sequence[Tensor]) -> list[Tensor]:
    """Return the steps with their blocks orthogonal, each block for itself, and as large as they are to be."""
    pieces: dict[tuple[int, int], Tensor] = {}  # (step, piece) -> blocks of one shape, [blocks, rows <= columns]
    for number, step in enumerate(steps):
        matrix = _as_matrix(step)
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        whole = len(wide) // BLOCK * BLOCK
        if whole:
            pieces[number, 0] = wide[:whole].unflatten(0, (-1, BLOCK))
        if whole < len(wide):
            pieces[number, 1] = wide[whole:].unsqueeze(0)
    found: dict[tuple[int, int], Tensor] = {}
    for _, alike in groupby(sorted(pieces, key=lambda place: pieces[place].shape[1:]), key=lambda place: pieces[place].shape[1:]):
        for places in _together(list(alike), pieces):
            blocks = [pieces[place] for place in places]
            done = orthogonalised(torch.cat(blocks) if len(blocks) > 1 else blocks[0])
            found |= dict(zip(places, done.split([len(block) for block in blocks]), strict=True))
    return [
        _like_step([found[number, part].flatten(0, 1) for part in (0, 1) if (number, part) in found], step)
        for number, step in enumerate(steps)
    ]


def _together(places: list[tuple[int, int]], pieces: Mapping[tuple[int, int], Tensor]) -> list[list[tuple[int, int]]]:
    """Group pieces of one shape of blocks: small ones are worth a copy to be done as one."""
    small = [place for place in places if pieces[place].numel() <= SMALL]
    return [*([small] if small else []), *([place] for place in places if pieces[place].numel() > SMALL)]


def _as_matrix(step: Tensor) -> Tensor:
    """Return a step as [outputs, the rest], in the order of its memory: what a matrix is made of has no order among its columns."""
    return (step.movedim(1, -1) if _is_channels_last(step) else step).flatten(1)


def _like_step(blocks: Sequence[Tensor], step: Tensor) -> Tensor:
    """Put blocks together and undo ``_as_matrix``; a step is as large as AdamW's."""
    rows, columns = _as_matrix(step).shape
    wide = (torch.cat(list(blocks)) if len(blocks) > 1 else blocks[0]).mul_(RMS * max(rows, columns) ** 0.5)
    matrix = wide if rows <= columns else wide.T
    if not _is_channels_last(step):
        return matrix.reshape(step.shape)
    return matrix.reshape(len(step), *step.shape[2:], step.shape[1]).movedim(-1, 1)


def _is_channels_last(step: Tensor) -> bool:
    return step.ndim == 4 and step.is_contiguous(memory_format=torch.channels_last)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Bring all singular values of matrices [.., rows, columns] to between 0.7 and 1.2, by five quintic Newton-Schulz iterations.

    They run on the smaller of the two Gram matrices, which commutes with every polynomial of itself: for a matrix of four
    and a half times as many columns as rows that is half of the work.
    """
    a, b, c = QUINTIC
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    gram = wide @ wide.mT
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].sqrt() + 1e-7
    gram = gram / norm.square()
    product: Tensor | None = None
    for iteration in range(ITERATIONS):
        polynomial = (gram @ gram).mul_(c).add_(gram, alpha=b)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if iteration < ITERATIONS - 1:
            gram = polynomial @ (polynomial @ gram)
    assert product is not None
    found = (product / norm) @ wide
    return found if matrices.shape[-2] <= matrices.shape[-1] else found.mT
