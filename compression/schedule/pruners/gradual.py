"""A sparsity that grows quickly at first, then slowly (arXiv:1710.01878, equation 1).

s(e) = s_f + (s_i - s_f) (1 - (e - first) / (last - first))^3

Differs: ``last`` is the last epoch in which the pruner decides, so that s_f is reached even if the frequency does not divide
the window.
"""

from __future__ import annotations

from fractions import Fraction

from compression.schedule.pruners.counts import exact
from compression.schedule.pruners.pruner import Moment
from utils.errors import UserError


def gradual(initial: float, final: float, moment: Moment) -> Fraction:
    """Return the exact sparsity of an epoch: ``initial`` up to the first decision, ``final`` from the last one on."""
    if moment.epoch >= moment.last:
        return exact(final)
    left = 1 - Fraction(max(moment.epoch - moment.first, 0), moment.last - moment.first)
    return exact(final) + (exact(initial) - exact(final)) * left**3


def check_growth(initial: float, final: float) -> None:
    """Raise a UserError if the final sparsity is below the initial one."""
    if final < initial:
        raise UserError(f"final_sparsity {final:g} is below initial_sparsity {initial:g}")
