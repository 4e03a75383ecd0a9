"""Build a network at the widths of a compress_rate, and load a dense network's weights into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compression.pruning.plan import PruningPlan, entries_of, make_plan, widths_of_rates
from compression.tracing.channels import trace
from compression.tracing.cutting import apply_cut_, plan_cut, prove_channels, prove_outputs
from compression.tracing.graph import ChannelGraph
from models.networks import build, definition_of, finish_
from models.networks.widths import group_counts, resize_
from models.networks.yolo import NotBuiltNarrow, build_yolo
from models.state_dicts import load_state_
from utils.errors import UserError
from utils.measures.profile import example_input
from utils.options import plain
from utils.spec import ModelSpec


@dataclass(frozen=True)
class NarrowNetwork:
    """A network at pruned widths, with fresh weights.

    Attributes:
        model: the network.
        spec: its specification, with the numbers of groups that the cut changed.
        graph: the dense network's channel groups.
        widths: group name -> units.
    """

    model: nn.Module
    spec: ModelSpec
    graph: ChannelGraph
    widths: Mapping[str, int]


def build_narrow(spec: ModelSpec, compress_rate: str) -> NarrowNetwork:
    """Build a network at the widths of a compress_rate.

    A network that a YAML file describes is built at these widths directly; any other is built whole and cut.

    Raises:
        UserError: the compress_rate is malformed or does not fit the network.
    """
    dense = build(spec)
    graph = trace(dense, example_input(dense, spec))
    entries = entries_of(graph, spec.name)
    widths = widths_of_rates(entries, compress_rate, spec.name)
    definition = definition_of(spec)
    plan = make_plan(graph, widths, {group.name: range(group.size) for group in graph.groups})
    cut = deepcopy(dense)
    apply_cut_(cut, plan_cut(graph, plan.kept))
    model = _build_directly(spec, definition, [widths[entry[0].name] for entry in entries]) if definition is not None else None
    if model is None or _shapes(model) != _shapes(cut):
        model = cut
    return NarrowNetwork(model, spec_of(spec, group_counts(dense), model), graph, widths)


def _build_directly(spec: ModelSpec, definition: dict[str, Any], widths: Sequence[int]) -> nn.Module | None:
    """Build a network of a YAML file at widths; None if its layers do not match its groups one to one."""
    planned = iter(widths)

    def take(_: int) -> int:
        width = next(planned, None)
        if width is None:
            raise NotBuiltNarrow("there are more layers than groups")
        return width

    try:
        return finish_(build_yolo(definition, spec.num_classes, spec.channels, take), spec)
    except NotBuiltNarrow:
        return None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def spec_of(spec: ModelSpec, before: Mapping[str, int], narrow: nn.Module) -> ModelSpec:
    """Return a specification with the numbers of groups that a cut changed; ``before`` are the dense network's."""
    return spec.with_(groups={**spec.groups, **{name: n for name, n in group_counts(narrow).items() if before.get(name) != n}})


def load_model(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    orders: Mapping[str, Sequence[int]],
    inputs: Tensor,
    prove: bool = True,
    groups: Mapping[str, int] | None = None,
) -> PruningPlan:
    """Load a dense network's weights into a narrow one, in place (HRank's load_model, arXiv:2002.10179).

    For every weight, ``select_index`` is the channels that it makes and keeps, those with the highest scores in ascending
    order, and ``last_select_index`` the kept ones that it reads; it becomes ``weight[select_index][:, last_select_index]``.
    Tied channels share one index, concatenations and flattened maps are followed, and biases, batch norm's weight, bias
    and statistics, depthwise kernels and linear layers are cut alike: every tensor comes from the dense network.

    Args:
        model: the network at its narrow widths.
        state_dict: of the dense network; ``module.`` in names is dropped.
        orders: group name -> units from the least to the most important.
        inputs: examples, [B, C, H, W], on which the narrow network is proved.
        prove: whether to compare the narrow network with the masked dense one, which costs some forward passes.
        groups: ``group_counts`` of the dense network, needed only for grouped convolutions whose inputs stay whole.

    Returns:
        Which channels were kept.

    Raises:
        UserError: the weights or the widths do not fit; the model is as it was.
        NotProved: the narrow network is not the masked dense one; the model is as it was.
    """
    state_dict = {plain(name): tensor for name, tensor in state_dict.items()}
    dense = deepcopy(model)
    resize_(dense, state_dict, _dense_groups(model, state_dict) if groups is None else groups)
    load_state_(dense, state_dict)
    graph = trace(dense, inputs[:1])
    plan = make_plan(graph, _widths_in(graph, model), orders)
    narrow = deepcopy(dense)
    apply_cut_(narrow, plan_cut(graph, plan.kept))
    state, target = narrow.state_dict(), model.state_dict()
    wrong = [name for name in target if state[name].shape != target[name].shape]
    if wrong:
        shapes = f"{tuple(target[wrong[0]].shape)}, the weights give {tuple(state[wrong[0]].shape)}"
        raise UserError(f"the weights can't be cut to the narrow network's widths: {wrong[0]} has {shapes}")
    if prove:
        prove_channels(narrow, graph, plan.kept, inputs[:1])
        prove_outputs(narrow, dense, graph, plan.kept, inputs)
    model.load_state_dict(state)
    return plan


def _widths_in(graph: ChannelGraph, narrow: nn.Module) -> dict[str, int]:
    """Return the units that each group keeps in a narrow network, by the shapes of what makes the channels."""
    shapes = {name: tuple(tensor.shape) for name, tensor in narrow.state_dict().items()}
    widths = {}
    for group in graph.prunable:
        for member in sorted(group.members, key=lambda m: m.role != "producer"):
            size, per_unit = graph.shapes[member.tensor][member.dim], len(member.positions) // group.size
            if size == per_unit * group.size:  # no other group runs through this dimension
                widths[group.name] = shapes[member.tensor][member.dim] // per_unit
                break
        else:
            raise UserError(f"the widths of group '{group.name}' can't be read off the narrow network's shapes")
    return widths


def _dense_groups(narrow: nn.Module, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the dense network's numbers of groups: those of a norm or a whole-group cut grow with the channels."""
    modules, counts = dict(narrow.named_modules()), group_counts(narrow)
    for name, count in counts.items():
        weight = state.get(f"{name}.weight")
        ours = getattr(modules[name], "weight", None)
        if weight is None and (rows := _rows_of_attention(modules[name], name, state)):
            counts[name] = count * rows[0] // rows[1]
        if weight is None or not isinstance(ours, Tensor) or weight.ndim != ours.ndim:
            continue
        if ours.ndim == 1 or (count > 1 and weight.shape[1] == ours.shape[1]):
            counts[name] = count * weight.shape[0] // ours.shape[0]
    return counts


def _rows_of_attention(module: nn.Module, name: str, state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the rows of the first weight inside a module that has lost some, before and now."""
    for inner, new in module.state_dict().items():
        old = state.get(f"{name}.{inner}")
        if old is not None and old.ndim == new.ndim == 2 and len(old) != len(new):
            return len(old), len(new)
    return None
