"""Sensitivity analysis: how much accuracy the network loses when one layer alone is pruned.

Each layer (or channel group) is pruned to every sparsity of a range, alone and without training, and the network is
measured. The idea is that of arXiv:1608.08710 (section 3.2) and arXiv:1506.02626 (figure 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compression.schedule.pruners.counts import without_lowest
from compression.scoring.scores import from_weights, order_units
from compression.tracing.cutting import mask_
from compression.tracing.graph import ChannelGraph, ChannelGroup, Member
from compression.tracing.record import owned_tensors
from utils.errors import UserError, unknown
from utils.files.checkpoint import write_text
from utils.measures.metrics import Evaluation
from utils.output.plots import plot_sensitivity

if TYPE_CHECKING:
    import pandas as pd

MAX_SPARSITIES = 1000

Evaluate = Callable[[nn.Module], Evaluation]
Progress = Callable[[str, int, int], None]
KINDS = ("element", "filter", "channel")


@dataclass(frozen=True)
class PrunableLayer:
    """A weight or channel group to prune alone: up to ``most`` of its ``size`` elements or units; ``prune_`` removes a given number."""

    name: str
    size: int
    most: int
    prune_: Callable[[int], None]


def parse_range(bounds: Sequence[str | float]) -> list[Decimal]:
    """Return the sparsities of (start, stop, step), stop excluded as in Python's range, in exact decimals.

    Raises:
        UserError: they are not three numbers, the step is not above 0, or a sparsity is not in [0, 1).
    """
    shown = " ".join(map(str, bounds))
    try:
        start, stop, step = (Decimal(str(bound)) for bound in bounds)
        steps = (stop - start) / step
    except (ArithmeticError, ValueError):
        raise UserError(f"sense-range is '{shown}'; it takes three numbers: start stop step, such as 0 0.95 0.05") from None
    if not steps.is_finite() or step <= 0 or steps <= 0:
        raise UserError(f"sense-range is '{shown}' (start stop step); step must be above 0 and stop above start")
    if steps > MAX_SPARSITIES:
        raise UserError(f"sense-range '{shown}' gives more than {MAX_SPARSITIES} sparsities")
    count = math.ceil(steps)
    if start < 0 or start + (count - 1) * step >= 1:
        raise UserError(f"sense-range '{shown}' gives sparsities from {start} to {start + (count - 1) * step}; they must lie in [0, 1)")
    return [start + i * step for i in range(count)]


def analyse(
    model: nn.Module,
    graph: ChannelGraph | None,
    kind: str,
    sparsities: Iterable[Decimal],
    evaluate: Evaluate,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure the network with one layer at a time pruned.

    Args:
        model: left as it was, bit for bit, even after an error.
        graph: the channel groups; not needed for "element".
        kind: "element" (each weight), "filter" or "channel" (each group, ranked by the weights that make or read its channels).
        sparsities: shares to prune.
        evaluate: measures a network on validation data.
        progress: called after each layer with its name, the number of layers done, and their total.

    Returns:
        Columns name, sparsity, top1, top5, loss; for each layer a row at sparsity 0 and one at each sparsity above.

    Raises:
        UserError: the kind is unknown, or the network has nothing of that kind to prune.

    The cost is one evaluation for each layer and each number of elements or units that the sparsities come to.
    """
    import pandas as pd

    known = graph_for(kind, graph)
    levels = sorted({Decimal(0), *sparsities})
    if not 0 <= levels[0] <= levels[-1] < 1:
        raise UserError(f"sparsities go from {levels[0]} to {levels[-1]}; they must lie in [0, 1)")
    layers = list(_units(model, known, kind) if known else _elements(model))
    if not layers:
        raise UserError(f"this network has nothing to prune for a sensitivity analysis of kind '{kind}'")
    owned = [tensor for _, tensor in owned_tensors(model).values()]
    saved = [tensor.detach().clone() for tensor in owned]
    rows: list[tuple[Any, ...]] = []
    try:
        dense = evaluate(model)
        for done, layer in enumerate(layers, 1):
            measured = {0: dense}
            for level in levels:
                count = min(math.floor(Fraction(level) * layer.size), layer.most)
                if count not in measured:
                    _restore_(owned, saved)
                    layer.prune_(count)
                    measured[count] = evaluate(model)
                found = measured[count]
                rows.append((layer.name, float(level), found.top1, found.top5, found.loss))
            if progress:
                progress(layer.name, done, len(layers))
    finally:
        _restore_(owned, saved)
    return pd.DataFrame(rows, columns=["name", "sparsity", "top1", "top5", "loss"])


def graph_for(kind: str, graph: ChannelGraph | None) -> ChannelGraph | None:
    """Return the channel groups that a kind of analysis needs; None for "element", which needs none.

    Raises:
        UserError: the kind is unknown, or the groups are missing.
    """
    if kind not in KINDS:
        raise unknown("kind of sensitivity analysis", kind, KINDS)
    if kind != "element" and graph is None:
        raise UserError(f"a sensitivity analysis of kind '{kind}' needs the network's channel groups")
    return None if kind == "element" else graph


@torch.no_grad()
def _restore_(owned: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    for tensor, copy in zip(owned, saved, strict=True):
        tensor.copy_(copy)


def _elements(model: nn.Module) -> Iterator[PrunableLayer]:
    """Yield every weight of two or more dimensions; its smallest magnitudes go first, the first of equal ones."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue

        def prune_(count: int, weight: Tensor = weight) -> None:
            weight.detach().masked_fill_(~without_lowest(weight.detach().abs(), count), 0)

        yield PrunableLayer(name, weight.numel(), weight.numel(), prune_)


def _units(model: nn.Module, graph: ChannelGraph, kind: str) -> Iterator[PrunableLayer]:
    """Yield every channel group; the units whose weights have the smallest L1 norm go first, with everything tied to them.

    This is criterion ``l1`` (arXiv:1608.08710); for kind "channel" the norm is that of the weights that read the unit.
    """
    for group in graph.prunable:
        members = weights_of(group, kind, graph)
        if not members:
            continue
        scored = replace(group, members=tuple(replace(member, role="producer") for member in members))
        order = order_units([from_weights(model, scored, lambda rows: rows.abs().sum(1))]).tolist()
        free = [unit for unit in order if unit not in group.fixed]

        def prune_(count: int, group: ChannelGroup = group, free: list[int] = free) -> None:
            mask_(model, graph, {group.name: set(range(group.size)) - set(free[:count])})

        yield PrunableLayer(group.name, group.size, min(len(free), group.size - 1), prune_)


def weights_of(group: ChannelGroup, kind: str, graph: ChannelGraph) -> list[Member]:
    """Return the weights that make (kind "filter") or read (kind "channel") a group, without the indices of gathers."""
    weights = {name for name, tensor in graph.record.owned.values() if tensor.ndim > 1 and tensor.is_floating_point()}
    return [member for member in (group.producers if kind == "filter" else group.readers) if member.tensor in weights]


def write_results(table: pd.DataFrame, folder: Path) -> None:
    """Write sensitivity.csv and a picture of it, sensitivity.png."""
    write_text(folder / "sensitivity.csv", table.to_csv(index=False))
    names, sparsities = list(table["name"].unique()), sorted(table["sparsity"].unique())
    top1 = table.pivot(index="name", columns="sparsity", values="top1").loc[names, sparsities]
    plot_sensitivity(names, sparsities, top1.to_numpy(), folder / "sensitivity.png")
