"""Masks that hold: on the weights, on their moving average, and on what the optimizer remembers of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compression.tracing.cutting import Cut
from models.quantized.preparing import weights_by_name
from utils.loop.hooks import LoopState


class Masks:
    """The masks of a network's parameters, 1 where a weight stays and 0 where it is pruned.

    A plain mask holds for good: weight, average and momentum are zero where it is zero, gradients are masked before the
    optimizer sees them, so that every step leaves them zero.

    Under a *double* mask the forward pass sees masked weights and the optimizer trains all of them: between the
    optimizer's step and the next one the parameter is masked and its full values are kept in ``hidden``. So
    validation and checkpoints always see what the forward pass sees. Only double masks have other values than 0 and 1.

    The moving average is zero where a mask is; of a weight that comes back it begins anew at the weight's value.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.hidden: dict[str, Tensor] = {}
        self.double: set[str] = set()
        self.masks_gradients: set[str] = set()

    def full(self, name: str, parameter: Tensor) -> Tensor:
        """Return a parameter's values before any double mask."""
        return self.hidden.get(name, parameter.detach())

    @torch.no_grad()
    def set_(self, run: LoopState, masks: Mapping[str, Tensor], double: bool = False, mask_gradients: bool = False) -> None:
        """Take up masks, and apply them."""
        parameters, averages = weights_by_name(run.model), weights_by_name(run.averaged)
        for name, mask in masks.items():
            parameter = parameters[name]
            mask = torch.empty_like(parameter).copy_(mask)
            full = self.full(name, parameter)
            if run.ema:
                _revive_(averages[name], full, self.values.get(name), mask)
            self.values[name] = mask
            if double:
                self.hidden[name] = full.clone()
                parameter.copy_(full * mask)
                self.double.add(name)
                (self.masks_gradients.add if mask_gradients else self.masks_gradients.discard)(name)
            else:
                parameter.copy_(full)  # what an older double mask hid, and this one does not, is there again
                self._settle_(run, name, parameter, averages[name])

    @torch.no_grad()
    def rewrite_(self, run: LoopState, weights: Mapping[str, Tensor]) -> None:
        """Give weights new values: what is hidden of them, and their average, too."""
        parameters, averages = weights_by_name(run.model), weights_by_name(run.averaged)
        for name, values in weights.items():
            held = [self.hidden[name]] if name in self.hidden else []
            for tensor in (parameters[name], averages[name], *held):
                tensor.copy_(values)

    def _settle_(self, run: LoopState, name: str, parameter: nn.Parameter, average: nn.Parameter) -> None:
        """Make a mask plain: nothing behind it is remembered anywhere. A factor that it had is in the weight already."""
        self.values[name] = (self.values[name] != 0).to(parameter.dtype)
        self.hidden.pop(name, None)
        self.double.discard(name)
        self.masks_gradients.discard(name)
        state = run.optimizer.state.get(parameter, {})
        moments = [v for key, v in state.items() if key != "step" and isinstance(v, Tensor) and v.shape == parameter.shape]
        for tensor in (parameter, average, *moments):
            tensor.mul_(self.values[name].to(tensor.dtype))

    @torch.no_grad()
    def keep_(self, run: LoopState, names: Iterable[str]) -> None:
        """Make double masks plain, for good."""
        parameters, averages = weights_by_name(run.model), weights_by_name(run.averaged)
        for name in sorted(self.double & set(names)):
            self._settle_(run, name, parameters[name], averages[name])

    @torch.no_grad()
    def release_(self, run: LoopState, names: Iterable[str], double_only: bool = True) -> None:
        """Take masks away; what a double mask hid comes back."""
        parameters, averages = weights_by_name(run.model), weights_by_name(run.averaged)
        for name in names:
            if name in self.hidden:
                full = self.hidden.pop(name)
                if run.ema:
                    _revive_(averages[name], full, self.values[name], torch.ones_like(full))
                parameters[name].copy_(full)
            if name in self.double or not double_only:
                self.values.pop(name, None)
            self.double.discard(name)
            self.masks_gradients.discard(name)

    @torch.no_grad()
    def before_step_(self, run: LoopState) -> None:
        """Show the optimizer full weights under double masks, and no gradient of weights under plain ones."""
        parameters = weights_by_name(run.model)
        for name in list(self.hidden):
            parameters[name].copy_(self.hidden.pop(name))
        gradients, masks = [], []
        for name, mask in self.values.items():
            gradient = parameters[name].grad
            if gradient is not None and (name not in self.double or name in self.masks_gradients):
                gradients.append(gradient)
                masks.append(mask)
        if masks:
            torch._foreach_mul_(gradients, masks)

    @torch.no_grad()
    def after_step_(self, run: LoopState) -> None:
        """Apply the masks to what a step has changed."""
        if not self.values:
            return
        parameters = weights_by_name(run.model)
        averages = weights_by_name(run.ema.model) if run.ema else {}
        plain = [name for name in self.values if name not in self.double]
        if plain:
            masks = [self.values[name] for name in plain]
            for held in (parameters, averages) if run.ema else (parameters,):
                weights: list[Tensor] = [held[name] for name in plain]
                torch._foreach_mul_(weights, masks)
        for name in self.double:
            if name not in self.hidden:
                self.hidden[name] = parameters[name].detach().clone()
                parameters[name].mul_(self.values[name])
            if run.ema:  # a factor is none of the average's: multiplied in at every step, it would grow without end
                averages[name].mul_(self.values[name] != 0)

    def cut_(self, cut: Cut) -> None:
        """Follow a cut of the network's channels."""
        for tensors in (self.values, self.hidden):
            for name in list(tensors):
                tensors[name] = cut.of(name, tensors[name]).clone()
        for name in [name for name, mask in self.values.items() if name not in self.double and bool(mask.all())]:
            del self.values[name]  # all that it hid is gone

    def state_dict(self) -> dict[str, Any]:
        """Return what a restart needs; masks of zeros and ones as booleans."""
        values = {name: mask.bool() if bool(((mask == 0) | (mask == 1)).all()) else mask for name, mask in self.values.items()}
        return {
            "values": values,
            "hidden": dict(self.hidden),
            "double": sorted(self.double),
            "masks_gradients": sorted(self.masks_gradients),
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Take up what ``state_dict`` returned, for a model of the same shapes."""
        parameters = weights_by_name(model)

        def like(name: str, tensor: Tensor) -> Tensor:
            return torch.empty_like(parameters[name], requires_grad=False).copy_(tensor)

        self.values = {name: like(name, mask) for name, mask in state["values"].items()}
        self.hidden = {name: like(name, values) for name, values in state["hidden"].items()}
        self.double, self.masks_gradients = set(state["double"]), set(state["masks_gradients"])


def _revive_(average: Tensor, full: Tensor, old: Tensor | None, new: Tensor) -> None:
    """Begin the average of what an old mask hid and a new one does not at the weight's value; a decay of 0.9999 is slow."""
    if old is not None:
        average.copy_(torch.where((old == 0) & (new != 0) & (average == 0), full, average))
