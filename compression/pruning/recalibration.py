"""Batch norm's statistics, measured again after a cut."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compression.scoring.calibration import Calibration


@torch.no_grad()
def recalibrate_(model: nn.Module, calibration: Calibration) -> None:
    """Replace batch norm's statistics by their means over batches of images, in place."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    device = next(model.parameters()).device
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    for inputs, labels in calibration.batches():
        if len(labels) > 1:  # the last batch may be one image, which has no variance
            model(inputs.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
