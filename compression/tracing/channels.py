"""Find a network's channel groups, and prove them on a shrunk copy before anyone relies on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from compression.tracing.cutting import NotProved, apply_cut_, plan_cut, prove_channels, prove_outputs
from compression.tracing.graph import ChannelGraph, ChannelGroup, read_graph
from compression.tracing.record import CallKey, TensorDim
from utils.errors import UserError

MAX_ROUNDS = 100  # each gives up a reading or pins a group, so they end
LAST_READING = 2  # leaves nothing to cut at its site


def trace(model: nn.Module, inputs: Tensor) -> ChannelGraph:
    """Find a network's channel groups by running channel numbers through it.

    Some units of every group are cut out of a copy, and the copy is proved on noise. Where something does not receive
    its channels there, the sites of the group get their next reading (see ``rules``). Once no reading holds, the group
    can't be cut, and says why. Where an attention needs whole heads to go, the channels are split so, as long as that holds.

    Args:
        model: on the CPU; it runs in eval mode and is left as it was.
        inputs: one example, [1, C, H, W].

    Raises:
        UserError: the arguments are something else.
        NotProved: no set of groups could be proved; a defect of ours.
    """
    if not isinstance(model, nn.Module) or not isinstance(inputs, Tensor):
        kinds = f"{type(model).__name__} and {type(inputs).__name__}"
        raise UserError(f"trace takes a module and a tensor [1, C, H, W], not {kinds}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UserError("a scripted module does not show what it computes, so nothing in it can be cut; give the module it was made of")
    model = deepcopy(model)  # what a forward pass counts or caches stays as it is
    readings: dict[CallKey, int] = {}
    pinned: dict[TensorDim, str] = {}
    heads: set[CallKey] = set()
    refused: set[CallKey] = set()
    for _ in range(MAX_ROUNDS):
        graph = read_graph(model, inputs, readings, pinned, heads)
        if asked := graph.record.asked - heads - refused:
            heads |= asked
            continue
        failed = _failing(model, inputs, graph)
        if not failed:
            return graph
        for group, reason in failed.items():
            numbers = {number for number, (name, _) in graph.units.items() if name == group.name}
            if split := {site for site in heads if numbers & set(graph.component[graph.record.splits[site][0]].tolist())}:
                heads, refused = heads - split, refused | split
                continue
            sites = [site for site, nodes in graph.record.sites.items() if numbers & set(graph.component[nodes].tolist())]
            open_sites = [site for site in sites if readings.get(site, 0) < LAST_READING]
            for site in open_sites:
                readings[site] = readings.get(site, 0) + 1
            if not open_sites:
                pinned |= {(member.tensor, member.dim): f"a shrunk copy fails: {reason}" for member in group.members}
    raise NotProved("the channel groups of this network could not be settled")


def _failing(model: nn.Module, inputs: Tensor, graph: ChannelGraph) -> dict[ChannelGroup, str]:
    """Return the groups of which some units can't be cut, with what goes wrong.

    Whose channels are at hand where the shrunk network fails is suspected first; then those of the others are cut, and so on.
    """
    keep = {group.name: _some_units(place, group) for place, group in enumerate(graph.prunable)}
    left, failing = graph.prunable, dict[ChannelGroup, str]()
    while True:
        reason, suspects = _failure(left, model, inputs, graph, keep)
        if not reason:
            return failing
        if len(suspects) == 1:
            failing[suspects[0]] = reason
        else:
            among = suspects if suspects and _failure(suspects, model, inputs, graph, keep)[0] else left
            group, why = _first_failing(among, model, inputs, graph, keep)
            failing[group] = why or reason
        left = [group for group in left if group not in failing]


def _first_failing(
    groups: Sequence[ChannelGroup], model: nn.Module, inputs: Tensor, graph: ChannelGraph, keep: Mapping[str, set[int]]
) -> tuple[ChannelGroup, str]:
    """Return, of groups that can't all be cut together, one that can't be cut together with those before it, and why."""
    fine, failing, reason = 0, len(groups), ""
    while failing - fine > 1:
        middle = (fine + failing) // 2
        if why := _failure(groups[:middle], model, inputs, graph, keep)[0]:
            failing, reason = middle, why
        else:
            fine = middle
    return groups[failing - 1], reason


def _some_units(place: int, group: ChannelGroup) -> set[int]:
    """Keep some units at random: another share of each group, so that sizes do not agree by chance."""
    free = [unit for unit in range(group.size) if unit not in group.fixed]
    share = 0.3 + 0.4 * (place * 0.618 % 1)
    gone = np.random.default_rng(len(free)).permutation(free)[: max(int(share * min(len(free), group.size - 1)), 1)]
    return set(range(group.size)) - set(gone.tolist())


def _failure(
    groups: Sequence[ChannelGroup], model: nn.Module, inputs: Tensor, graph: ChannelGraph, keep: Mapping[str, set[int]]
) -> tuple[str, list[ChannelGroup]]:
    """Return why these groups can't be cut together, empty where they can; and those among them whose channels were at hand."""
    shrunk, kept = deepcopy(model), {group.name: keep[group.name] for group in groups}
    apply_cut_(shrunk, plan_cut(graph, kept))
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)).to(inputs)
    try:
        prove_channels(shrunk, graph, kept, inputs)
        prove_outputs(shrunk, model, graph, kept, noise)
    except NotProved as error:
        components = set(graph.component[error.at_hand].tolist())
        suspected = {name for number, (name, _) in graph.units.items() if number in components}
        return str(error) or "unknown", [group for group in groups if group.name in suspected]
    return "", []
