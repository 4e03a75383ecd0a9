"""Temporary eval mode, alone or with hooks that observe the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode; afterwards every module gets its own mode back (those of frozen norms may differ)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def observed(model: nn.Module, handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Put a network into eval mode without gradients while hooks observe it; afterwards the hooks are removed."""
    try:
        with eval_mode(model), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
