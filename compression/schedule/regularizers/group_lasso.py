"""Group lasso: structured sparsity learning (arXiv:1608.03665, equation 2).

loss = sum over the parameters of lambda * sum over the structures g of ||w_g||_2

A combined group (Rows+Cols) contributes both sums.

Differs: a structure of zeros gets the gradient zero, one of the subgradients, so it remains zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.schedule.regularizers.grouped import GroupRegularizer


@dataclass(kw_only=True)
class GroupLassoRegularizer(GroupRegularizer):
    """Drives whole structures to zero."""

    def term(self, name: str, groups: Tensor) -> Tensor:
        total: Tensor = torch.linalg.vector_norm(groups, dim=1).sum()  # its gradient at zero is zero, unlike a root's
        return total
