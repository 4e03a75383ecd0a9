"""Element-wise pruning with a threshold that rises in two ramps (arXiv:1704.05119, algorithm 1).

theta = 2 q f / (2 (ramp - start) + 3 (end - ramp)),  phi = theta * ramp_slope_mult
eps(e) = theta (e - start + 1) / f                                  before the ramp
eps(e) = (theta (ramp - start + 1) + phi (e - ramp + 1)) / f        from the ramp on
Elements with |w| > eps are kept. Epochs replace the paper's iterations; f is the frequency.
"""

from __future__ import annotations

from dataclasses import dataclass

from compression.schedule.pruners.counts import magnitude_mask
from compression.schedule.pruners.pruner import Decision, Moment, Pruner, PruningTask
from utils.errors import UserError
from utils.options import integer, number, option, optional, parameters


@dataclass(kw_only=True)
class BaiduRNNPruner(Pruner):
    """Keeps the elements whose magnitude is above a threshold that grows with the epoch, faster from the ramp on.

    Attributes:
        q: scales the threshold; the paper uses the 90th percentile of the magnitudes in a trained network.
        ramp_epoch_offset: epochs from the start of the policy to the ramp.
        ramp_epoch: the epoch of the ramp itself; give one of the two.
        ramp_slope_mult: how much steeper the second ramp is.
        weights: the parameters to prune.
        initial_sparsity, final_sparsity: accepted because old files have them; unused.
    """

    q: float = option(number(above=0))
    ramp_epoch_offset: int | None = option(optional(integer()), None)
    ramp_epoch: int | None = option(optional(integer()), None)
    ramp_slope_mult: float = option(number(above=0))
    weights: tuple[str, ...] = option(parameters)
    initial_sparsity: float | None = option(optional(number(least=0, most=1)), None)
    final_sparsity: float | None = option(optional(number(least=0, most=1)), None)

    def __post_init__(self) -> None:
        if (self.ramp_epoch is None) == (self.ramp_epoch_offset is None):
            raise UserError("give either 'ramp_epoch_offset' or 'ramp_epoch'")

    def parameters(self) -> tuple[str, ...]:
        return self.weights

    def decide(self, task: PruningTask) -> Decision:
        threshold = self.threshold(task.moment)
        return Decision({name: magnitude_mask(task.weights[name], threshold) for name in self.weights})

    def threshold(self, moment: Moment) -> float:
        """Return eps of an epoch.

        Raises:
            UserError: the ramp lies outside the policy's window.
        """
        start, end, epoch = moment.first, moment.end, moment.epoch
        ramp = start + self.ramp_epoch_offset if self.ramp_epoch_offset is not None else self.ramp_epoch
        assert ramp is not None
        if not start <= ramp <= end:
            raise UserError(f"the ramp of BaiduRNNPruner is at epoch {ramp}; its policy runs from epoch {start} to {end}")
        theta = 2 * self.q * moment.frequency / (2 * (ramp - start) + 3 * (end - ramp))
        if epoch < ramp:
            return theta * (epoch - start + 1) / moment.frequency
        phi = theta * self.ramp_slope_mult
        return (theta * (ramp - start + 1) + phi * (epoch - ramp + 1)) / moment.frequency
