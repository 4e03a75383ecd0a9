"""Find a network's channel groups, and prove them on a shrunk copy before anyone relies on them."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from compression.tracing.cutting import NotProved, apply_cut_, plan_cut, prove_channels, prove_outputs
from compression.tracing.graph import ChannelGraph, ChannelGroup, read_graph
from compression.tracing.record import Key, Slots

MAX_ROUNDS = 100  # each takes a reading away or pins a group, so they end
LAST_LEVEL = 2  # the reading of a site that leaves nothing to cut there


def trace(model: nn.Module, inputs: Tensor) -> ChannelGraph:
    """Find a network's channel groups by running channel numbers through it.

    Some units of every group are cut out of a copy, and the copy is proved on noise. What does not receive its channels there
    is read another way (see ``rules``) or, where no reading holds, can't be cut, with the reason.

    Args:
        model: on the CPU; it runs in eval mode and is left as it was.
        inputs: one example, [1, C, H, W].

    Raises:
        NotProved: no set of groups could be proved; a defect of ours.
    """
    model = deepcopy(model)  # what a forward pass counts or caches stays as it is
    levels: dict[Key, int] = {}
    barred: dict[Slots, str] = {}
    for _ in range(MAX_ROUNDS):
        graph = read_graph(model, inputs, levels, barred)
        failed = _failing(model, inputs, graph)
        if not failed:
            return graph
        for group, reason in failed.items():
            numbers = {number for number, (name, _) in graph.units.items() if name == group.name}
            sites = [site for site, nodes in graph.record.sites.items() if numbers & set(graph.component[nodes.numpy()].tolist())]
            open_sites = [site for site in sites if levels.get(site, 0) < LAST_LEVEL]
            for site in open_sites:
                levels[site] = levels.get(site, 0) + 1
            if not open_sites:
                barred |= {(member.tensor, member.dim): f"a shrunk copy fails: {reason}" for member in group.members}
    raise NotProved("the channel groups of this network could not be settled")


def _failing(model: nn.Module, inputs: Tensor, graph: ChannelGraph) -> dict[ChannelGroup, str]:
    """Return the groups of which some units can't be cut, with what goes wrong."""
    some = {group.name: _some(place, group) for place, group in enumerate(graph.prunable)}
    if not _failure(model, inputs, graph, some):
        return {}
    alone = {group: _failure(model, inputs, graph, {group.name: some[group.name]}) for group in graph.prunable}
    failed = {group: reason for group, reason in alone.items() if reason}
    if failed:
        return failed
    chosen: dict[str, set[int]] = {}  # each goes alone, but not all together: add them one by one
    for group in graph.prunable:
        if reason := _failure(model, inputs, graph, {**chosen, group.name: some[group.name]}):
            return {group: reason}
        chosen[group.name] = some[group.name]
    return {}


def _some(place: int, group: ChannelGroup) -> set[int]:
    """Remove some units at random: another share from each group, so that sizes do not agree by chance."""
    free = [unit for unit in range(group.size) if unit not in group.fixed]
    share = 0.3 + 0.4 * (place * 0.618 % 1)
    gone = np.random.default_rng(len(free)).permutation(free)[: max(int(share * min(len(free), group.size - 1)), 1)]
    return set(range(group.size)) - set(gone.tolist())


def _failure(model: nn.Module, inputs: Tensor, graph: ChannelGraph, keep: dict[str, set[int]]) -> str:
    shrunk = deepcopy(model)
    apply_cut_(shrunk, plan_cut(graph, keep))
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)).to(inputs)
    try:
        prove_channels(shrunk, graph, keep, inputs)
        prove_outputs(shrunk, model, graph, keep, noise)
    except NotProved as error:
        return str(error) or "unknown"
    return ""
