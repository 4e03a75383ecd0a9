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
    """Return the groups of which some units can't be cut, with what goes wrong."""
    keep = {group.name: _some_units(place, group) for place, group in enumerate(graph.prunable)}
    return _failing_among(graph.prunable, model, inputs, graph, keep)


def _failing_among(
    groups: Sequence[ChannelGroup], model: nn.Module, inputs: Tensor, graph: ChannelGraph, keep: Mapping[str, set[int]]
) -> dict[ChannelGroup, str]:
    """Look for the groups that fail by halves: few of many do."""
    reason = _failure(model, inputs, graph, {group.name: keep[group.name] for group in groups})
    if not reason or len(groups) < 2:
        return dict.fromkeys(groups, reason) if reason else {}
    middle = len(groups) // 2
    halves = (_failing_among(part, model, inputs, graph, keep) for part in (groups[:middle], groups[middle:]))
    if found := {group: why for half in halves for group, why in half.items()}:
        return found
    together: dict[str, set[int]] = {}  # each half can be cut alone, but not both: add groups one by one
    for group in groups:
        together[group.name] = keep[group.name]
        if why := _failure(model, inputs, graph, together):
            return {group: why}
    return {groups[-1]: reason}


def _some_units(place: int, group: ChannelGroup) -> set[int]:
    """Keep some units at random: another share of each group, so that sizes do not agree by chance."""
    free = [unit for unit in range(group.size) if unit not in group.fixed]
    share = 0.3 + 0.4 * (place * 0.618 % 1)
    gone = np.random.default_rng(len(free)).permutation(free)[: max(int(share * min(len(free), group.size - 1)), 1)]
    return set(range(group.size)) - set(gone.tolist())


def _failure(model: nn.Module, inputs: Tensor, graph: ChannelGraph, keep: Mapping[str, set[int]]) -> str:
    """Return why the network can't be cut so; empty where it can."""
    shrunk = deepcopy(model)
    apply_cut_(shrunk, plan_cut(graph, keep))
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)).to(inputs)
    try:
        prove_channels(shrunk, graph, keep, inputs)
        prove_outputs(shrunk, model, graph, keep, noise)
    except NotProved as error:
        return str(error) or "unknown"
    return ""
