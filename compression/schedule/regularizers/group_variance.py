"""Variance of the structures' norms (arXiv:1802.09902): a few structures carry the weight, the others vanish.

loss = sum over the parameters of lambda / (Var_g(||w_g||_2) + 1e-8), the variance unbiased

Differs: the paper adds this term to group lasso; here each stands alone, and a schedule may have both. The 1e-8 avoids a
division by zero when the norms are equal, as they may be at the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.schedule.regularizers.grouped import GROUPS, GroupRegularizer, fitting_regimes
from utils.errors import UserError
from utils.options import option

EPSILON = 1e-8
# A whole weight is a single structure, and a single norm has no variance.
SEVERAL = {name: structures for name, structures in GROUPS.items() if all(structure.name != "4D" for structure in structures)}


@dataclass(kw_only=True)
class GroupVarianceRegularizer(GroupRegularizer):
    """Drives the norms of a parameter's structures apart; takes the groups that have several structures."""

    reg_regims: Mapping[str, tuple[float, str]] = option(fitting_regimes(SEVERAL))

    def term(self, name: str, groups: Tensor) -> Tensor:
        if len(groups) < 2:
            raise UserError(f"{name} has one structure of the kind that GroupVarianceRegularizer is to drive apart; it takes two")
        return 1 / (torch.linalg.vector_norm(groups, dim=1).var() + EPSILON)
