"""Regularizers: terms added to the loss. One method per file; a new one is a line in ``REGULARIZERS``."""

from __future__ import annotations

from compression.schedule.regularizers.group_lasso import GroupLassoRegularizer
from compression.schedule.regularizers.group_variance import GroupVarianceRegularizer
from compression.schedule.regularizers.l1 import L1Regularizer
from compression.schedule.regularizers.regularizer import Regularizer

REGULARIZERS: dict[str, type[Regularizer]] = {
    "L1Regularizer": L1Regularizer,
    "GroupLassoRegularizer": GroupLassoRegularizer,
    "GroupVarianceRegularizer": GroupVarianceRegularizer,
}

__all__ = ["REGULARIZERS", "Regularizer"]
