"""Thinning: what a schedule has zeroed is removed physically, in the midst of training.

Every cut is proved (see ``surgery``), carries the optimizer's state, the moving average and the masks along, and is
written into the plan that the checkpoint holds, so that a thinned network reloads by its shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compression.pruning.narrowing import spec_of
from compression.pruning.plan import PruningPlan
from compression.pruning.surgery import shrink_
from compression.schedule.masks import Masks
from compression.schedule.measurements import Measurements
from compression.schedule.windows import Window
from compression.tracing.cutting import plan_cut, relative_difference
from compression.tracing.dead_units import dead_units
from models.networks.widths import group_counts
from utils.loop.hooks import Hook, LoopState
from utils.modes import eval_mode

PROOF_IMAGES = 8


@dataclass(frozen=True)
class FilterRemover:
    """Removes the channels of which every filter that makes them is zero.

    Where channels are added (a residual sum), a channel goes when all the filters that are added are zero.
    """

    role = "producer"


@dataclass(frozen=True)
class ChannelRemover:
    """Removes the channels that no weight reads any more, with the filters that make them."""

    role = "reader"


EXTENSIONS: dict[str, type] = {"FilterRemover": FilterRemover, "ChannelRemover": ChannelRemover}


@dataclass(frozen=True)
class Thinned:
    """What a cut did: channels left of how many by group, and what it changed.

    Attributes:
        change: largest difference of the outputs from those before, relative to their scale.
        proof: the same between the shrunk network and the masked one, which is proved to be below 1e-4.
    """

    groups: dict[str, tuple[int, int]]
    change: float
    proof: float

    def __str__(self) -> str:
        if not self.groups:
            return "nothing to remove: no channel is zero throughout"
        few = [f"{name} {left} of {size}" for name, (left, size) in list(self.groups.items())[:4]]
        more = f" and {len(self.groups) - 4} more groups" if len(self.groups) > 4 else ""
        return (
            f"removed channels, left are {', '.join(few)}{more}; outputs changed by {self.change:.1g}, shrunk == masked to {self.proof:.1g}"
        )


def thin_(run: LoopState, masks: Masks, measurements: Measurements, role: str) -> Thinned:
    """Remove dead channels, in place, from the network and from everything that goes along with it.

    Args:
        run: its model, optimizer, average, plan and specification change.
        masks: cut alike.
        measurements: its channel groups, and images for the proof.
        role: "producer" removes what no filter makes any more, "reader" what no weight reads.

    Raises:
        UserError: the optimizer's state can't be cut.
        NotProved: the shrunk network is not the masked one; nothing was changed.
    """
    graph, model = measurements.graph, run.model
    dead = dead_units(graph, {name: tensor.detach() != 0 for name, tensor in model.state_dict().items()}, role)
    keep = {name: sorted(set(range(graph.group(name).size)) - units) for name, units in dead.items()}
    if not keep:
        return Thinned({}, 0.0, 0.0)
    inputs = measurements.inputs()[:PROOF_IMAGES]
    cut, counts = plan_cut(graph, keep), group_counts(model)
    with torch.no_grad(), eval_mode(model):
        before = model(inputs)
    proof = shrink_(model, graph, keep, inputs, run.optimizer, run.ema)
    with torch.no_grad(), eval_mode(model):
        change = relative_difference(model(inputs), before)
    masks.cut_(cut)
    sizes = {name: graph.group(name).size for name in keep}
    plan = PruningPlan({name: tuple(units) for name, units in keep.items()}, sizes).to_dict()
    run.plan = {**plan, "before": run.plan} if run.plan else plan
    if run.spec:
        run.spec = spec_of(run.spec, counts, model)
    measurements.forget_graph()
    run.restructured()
    return Thinned({name: (len(units), sizes[name]) for name, units in keep.items()}, change, proof)


class ThinningPolicy(Hook):
    """Thins before the first batch of each of its epochs."""

    def __init__(
        self, name: str, role: str, window: Window, masks: Masks, measurements: Measurements, report: Callable[[str], None]
    ) -> None:
        self.name, self.role, self.window = name, role, window
        self.masks, self.measurements, self.report = masks, measurements, report

    def reached(self, epochs: int) -> int:
        """Return the last epoch in which channels are removed in a run of so many epochs; -1 where none are."""
        last = self.window.last_within(epochs)
        return -1 if last is None else last

    def on_minibatch_begin(self, run: LoopState) -> None:
        if run.step == 0:
            thinned = thin_(run, self.masks, self.measurements, self.role)
            self.report(f"{self.name}: {thinned}")
