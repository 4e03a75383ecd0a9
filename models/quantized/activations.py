"""Quantized activations, which take the place of ReLUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.quantized.numbers import levels, pact
from models.quantized.settings import ClippedSettings, PactSettings

LEAST_CLIP = 1e-3  # PACT's alpha is at least this; at zero every output and every gradient would be zero


class ClippedReLU(nn.Module):
    """Clips to [0, 1] and rounds to 2^bits levels: Q_k(clip(x, 0, 1)) (arXiv:1606.06160, equation 11)."""

    def __init__(self, settings: ClippedSettings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        return levels(x.float().clamp(0.0, 1.0), 2**self.settings.bits - 1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.settings.bits}"


class PactReLU(nn.Module):
    """Clips to [0, alpha] with a learned alpha and rounds to 2^bits levels (arXiv:1805.06085)."""

    def __init__(self, settings: PactSettings) -> None:
        super().__init__()
        self.settings = settings
        self.alpha = nn.Parameter(torch.tensor([settings.initial]))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha.float()
        alpha = torch.where(alpha < LEAST_CLIP, LEAST_CLIP, alpha)  # clamp has no gradient at its bound
        return pact(x.float(), alpha, self.settings.bits).to(x.dtype)

    @torch.no_grad()
    def refresh_(self) -> None:
        """Raise an alpha that a step has carried below the least clip, where no gradient would reach it."""
        self.alpha.clamp_(min=LEAST_CLIP)

    def extra_repr(self) -> str:
        return f"bits={self.settings.bits}, alpha={self.alpha.item():g}"
