"""Convolutions and linear layers that compute with quantized weights and inputs.

They remain ``nn.Conv2d`` and ``nn.Linear``, under the same names, with the same Parameter objects; the module tree does not
change. The float weight is the Parameter ``float_weight``; the buffer ``weight`` holds its image, the quantized weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.quantized.numbers import IMAGES, Grid, fake_quantize, grid_of, laid_out, range_of
from models.quantized.settings import LayerSettings

KEYS = {"weight": "bits_weights", "bias": "bits_bias"}


def image_of(values: Tensor, bits: int, settings: LayerSettings) -> Tensor:
    """Return the image of a weight or bias, differentiable, without folding a batch norm in."""
    if settings.method in IMAGES:
        return IMAGES[settings.method](values, bits)
    return fake_quantize(values, grid_of(*range_of(values, settings.per_channel), bits, settings.mode))


class QuantizedLayer(nn.Module):
    """What quantized convolutions and linear layers have in common.

    Attributes:
        settings: how it is quantized.
        input_low, input_high: the input's range, if inputs are quantized.
        input_seen: batches over which the range was tracked.
    """

    settings: LayerSettings
    weight: Tensor
    input_low: Tensor
    input_high: Tensor
    input_seen: Tensor
    _norm: tuple[nn.Module, ...]
    _hooks_of_image: tuple[Callable[[Tensor], Tensor], ...]

    def prepare_(self, settings: LayerSettings) -> None:
        """Apply settings: create the float copies, their images, and the buffers of the input's range."""
        self.settings, self._norm, self._hooks_of_image = settings, (), ()
        for key, bits in KEYS.items():
            if settings.float_copy and getattr(settings, bits) and self._parameters.get(key) is not None:
                image = self._parameters[key].detach().clone()  # type: ignore[union-attr]
                # At the old one's position: an optimizer that is rebuilt for a checkpoint must find the same order.
                self._parameters = {f"float_{key}" if k == key else k: p for k, p in self._parameters.items()}
                self.register_buffer(key, image)
        if settings.bits_inputs:
            for name, kind in (("input_low", torch.float32), ("input_high", torch.float32), ("input_seen", torch.int64)):
                self.register_buffer(name, torch.zeros((), dtype=kind, device=next(self.parameters()).device))

    def fold_with(self, norm: nn.Module) -> None:
        """Set the batch norm that is folded in."""
        self._norm = (norm,)  # in a tuple, so that it does not become a child of this layer

    def multiplier(self) -> Tensor | None:
        """Return gamma / sqrt(var + eps) of the norm after the layer, [out, 1, ...]; None without one."""
        if not self._norm:
            return None
        norm = self._norm[0]
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.detach()
        return scale.float().view(-1, *[1] * (self.weight.ndim - 1))

    def weight_grid(self) -> Grid:
        """Return the grid of the weights, with the batch norm folded in if there is one."""
        low, high = range_of(self._folded(), self.settings.per_channel)
        return grid_of(low, high, self.settings.bits_weights or 8, self.settings.mode)

    def input_grid(self) -> Grid:
        """Return the grid of the input."""
        return grid_of(self.input_low, self.input_high, self.settings.bits_inputs or 8, self.settings.input_mode)

    def _folded(self) -> Tensor:
        weight, scale = getattr(self, "float_weight", self.weight), self.multiplier()
        return weight if scale is None else weight * scale

    def image(self, key: str) -> Tensor | None:
        """Return the quantized weight or bias; its gradient reaches the float copy."""
        values: Tensor | None = self._parameters.get(f"float_{key}", getattr(self, key))
        bits = getattr(self.settings, KEYS[key])
        if values is None or not bits:
            return values
        values = laid_out(values)
        scale = self.multiplier()
        if key == "bias" or scale is None or self.settings.method != "linear":
            return image_of(values, bits, self.settings)
        # If a channel's gamma is zero, so is its folded weight, and nothing can be divided by the scale.
        back = torch.where(scale.abs() > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
        return fake_quantize(values * scale, self.weight_grid()) / back

    @torch.no_grad()
    def refresh_(self) -> None:
        """Copy the images of the float copies into ``weight`` and ``bias``; without copies, round these in place."""
        for key in KEYS:
            image, held = self.image(key), getattr(self, key)
            if image is not None and held is not None:
                held.copy_(image)

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> None:
        if self.settings.float_copy:
            self.refresh_()  # an optimizer's step has changed the floats alone; what is saved must agree
        super()._save_to_state_dict(*arguments, **options)

    def used(self, key: str) -> Tensor | None:
        """Return the weight or bias that the forward pass uses; to round weights that are rounded already changes nothing."""
        value = self.image(key)
        if key == "weight" and value is not None and value.requires_grad:
            for hook in self._hooks_of_image:
                value.register_hook(hook)
        return value

    def hook_image(self, hook: Callable[[Tensor], Tensor]) -> None:
        """Let a hook change the gradient of the weight's image before it reaches the float weight."""
        self._hooks_of_image = (hook,)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return the input rounded to its grid; in training, after its range has been updated."""
        if not self.settings.bits_inputs:
            return x
        if self.training and not self.settings.frozen:
            self.track_(x)
        return fake_quantize(x.float(), self.input_grid()).to(x.dtype)

    @torch.no_grad()
    def track_(self, x: Tensor) -> None:
        """Update the range: range = decay * range + (1 - decay) * the input's; the first input's is taken as it is."""
        share = torch.where(self.input_seen == 0, 1.0, 1.0 - self.settings.decay)
        for held, now in zip((self.input_low, self.input_high), x.detach().aminmax(), strict=True):
            held.lerp_(now.float(), share)
        self.input_seen += 1

    def saturated(self, y: Tensor) -> Tensor:
        """Clamp sums of products to the range of an accumulator of ``bits_accum`` bits."""
        if not self.settings.bits_accum or not self.settings.bits_inputs or not self.settings.bits_weights:
            return y
        step, scale = self.weight_grid().scale * self.input_grid().scale, self.multiplier()
        step = (step if scale is None else step / scale.abs()).flatten()
        step = step.view(-1, *[1] * (self.weight.ndim - 2)) if len(step) > 1 else step
        most = 2 ** (self.settings.bits_accum - 1)
        return torch.clamp(y, -most * step, (most - 1) * step)

    def extra_repr(self) -> str:
        bits = {"weights": self.settings.bits_weights, "bias": self.settings.bits_bias, "inputs": self.settings.bits_inputs}
        return ", ".join([super().extra_repr(), *(f"{name} {value} bits" for name, value in bits.items() if value)])


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A 2-D convolution with quantized weights and inputs."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.used("weight")
        assert weight is not None
        return self.saturated(self._conv_forward(self.quantized_input(x), weight, self.used("bias")))


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer with quantized weights and inputs."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.used("weight")
        assert weight is not None
        return self.saturated(F.linear(self.quantized_input(x), weight, self.used("bias")))
