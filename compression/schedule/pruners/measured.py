"""Statistics of weights that are taken once, at the first asking, and kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from utils.errors import UserError


def spread(name: str, values: Tensor) -> Tensor:
    """Return the unbiased standard deviation of a parameter's values, a scalar.

    Raises:
        UserError: there is one value only.
    """
    if values.numel() < 2:
        raise UserError(f"{name} has one element, so it has no standard deviation; name it in no sensitivities")
    return torch.std(values)


def once(kept: dict[str, Tensor], name: str, values: Tensor, statistic: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Return a statistic of a parameter as it was at the first asking, on the device of ``values``."""
    if name not in kept:
        kept[name] = statistic(name, values)
    return kept[name].to(values.device)
