"""Channel independence (CHIP, arXiv:2110.13981).

score(c) = mean over images of ||A||_* - ||A with row c set to zero||_*, A [C, H*W] the layer's maps, one a row: what
the set of maps loses in nuclear norm when a channel goes.

The singular values without row a are not worked out anew for each channel. With A's own singular values sigma_j and
z_j the components of a along A's right singular vectors, det(t + A'A - aa') / det(t + A'A) = 1 - sum_j z_j^2 / (t + sigma_j^2),
and since sqrt(x) = 1/(2 pi) * integral of log(1 + x/t) / sqrt(t) dt over t > 0, with t = s^2,

    score = -1/pi * integral over s > 0 of log(1 - sum_j z_j^2 / (s^2 + sigma_j^2)) ds.

The integrand is analytic in log s, where the trapezoidal rule converges geometrically: a step of 0.35 is exact to about 1e-9.

Differs: the paper scores every layer's own output and a batch of 128 images at once; here the maps that readers see, on
at most ``IMAGES`` images, the first of the calibration's random order. Cost: one eigendecomposition of the smaller
Gram matrix, min(C, H*W) square, for each image and layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compression.scoring.scores import NetworkScores, ScoringTask, score_maps

IMAGES = 64
STEP, REACH = 0.35, 20.0  # of log s, around the largest singular value


def chip(task: ScoringTask) -> NetworkScores:
    """Score by the loss in nuclear norm."""
    return score_maps(task, lambda maps: torch.stack([losses(one.flatten(1)) for one in maps])[None], IMAGES)


def losses(rows: Tensor) -> Tensor:
    """Return ||A||_* - ||A without row c||_* for every row c of A [C, N], float64 [C]."""
    rows = rows.double()
    channels, length = rows.shape
    if channels <= length:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        weights = vectors.square() * values.clamp_min(0)
    else:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        weights = (rows @ vectors).square()
    largest = values.amax()
    if not largest > 0:
        return rows.new_zeros(channels)
    values, weights = values.clamp_min(0) / largest, weights / largest
    s = torch.arange(-REACH, REACH + STEP / 2, STEP, dtype=rows.dtype, device=rows.device).exp()
    shares = (weights @ (s.square() + values[:, None]).reciprocal()).clamp(0, 1)
    logarithms = torch.log1p(-shares.clamp_max(1 - 1e-16))
    return -(logarithms * s).sum(1) * STEP / math.pi * largest.sqrt()
