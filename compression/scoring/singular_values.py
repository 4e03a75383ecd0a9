"""Singular values of many small matrices, and the three scores that follow from them.

The rank is that of torch.linalg.matrix_rank: the number of singular values above ``sigma_max * max(H, W) * eps`` as
LAPACK's float32 routine rounds them. For most maps it follows from the eigenvalues of the Gram matrix in float64,
which cost less: they give each singular value to about 1e-7 of the largest, and float32 rounding moves it by a few eps
more, so one that lies outside a factor of ``DOUBT`` around the threshold lies on the same side of it for both. Maps with
a singular value inside get LAPACK's float32 values. Maps of 2 x 2 have a closed form.
"""

from __future__ import annotations

from concurrent.futures import Executor

import torch
from torch import Tensor

from utils.errors import UserError

DOUBT = 4.0
ALIGNED = 4  # in a stack of maps of other sizes, LAPACK rounds by where in memory a map stands; one alone as always
SHARED = 64  # maps from which on a second thread is worth its start


def spectrum_scores(maps: Tensor, pool: Executor | None = None, threads: int = 1) -> Tensor:
    """Return matrix rank, effective rank and nuclear norm of every map.

    The effective rank is exp(entropy) of the singular values divided by their sum (Roy & Vetterli, EUSIPCO 2007). All
    three are 0 for a map of zeros.

    Args:
        maps: [B, C, H, W] on any device; the computation is on the CPU, in float32, whatever the device.
        pool: threads to work on parts of the maps; LAPACK uses one for a stack of small matrices.
        threads: how many there are.

    Returns:
        float32 [3, B, C].

    Raises:
        UserError: a map has NaN or infinity.
    """
    stack = maps.flatten(0, 1).cpu().float()
    low, high = torch.aminmax(stack.flatten(1), dim=1)
    if not (low.isfinite() & high.isfinite()).all():
        raise UserError("the network's feature maps are not finite, so they have no rank: are the weights damaged?")
    present = (low != 0) | (high != 0)
    alive = stack if present.all() else stack[present]
    parts = alive.chunk(threads) if pool is not None and len(alive) >= SHARED else (alive,)
    scored = map(_scores, parts) if pool is None or len(parts) == 1 else pool.map(_scores, parts)
    found = torch.cat(list(scored), 1) if len(alive) else torch.zeros(3, 0)
    if len(alive) < len(stack):
        found = torch.zeros(3, len(stack)).masked_scatter_(present.expand(3, -1), found)
    return found.view(3, *maps.shape[:2])


@torch.no_grad()
def _scores(stack: Tensor) -> Tensor:
    """Return the three scores [3, N] of matrices [N, H, W] none of which is zero."""
    eps = max(stack.shape[1:]) * torch.finfo(torch.float32).eps
    if min(stack.shape[1:]) == 1:
        return _three(torch.ones(len(stack)), torch.linalg.vector_norm(stack, dim=(1, 2))[:, None])
    exact = stack.double()
    if stack.shape[1:] == (2, 2):
        values = _two_by_two(*exact.flatten(1).unbind(1))
    else:
        gram = exact @ exact.mT if stack.shape[1] <= stack.shape[2] else exact.mT @ exact
        values = torch.linalg.eigvalsh(gram).clamp_min_(0).sqrt_()
    relative = values / values[:, -1:] / eps
    rank = (relative > 1).sum(1)
    doubtful = ((relative > 1 / DOUBT) & (relative < DOUBT)).any(1)
    if doubtful.any():
        maps = stack[doubtful]
        if stack[0].numel() % ALIGNED == 0:
            rounded = torch.linalg.svdvals(maps)
        else:
            rounded = torch.stack([torch.linalg.svdvals(one) for one in maps])
        rank[doubtful] = (rounded > rounded[:, :1] * eps).sum(1)
    return _three(rank, values)


def _two_by_two(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return the singular values [N, 2], ascending, of matrices [[a, b], [c, d]]."""
    squares, determinant = a * a + b * b + c * c + d * d, (a * d - b * c).abs()
    largest = ((squares + 2 * determinant).sqrt() + (squares - 2 * determinant).clamp_min(0).sqrt()) / 2
    return torch.stack([determinant / largest, largest], 1)


def _three(rank: Tensor, values: Tensor) -> Tensor:
    nuclear = values.sum(1, keepdim=True)
    effective = torch.special.entr(values / nuclear).sum(1).exp()
    return torch.stack([rank.float(), effective.float(), nuclear[:, 0].float()])
