"""Physically remove channels from a network, its optimizer's state and its moving average.

Every cut is proved before it happens (see ``tracing.cutting``), and a failure changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from torch import Tensor, nn
from torch.optim import Optimizer

from compression.tracing.cutting import Cut, apply_cut_, laid_out_like, plan_cut, prove_channels, prove_outputs
from compression.tracing.graph import ChannelGraph, Keep
from compression.tracing.record import owned_tensors
from utils.errors import UserError
from utils.loop.ema import EMA


def shrink_(
    model: nn.Module,
    graph: ChannelGraph,
    keep: Keep,
    inputs: Tensor,
    optimizer: Optimizer | None = None,
    ema: EMA | None = None,
) -> float:
    """Physically remove channels, in place, after both proofs.

    Args:
        model: the network that was traced.
        graph: its channel groups.
        keep: group name -> kept units; groups that are not named stay whole.
        inputs: real inputs, [B, C, H, W], normalised.
        optimizer: any of torch.optim; its parameters are replaced, and its state is cut like them.
        ema: a moving average of the model, cut like it.

    Returns:
        The largest difference of the outputs, as a share of their largest absolute value.

    Raises:
        UserError: the keep-set does not fit, or the optimizer's state or the moving average can't be cut.
        NotProved: the shrunk network is not the masked one; nothing was changed.
    """
    cut = plan_cut(graph, keep)
    states = _cut_states(model, cut, optimizer) if optimizer else {}
    if ema:
        _check_average(model, ema.model)
    shrunk = deepcopy(model)
    apply_cut_(shrunk, cut)
    prove_channels(shrunk, graph, keep, inputs[:1])
    difference = prove_outputs(shrunk, model, graph, keep, inputs)
    old = dict(model.named_parameters())
    apply_cut_(model, cut)
    if ema:
        apply_cut_(ema.model, cut)
    if optimizer:
        new = dict(model.named_parameters())
        _install_states(optimizer, {old[name]: new[name] for name in old}, states)
    return difference


def _check_average(model: nn.Module, average: nn.Module) -> None:
    ours, theirs = ({name: tuple(t.shape) for name, t in owned_tensors(m).values()} for m in (model, average))
    if ours != theirs:
        name = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
        raise UserError(f"the moving average is of another network: {name} has shapes {ours.get(name)} and {theirs.get(name)}")


def _cut_states(model: nn.Module, cut: Cut, optimizer: Optimizer) -> dict[nn.Parameter, dict[str, object]]:
    """Return, for each parameter that changes, the optimizer's state of it, cut like the parameter.

    Raises:
        UserError: the state has something that can't be cut like the parameter.
    """
    kind = type(optimizer).__name__
    for key, value in vars(optimizer).items():
        held = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, nn.Parameter) for item in held):
            raise UserError(f"{kind} keeps the parameters themselves in '{key}' and can't follow a cut; use another optimizer")
    states: dict[nn.Parameter, dict[str, object]] = {}
    for name, parameter in model.named_parameters():
        if name not in cut.indices or parameter not in optimizer.state:
            continue
        states[parameter] = {}
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.ndim:
                fits = value.ndim == parameter.ndim and all(a in (b, 1) for a, b in zip(value.shape, parameter.shape, strict=True))
                if not fits:
                    raise UserError(f"{kind} keeps '{key}' of shape {tuple(value.shape)} for {name}: it can't be cut")
                value = _cut_broadcast(value, parameter, cut.indices[name])
            elif not isinstance(value, Tensor | int | float | str | None):
                raise UserError(f"{kind} keeps '{key}', a {type(value).__name__}, for {name}: it can't be cut")
            states[parameter][key] = value
    return states


def _cut_broadcast(value: Tensor, parameter: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    whole = value
    for dim, index in dims.items():
        if value.shape[dim] == parameter.shape[dim]:
            value = value.index_select(dim, index.to(value.device))
    return laid_out_like(value, whole)


def _install_states(
    optimizer: Optimizer, renewed: Mapping[nn.Parameter, nn.Parameter], states: Mapping[nn.Parameter, dict[str, object]]
) -> None:
    for group in optimizer.param_groups:
        group["params"] = [renewed.get(parameter, parameter) for parameter in group["params"]]
    for old, new in renewed.items():
        if old is not new and old in optimizer.state:
            kept = optimizer.state.pop(old)
            optimizer.state[new] = states.get(old, kept)
