"""Masks on the weights, on their moving average, and on the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compression.tracing.cutting import Cut
from models.quantized.preparing import weights_by_name
from utils.loop.hooks import LoopState


class Masks:
    """The masks of a network's parameters, 1 where a weight is kept and 0 where it is pruned.

    A plain mask is permanent: where it is zero, so are weight, average and momentum; gradients are masked before the
    optimizer uses them, so that every step leaves these zeros.

    Under a *double* mask the forward pass uses masked weights while the optimizer trains all of them: from one optimizer
    step to the next the parameter is masked and its full values are kept in ``hidden``. So validation and checkpoints
    always use the weights of the forward pass. Only double masks may have values other than 0 and 1.

    The moving average is zero where a mask is zero; when a weight comes back, its average restarts at the weight's value.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.hidden: dict[str, Tensor] = {}
        self.double: set[str] = set()
        self.masks_gradients: set[str] = set()

    def full(self, name: str, parameter: Tensor) -> Tensor:
        """Return a parameter's values without a double mask."""
        return self.hidden.get(name, parameter.detach())

    @torch.no_grad()
    def set_(self, run: LoopState, masks: Mapping[str, Tensor], double: bool = False, mask_gradients: bool = False) -> None:
        """Set masks and apply them."""
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
                parameter.copy_(full)  # restores what an earlier double mask hid and this mask does not
                self._settle_(run, name, parameter, averages[name])

    @torch.no_grad()
    def rewrite_(self, run: LoopState, weights: Mapping[str, Tensor]) -> None:
        """Replace the values of weights, including their hidden values and their average."""
        parameters, averages = weights_by_name(run.model), weights_by_name(run.averaged)
        for name, values in weights.items():
            held = [self.hidden[name]] if name in self.hidden else []
            for tensor in (parameters[name], averages[name], *held):
                tensor.copy_(values)

    def _settle_(self, run: LoopState, name: str, parameter: nn.Parameter, average: nn.Parameter) -> None:
        """Make a mask plain and forget the values behind it. If it had factors, the weight contains them already."""
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
        """Make double masks plain, permanently."""
        parameters, averages = weights_by_name(run.model), weights_by_name(run.averaged)
        for name in sorted(self.double & set(names)):
            self._settle_(run, name, parameters[name], averages[name])

    @torch.no_grad()
    def release_(self, run: LoopState, names: Iterable[str], double_only: bool = True) -> None:
        """Remove masks; what a double mask hid comes back."""
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
        """Give the optimizer the full weights under double masks, and zero the gradients under plain ones."""
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
        """Apply the masks after a step of the optimizer."""
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
            if run.ema:  # zeros only: a factor applied at every step would grow without bound
                averages[name].mul_(self.values[name] != 0)

    def cut_(self, cut: Cut) -> None:
        """Apply a cut of the network's channels."""
        for tensors in (self.values, self.hidden):
            for name in list(tensors):
                tensors[name] = cut.of(name, tensors[name]).clone()
        for name in [name for name, mask in self.values.items() if name not in self.double and bool(mask.all())]:
            del self.values[name]  # everything it hid was cut away

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run; masks of zeros and ones as booleans."""
        values = {name: mask.bool() if bool(((mask == 0) | (mask == 1)).all()) else mask for name, mask in self.values.items()}
        return {
            "values": values,
            "hidden": dict(self.hidden),
            "double": sorted(self.double),
            "masks_gradients": sorted(self.masks_gradients),
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Restore what ``state_dict`` returned, for a model of the same shapes."""
        parameters = weights_by_name(model)

        def like(name: str, tensor: Tensor) -> Tensor:
            return torch.empty_like(parameters[name], requires_grad=False).copy_(tensor)

        self.values = {name: like(name, mask) for name, mask in state["values"].items()}
        self.hidden = {name: like(name, values) for name, values in state["hidden"].items()}
        self.double, self.masks_gradients = set(state["double"]), set(state["masks_gradients"])


def _revive_(average: Tensor, full: Tensor, old: Tensor | None, new: Tensor) -> None:
    """Start the average of weights that come back at their values, in place: with a decay of 0.9999 it would follow slowly."""
    if old is not None:
        average.copy_(torch.where((old == 0) & (new != 0) & (average == 0), full, average))
