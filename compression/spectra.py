"""Singular values of many small matrices, and the three scores that follow from them."""

from __future__ import annotations

import torch
from torch import Tensor


def spectrum_scores(maps: Tensor) -> Tensor:
    """Return matrix rank, effective rank and nuclear norm of every map.

    The rank is that of torch.linalg.matrix_rank: the number of singular values above ``sigma_max * max(H, W) * eps``.
    The effective rank is exp(entropy) of the singular values divided by their sum (Roy & Vetterli, EUSIPCO 2007);
    that of an all-zero map is 0.

    Args:
        maps: float32 [B, C, H, W].

    Returns:
        float32 [3, B, C].
    """
    values = torch.linalg.svdvals(maps)
    threshold = values[..., :1] * max(maps.shape[-2:]) * torch.finfo(maps.dtype).eps
    rank = (values > threshold).sum(-1)
    nuclear = values.sum(-1)
    shares = values / nuclear.clamp_min(torch.finfo(maps.dtype).tiny).unsqueeze(-1)
    effective = torch.where(nuclear > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)
    return torch.stack([rank.to(maps.dtype), effective, nuclear])
