"""Sensitivity analysis: how much does the network lose when one layer alone is pruned, and a schedule made of it.

Each layer (or channel group) is pruned to every sparsity of a range, alone and without training, and the network is
measured. The idea is that of arXiv:1608.08710 (section 3.2) and arXiv:1506.02626 (figure 6).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

TOLERANCE = 0.02  # of top-1
RAMP_EPOCHS = 10  # of a schedule that prunes structures; they are removed at its end
MAX_SPARSITIES = 1000
ROUNDING = 1e-9  # 0.90 - 0.88 is above 0.02 in floating point

Evaluate = Callable[[nn.Module], Evaluation]
Progress = Callable[[str, int, int], None]
KINDS = ("element", "filter", "channel")


@dataclass(frozen=True)
class Victim:
    """A weight or channel group that is pruned alone: of ``size`` elements or units ``most`` may go; ``prune_`` takes so many out."""

    name: str
    size: int
    most: int
    prune_: Callable[[int], None]


def parse_range(bounds: Sequence[str | float]) -> list[Decimal]:
    """Return the sparsities of (start, stop, step), in exact decimals; stop is not among them, as in Python's range.

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
        model: is left as it was, bit for bit, after an error too.
        graph: the channel groups; "element" needs none.
        kind: "element" (each weight), "filter" or "channel" (each group, by what makes or by what reads its channels).
        sparsities: shares that go.
        evaluate: measures a network, on validation data.
        progress: called after each layer with its name, how many are done, and of how many.

    Returns:
        Columns name, sparsity, top1, top5, loss; for each name a row at sparsity 0 and one for each sparsity above.

    Raises:
        UserError: the kind is unknown, or the network has nothing of that kind to prune.

    Cost: one evaluation for each name and sparsity at which another number of elements or units goes.
    """
    import pandas as pd

    known = _graph_for(kind, graph)
    levels = sorted({Decimal(0), *sparsities})
    if not 0 <= levels[0] <= levels[-1] < 1:
        raise UserError(f"sparsities go from {levels[0]} to {levels[-1]}; they must lie in [0, 1)")
    victims = list(_units(model, known, kind) if known else _elements(model))
    if not victims:
        raise UserError(f"this network has nothing to prune for a sensitivity analysis of kind '{kind}'")
    owned = [tensor for _, tensor in owned_tensors(model).values()]
    saved = [tensor.detach().clone() for tensor in owned]
    rows: list[tuple[Any, ...]] = []
    try:
        dense = evaluate(model)
        for done, victim in enumerate(victims, 1):
            measured = {0: dense}
            for level in levels:
                count = min(math.floor(Fraction(level) * victim.size), victim.most)
                if count not in measured:
                    _restore_(owned, saved)
                    victim.prune_(count)
                    measured[count] = evaluate(model)
                found = measured[count]
                rows.append((victim.name, float(level), found.top1, found.top5, found.loss))
            if progress:
                progress(victim.name, done, len(victims))
    finally:
        _restore_(owned, saved)
    return pd.DataFrame(rows, columns=["name", "sparsity", "top1", "top5", "loss"])


def _graph_for(kind: str, graph: ChannelGraph | None) -> ChannelGraph | None:
    if kind not in KINDS:
        raise unknown("kind of sensitivity analysis", kind, KINDS)
    if kind != "element" and graph is None:
        raise UserError(f"a sensitivity analysis of kind '{kind}' needs the network's channel groups")
    return None if kind == "element" else graph


@torch.no_grad()
def _restore_(owned: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    for tensor, copy in zip(owned, saved, strict=True):
        tensor.copy_(copy)


def _elements(model: nn.Module) -> Iterator[Victim]:
    """Every weight of two dimensions or more: its smallest magnitudes go, of equal ones the first."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue

        def prune_(count: int, weight: Tensor = weight) -> None:
            weight.detach().masked_fill_(~without_lowest(weight.detach().abs(), count), 0)

        yield Victim(name, weight.numel(), weight.numel(), prune_)


def _units(model: nn.Module, graph: ChannelGraph, kind: str) -> Iterator[Victim]:
    """Every channel group: the units with the least in the weights that make (read) them go, with all that is tied to them.

    That is criterion ``l1`` (arXiv:1608.08710), for channels with the readers in the place of the producers; means order
    the units of a weight as sums do.
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

        yield Victim(group.name, group.size, min(len(free), group.size - 1), prune_)


def weights_of(group: ChannelGroup, kind: str, graph: ChannelGraph) -> list[Member]:
    """Return what makes (kind "filter") or reads (kind "channel") a group and is a weight; indices of gathers are members too."""
    weights = {name for name, tensor in graph.record.owned.values() if tensor.ndim > 1 and tensor.is_floating_point()}
    return [member for member in (group.producers if kind == "filter" else group.readers) if member.tensor in weights]


def tolerated(table: pd.DataFrame, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Return, for each name, the largest sparsity at which, and below which, top-1 falls by at most ``tolerance``.

    Raises:
        UserError: the tolerance is not in [0, 1).
    """
    if not 0 <= tolerance < 1:
        raise UserError(f"tolerance is {tolerance}; it is a difference of top-1 and must lie in [0, 1)")
    found: dict[str, float] = {}
    for name, rows in table.sort_values("sparsity").groupby("name", sort=False):
        least = float(rows["top1"].iloc[0]) - tolerance - ROUNDING
        held = (rows["top1"] >= least).cummin()
        found[str(name)] = float(rows["sparsity"][held].iloc[-1])
    return {name: found[name] for name in table["name"].unique()}


def write_schedule(table: pd.DataFrame, kind: str, graph: ChannelGraph | None, tolerance: float, path: Path) -> None:
    """Write a schedule that prunes every layer as far as it tolerates alone.

    Args:
        table: what ``analyse`` returned.
        kind: of the analysis.
        graph: its channel groups.
        tolerance: by how much top-1 may fall.
        path: of the YAML file.

    Raises:
        UserError: no layer tolerates any pruning, or none of those that do can be named by a schedule.
    """
    import yaml

    known = _graph_for(kind, graph)
    levels = {name: level for name, level in tolerated(table, tolerance).items() if level > 0}
    content, left_out = _element_schedule(levels), []
    if known:
        groups = [known.group(name) for name in levels]
        levels = {group.name: levels[group.name] for group in groups if Fraction(str(levels[group.name])) * group.size >= 1}
        weights = {name: _named(known.group(name), kind, known) for name in levels}
        left_out = [name for name in levels if not weights[name]]
        content = _structure_schedule(levels, weights, kind)
    if not levels:
        raise UserError(
            f"no schedule: no layer tolerates any of the measured sparsities within {tolerance:g} of top-1; raise the tolerance"
        )
    if len(left_out) == len(levels):
        raise UserError(f"no schedule: the channels of {', '.join(left_out)} are no whole {kind}s, in order, of every weight that has them")
    head = _head(table, kind, tolerance, path, left_out)
    write_text(path, head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _head(table: pd.DataFrame, kind: str, tolerance: float, path: Path, left_out: Sequence[str]) -> str:
    dense = float(table["top1"][table["sparsity"] == 0].iloc[0])
    lines = [
        f"Written from a sensitivity analysis (--sense {kind}) of a network with top-1 {dense:.4f}: for each layer the largest",
        f"sparsity at which top-1 stays within {tolerance:g}, the layer pruned alone and not trained. All together they take more:",
        "train on, and compare.",
        f"  python train.py --weights WEIGHTS --data DATA --epochs EPOCHS --compress {shlex.quote(str(path))}",
    ]
    if kind != "element":
        lines.append(f"Pruning ends and the zeroed {kind}s are removed at epoch {RAMP_EPOCHS}: EPOCHS must be above that.")
    if left_out:
        lines.append(f"Left out, since no schedule can name their channels: {', '.join(left_out)}.")
    return "".join(f"# {' '.join(line.splitlines())}\n" for line in lines)


def _element_schedule(levels: dict[str, float]) -> dict[str, Any]:
    return {
        "version": 1,
        "pruners": {"sensitivity": {"class": "SparsityLevelParameterPruner", "levels": levels}},
        "policies": [{"pruner": {"instance_name": "sensitivity"}, "epochs": [0]}],
    }


def _structure_schedule(levels: Mapping[str, float], weights: Mapping[str, list[str]], kind: str) -> dict[str, Any]:
    named = {name: level for name, level in levels.items() if weights[name]}
    pruners = {
        name: {
            "class": "L1RankedStructureParameterPruner_AGP",
            "initial_sparsity": 0.0,
            "final_sparsity": level,
            "group_type": f"{kind.capitalize()}s",
            **({"group_dependency": "Average"} if len(weights[name]) > 1 else {}),
            "weights": weights[name],
        }
        for name, level in named.items()
    }
    window = {"starting_epoch": 0, "ending_epoch": RAMP_EPOCHS, "frequency": 1}
    policies: list[dict[str, Any]] = [{"pruner": {"instance_name": name}, **window} for name in named]
    policies.append({"extension": {"instance_name": "thinning"}, "epochs": [RAMP_EPOCHS]})
    extensions = {"thinning": {"class": f"{kind.capitalize()}Remover"}}
    return {"version": 1, "pruners": pruners, "extensions": extensions, "policies": policies}


def _named(group: ChannelGroup, kind: str, graph: ChannelGraph) -> list[str]:
    """Return the weights that a structured pruner has to name to prune a group; none where it can't.

    It ranks whole filters (dimension 0) or channels (dimension 1), and takes those of the same index from all weights. What
    a gather brings too (option A's shortcut) is not gone when the filters are.
    """
    members, dim = (group.producers, 0) if kind == "filter" else (group.readers, 1)
    for member in members:
        shape = graph.shapes[member.tensor]
        whole = len(shape) > 1 and member.dim == dim and len(member.positions) == group.size == shape[dim]
        if group.fixed or not whole or not torch.equal(member.units, members[0].units):
            return []
    return [member.tensor for member in members]


def write_results(table: pd.DataFrame, folder: Path) -> None:
    """Write sensitivity.csv and a picture of it, sensitivity.png."""
    write_text(folder / "sensitivity.csv", table.to_csv(index=False))
    names, sparsities = list(table["name"].unique()), sorted(table["sparsity"].unique())
    top1 = table.pivot(index="name", columns="sparsity", values="top1").loc[names, sparsities]
    plot_sensitivity(names, sparsities, top1.to_numpy(), folder / "sensitivity.png")
