"""Thinning: physically remove the channels that a schedule has zeroed, during training.

Every cut is proved (see ``surgery``), is applied to the optimizer's state, the moving average and the masks as well, and is
recorded in the checkpoint's plan, so that a thinned network reloads by its shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.pruning.narrowing import spec_of
from compression.pruning.plan import PruningPlan
from compression.pruning.surgery import shrink_
from compression.schedule.masks import Masks
from compression.schedule.measurements import Measurements
from compression.schedule.policy import Policy
from compression.schedule.schedule import PolicyEntry
from compression.tracing.cutting import plan_cut, relative_difference
from compression.tracing.dead_units import dead_units
from compression.tracing.graph import ChannelGraph
from models.networks.widths import group_counts
from utils.errors import UserError
from utils.loop.hooks import LoopState
from utils.modes import eval_mode
from utils.options import choice, integer, option

PROOF_IMAGES = 8


FILTERS, CHANNELS = "remove_filters", "remove_channels"


@dataclass(frozen=True)
class Remover:
    """Removes channels that are zero.

    Attributes:
        thinning_func_str: Distiller's name of what is removed, which its class says already.
        decides: "all" weights of a group of tied channels, or its "leader", the first: the others' channels then go with it.
        min_channels: so many of a group stay at least.
    """

    decides: str = option(choice("all", "leader"), "all")
    min_channels: int = option(integer(1), 1)
    thinning_func_str: str = option(choice("", FILTERS, CHANNELS), "")

    role = ""
    removes = ""  # its thinning_func_str

    def __post_init__(self) -> None:
        if self.thinning_func_str not in ("", self.removes) and self.removes:
            raise UserError(f"{type(self).__name__} and thinning_func_str '{self.thinning_func_str}' contradict each other: leave it out")


@dataclass(frozen=True)
class FilterRemover(Remover):
    """Removes the channels whose filters are all zero; of a residual sum, the filters of every summand."""

    role, removes = "producer", FILTERS


@dataclass(frozen=True)
class ChannelRemover(Remover):
    """Removes the channels that no weight reads any more, together with the filters that produce them."""

    role, removes = "reader", CHANNELS


@dataclass(frozen=True, kw_only=True)
class StructureRemover(Remover):
    """Either of them, by Distiller's older name: ``thinning_func_str`` says which, "remove_filters" or "remove_channels"."""

    thinning_func_str: str = option(choice(FILTERS, CHANNELS))

    @property
    def role(self) -> str:  # type: ignore[override]
        """The role of the remover that it stands for."""
        return ChannelRemover.role if self.thinning_func_str == CHANNELS else FilterRemover.role


EXTENSIONS: dict[str, type] = {"FilterRemover": FilterRemover, "ChannelRemover": ChannelRemover, "StructureRemover": StructureRemover}


@dataclass(frozen=True)
class Thinned:
    """What a cut did.

    Attributes:
        groups: (channels left, channels before) by group.
        change: largest difference between the outputs before and after, relative to their scale.
        proof: the same between the masked network and the shrunk one, proved to be below 1e-4.
        nearest: where nothing went, how near the weakest channel is to it.
    """

    groups: dict[str, tuple[int, int]]
    change: float
    proof: float
    nearest: str = ""

    def __str__(self) -> str:
        if not self.groups:
            return f"nothing to remove: no channel is zero throughout{self.nearest}"
        few = ", ".join(f"{name} {left} of {size}" for name, (left, size) in list(self.groups.items())[:4])
        more = f" and {len(self.groups) - 4} more groups" if len(self.groups) > 4 else ""
        return f"removed channels, left are {few}{more}; outputs changed by {self.change:.1g}, shrunk == masked to {self.proof:.1g}"


def thin_(run: LoopState, masks: Masks, measurements: Measurements, remover: Remover) -> Thinned:
    """Remove dead channels, in place, from the network and from everything that depends on its shapes.

    Args:
        run: its model, optimizer, average, plan and specification are cut.
        masks: cut too.
        measurements: the channel groups, and images for the proof.
        remover: which channels go.

    Raises:
        UserError: the optimizer's state can't be cut.
        NotProved: the shrunk network is not the masked one; nothing was changed.
    """
    graph, model = measurements.graph, run.model
    alive = {name: tensor.detach() != 0 for name, tensor in model.state_dict().items()}
    dead = dead_units(graph, alive, remover.role, remover.decides == "leader", remover.min_channels)
    keep = {name: sorted(set(range(graph.group(name).size)) - units) for name, units in dead.items()}
    if not keep:
        return Thinned({}, 0.0, 0.0, _nearest(graph, dict(model.state_dict()), remover.role))
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


def _nearest(graph: ChannelGraph, tensors: Mapping[str, Tensor], role: str) -> str:
    """Say which channel's weights have the least norm, as a share of the mean of its group's."""
    found: list[tuple[float, str]] = []
    for group in graph.prunable:
        squares = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            if member.role == role and tensors[member.tensor].is_floating_point():
                per_slot = tensors[member.tensor].detach().double().cpu().movedim(member.dim, 0).unsqueeze(-1).flatten(1).square().sum(1)
                squares.index_add_(0, member.units, per_slot[member.positions])
        norms = squares.sqrt()
        if norms.mean() > 0:
            found.append((float(norms.min() / norms.mean()), group.name))
    share, name = min(found, default=(1.0, ""))
    return f"; the weakest, in {name}, has {share:.2g} of its group's mean norm" if name else ""


class ThinningPolicy(Policy):
    """Removes channels before the first batch of each of its epochs."""

    def __init__(self, entry: PolicyEntry, masks: Masks, measurements: Measurements, report: Callable[[str], None]) -> None:
        super().__init__(entry)
        self.remover: Remover = entry.instance
        self.masks, self.measurements, self.report = masks, measurements, report

    def target_epoch(self, epochs: int) -> int:
        return self.window.last_within(epochs)

    def on_minibatch_begin(self, run: LoopState) -> None:
        if run.step == 0:
            thinned = thin_(run, self.masks, self.measurements, self.remover)
            self.report(f"{self.name}: {thinned}")
