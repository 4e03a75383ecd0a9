"""What a keep-set leaves of every tensor; masks; and the two proofs behind every cut.

The channel numbers are traced again through the shrunk network, and on real inputs its output must equal that of the
dense network with the same channels masked.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression.tracing.graph import ChannelGraph, Indices, Keep
from compression.tracing.record import Mismatch, Proof, Route, owned_tensors
from compression.tracing.tracer import run_traced, tensors_in
from models.networks.widths import install_
from utils.modes import eval_mode

TOLERANCE = 1e-4  # of the outputs' largest absolute value


class NotProved(RuntimeError):
    """The shrunk network is not the masked one; nothing was changed. This is a defect of ours, not of the user's.

    Attributes:
        at_hand: the channels at hand where a trace failed; empty where nothing tells.
    """

    def __init__(self, message: str, at_hand: Tensor | None = None) -> None:
        super().__init__(message)
        self.at_hand = torch.empty(0, dtype=torch.int64) if at_hand is None else at_hand


@dataclass(frozen=True)
class Cut:
    """What a keep-set leaves of a network.

    Attributes:
        indices: for each tensor that changes, the kept positions along each dimension.
        values: buffers whose values change: gathers must point at the channels' new places.
        groups: new numbers of groups, which no shape tells, by module; see ``models.networks.widths.group_counts``.
    """

    indices: Indices
    values: dict[str, Tensor]
    groups: dict[str, int]

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """Return what is left of a tensor, or of one of the same shape that goes with it (momentum, say)."""
        tensor = self.values[name].to(tensor.device) if name in self.values else tensor
        whole = tensor
        for dim, index in self.indices.get(name, {}).items():
            if tensor.shape[dim] > 1 or len(index) > 1 or int(index.max()) > 0:
                tensor = tensor.index_select(dim, index.to(tensor.device))
        return laid_out_like(tensor, whole)

    def names(self) -> list[str]:
        """Return the tensors that change."""
        return [*dict.fromkeys([*self.indices, *self.values])]


def laid_out_like(part: Tensor, whole: Tensor) -> Tensor:
    """Return a part of a tensor in the whole's memory format: fused optimizers want it equal for all that belongs together."""
    channels_last = whole.ndim == 4 and whole.is_contiguous(memory_format=torch.channels_last)
    return part.contiguous(memory_format=torch.channels_last) if channels_last else part


def plan_cut(graph: ChannelGraph, keep: Keep) -> Cut:
    """Work out what a keep-set leaves of each tensor.

    Raises:
        UserError: the keep-set does not fit the network.
    """
    gone, indices = graph.removed(keep), graph.indices(keep)
    groups = {}
    for contraction in graph.contractions:
        weight = contraction.weight
        if graph.record.whole_groups.get(weight) and 0 in indices.get(weight, {}):
            groups[contraction.module] = contraction.groups * len(indices[weight][0]) // graph.shapes[weight][0]
    for module, (count, nodes) in graph.record.norm_groups.items():
        if gone[nodes].any():
            groups[module] = count * int((~gone[nodes]).sum()) // len(nodes)
    for module, (_, nodes) in graph.record.head_counts.items():
        if gone[nodes].any():
            groups[module] = int((~gone[nodes]).sum())
    return Cut(indices, {route.buffer: _renumbered(route, gone) for route in graph.routes}, groups)


def _renumbered(route: Route, gone: Tensor) -> Tensor:
    """Return a gather's buffer with the positions that its inputs have after the cut."""
    stays = ~gone[route.read]
    index = route.index % len(stays)
    if route.zero is not None:
        index = torch.where(stays[index], index, route.zero)
    new = (stays.cumsum(0) - 1)[index]
    return torch.where(new == int(stays.sum()) - 1, -1, new) if (route.index < 0).any() else new


def mask_(model: nn.Module, graph: ChannelGraph, keep: Keep) -> None:
    """Set every slot of the removed channels to zero, in place: what makes them, follows them and reads them.

    The weights that read a removed channel become zero, so nothing behind depends on it, whatever an activation makes
    of a zero. Shapes stay.
    """
    gone, owned = graph.removed(keep), dict(owned_tensors(model).values())
    parameters = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for (name, dim), nodes in graph.record.slot_nodes.items():
            if name in parameters and gone[nodes].any():
                owned[name].index_fill_(dim, gone[nodes].nonzero().reshape(-1).to(owned[name].device), 0.0)
        for route in graph.routes:
            if route.zero is not None:
                index = route.index % len(route.read)
                owned[route.buffer].copy_(torch.where(gone[route.read][index], route.zero, index))


def apply_cut_(model: nn.Module, cut: Cut) -> None:
    """Replace the tensors that a cut changes; nothing is proved here."""
    owned = dict(owned_tensors(model).values())
    install_(model, {name: cut.of(name, owned[name]).clone(memory_format=torch.preserve_format) for name in cut.names()}, cut.groups)


def prove_channels(shrunk: nn.Module, graph: ChannelGraph, keep: Keep, inputs: Tensor) -> None:
    """Trace a shrunk network: every weight must receive exactly the kept channels, in order.

    Raises:
        NotProved: it does not.
    """
    record, gone = graph.record, graph.removed(keep)
    routes = {}
    for route in graph.routes:
        found = route.read[route.index]
        if route.zero is not None:
            found = torch.where(gone[found], route.read[route.zero], found)
        routes[route.buffer] = found[~gone[record.slot_nodes[route.buffer, 0]]]
    proof = Proof(
        owned_tensors(shrunk),
        record.readings,
        whole_groups=dict(record.whole_groups),
        heads=record.heads,
        expected={tensor_dim: nodes[~gone[nodes]] for tensor_dim, nodes in record.slot_nodes.items()},
        expected_fresh=list(record.fresh_nodes),
        expected_routes=routes,
        component=graph.component,
        decisions=record.decisions,
        fixed=set(graph.component[list(record.reasons)].tolist()),
    )
    try:
        run_traced(shrunk, inputs, proof)
    except (Mismatch, RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise NotProved(" ".join(str(error).split())[:200], proof.at_hand) from error
    if proof.expected_fresh:
        raise NotProved("an operation of the dense network did not happen")


@torch.no_grad()
def prove_outputs(shrunk: nn.Module, dense: nn.Module, graph: ChannelGraph, keep: Keep, inputs: Tensor) -> float:
    """Compare a shrunk network with the masked dense one in eval mode; return the relative largest difference.

    Raises:
        NotProved: it is above ``TOLERANCE``, in float64 too.
    """
    masked = deepcopy(dense).eval()
    mask_(masked, graph, keep)
    try:
        with eval_mode(shrunk):
            difference = relative_difference(shrunk(inputs), masked(inputs))
            if not difference <= TOLERANCE:  # float32 may round so far apart; float64 does not
                difference = relative_difference(deepcopy(shrunk).double()(inputs.double()), masked.double()(inputs.double()))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise NotProved(" ".join(str(error).split())[:200]) from error
    if not difference <= TOLERANCE:
        raise NotProved(f"the shrunk network's output differs from the masked one's by {difference:.2g} of its scale")
    return difference


def relative_difference(a: Any, b: Any) -> float:
    """Return max |a - b| / max |b|, the largest over the tensors of two outputs; infinity where their shapes differ."""
    ours, theirs = tensors_in(a), tensors_in(b)
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return float("inf")
    pairs = [(x.double(), y.double()) for x, y in zip(ours, theirs, strict=True) if x.numel()]
    differences = [(x - y).abs().max() / y.abs().max().clamp_min(1e-12) for x, y in pairs]
    return float(torch.stack(differences).max()) if differences else 0.0
