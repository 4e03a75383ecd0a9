"""A schedule from a sensitivity analysis: every layer is pruned as far as it tolerates alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compression.analysis.sensitivity import graph_for
from compression.tracing.graph import ChannelGraph, ChannelGroup
from utils.errors import UserError
from utils.files.checkpoint import write_text
from utils.output.commands import command

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 0.02  # of top-1
RAMP_EPOCHS = 10  # of a schedule that prunes structures; they are removed at its end
ROUNDING = 1e-9  # 0.90 - 0.88 is above 0.02 in floating point


def tolerated(table: pd.DataFrame, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Return for each layer the largest sparsity up to which top-1 falls by at most ``tolerance``.

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
        tolerance: the fall of top-1 that is accepted, in [0, 1).
        path: of the YAML file.

    Raises:
        UserError: no layer tolerates any pruning, or a schedule can name none of those that do.
    """
    import yaml

    known = graph_for(kind, graph)
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
        f"sparsity at which top-1 stays within {tolerance:g}, that layer alone being pruned, without training. Pruned together, they cost",
        "more: fine-tune, and compare.",
        "  " + command("train", weights="WEIGHTS", data="DATA", epochs="EPOCHS", compress=path),
    ]
    if kind != "element":
        lines.append(f"Pruning ends at epoch {RAMP_EPOCHS}, when the zeroed {kind}s are removed: EPOCHS must be larger than that.")
    if left_out:
        lines.append(f"Left out, because no schedule can name their channels: {', '.join(left_out)}.")
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
    """Return the weights that a structured pruner must name to prune a group, or none if it can't prune it.

    A pruner ranks whole filters (dimension 0) or channels (dimension 1) and takes those of the same index from all weights.
    Channels that a gather brings as well (option A's shortcut) would survive their filters.
    """
    members, dim = (group.producers, 0) if kind == "filter" else (group.readers, 1)
    for member in members:
        shape = graph.shapes[member.tensor]
        whole = len(shape) > 1 and member.dim == dim and len(member.positions) == group.size == shape[dim]
        if group.fixed or not whole or not torch.equal(member.units, members[0].units):
            return []
    return [member.tensor for member in members]
