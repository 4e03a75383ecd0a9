"""The interface of a quantizer: it replaces a network's modules by quantized ones, each with its number of bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from compression.quantizers.overrides import Bits, bits_by_name, read_bits, read_overrides
from models.quantized.layers import image_of
from models.quantized.preparing import is_quantized, refresh_, replace_, replacement
from models.quantized.settings import LayerSettings
from utils.errors import UserError
from utils.options import Place, boolean, option

Factory = Callable[[nn.Module, str, Bits], nn.Module | None]


@dataclass
class Quantizer:
    """Base of all quantizers: a dataclass whose fields are its arguments in a schedule (see ``utils.options``).

    ::

        quantizer = DorefaQuantizer(bits_activations=8, bits_weights=3)
        quantizer.prepare_model(model, inputs, optimizer)
        for inputs, targets in loader:
            ...
            optimizer.step()
            quantizer.quantize_params()

    Attributes:
        bits_activations, bits_weights, bits_bias: None (or 32) means not quantized.
        overrides: regular expression of module names -> {bits_activations, bits_weights, bits_bias}; the first match wins,
            so put specific patterns before broad ones.
        train_with_fp_copy: the Parameter ``weight`` becomes the Parameter ``float_weight``, which is trained, and
            ``weight`` a buffer with its quantized image. Otherwise, the weights themselves are rounded after every step.
        replace_factory: type of module -> function (module, name, bits) that returns its replacement, or None to leave it;
            may be changed before ``prepare_model``. Subclasses of a type are not replaced: they may compute differently.
    """

    bits_activations: int | None = option(read_bits, None)
    bits_weights: int | None = option(read_bits, None)
    bits_bias: int | None = option(read_bits, None)
    overrides: Mapping[str, Mapping[str, Any]] | None = option(read_overrides, None)
    train_with_fp_copy: bool = option(boolean, True)

    replace_factory: dict[type[nn.Module], Factory] = field(init=False, repr=False, compare=False, default_factory=dict)
    model: nn.Module | None = field(init=False, repr=False, compare=False, default=None)

    method = "linear"  # of the weights, see ``models.quantized.settings``
    calibrates = False  # whether it measures the network on more than one batch of images

    def __post_init__(self) -> None:
        nowhere = Place("", {}, {})
        for name in ("bits_activations", "bits_weights", "bits_bias"):
            setattr(self, name, read_bits(getattr(self, name), nowhere / name))
        read = next(field.metadata["read"] for field in fields(self) if field.name == "overrides")
        self.overrides = read(self.overrides, nowhere / "overrides")
        self.replace_factory = {nn.Conv2d: self.layer, nn.Linear: self.layer}

    def settings(self, name: str, bits: Bits) -> LayerSettings:
        """Return how a layer is quantized."""
        return LayerSettings(self.method, bits.weights, bits.bias, float_copy=self.train_with_fp_copy)

    def layer(self, module: nn.Module, name: str, bits: Bits) -> nn.Module | None:
        """Return the quantized form of a convolution or linear layer; None if nothing in it is quantized."""
        settings = self.settings(name, bits)
        if not (settings.bits_weights or settings.bits_bias or settings.bits_inputs):
            return None
        return replacement(module, "layer", settings)

    def bits_of(self, model: nn.Module) -> dict[str, Bits]:
        """Return the bits of every module that would be replaced, by its first name.

        Raises:
            UserError: a pattern matches no module, or a shared module gets different bits under two of its names.
        """
        default = Bits(self.bits_activations, self.bits_weights, self.bits_bias)
        named = list(model.named_modules(remove_duplicate=False))
        replaced_names = {name for name, module in named if name and type(module) in self.replace_factory}
        chosen = bits_by_name(default, self.overrides or {}, [name for name, _ in named], replaced_names)
        naming: dict[int, str] = {}  # module -> the first of its names that a pattern matches
        for name, module in named:
            if name in chosen and chosen[naming.setdefault(id(module), name)] != chosen[name]:
                raise UserError(f"overrides: '{naming[id(module)]}' and '{name}' are one module, so they can't have different bits")
        replaced = [(name, module) for name, module in model.named_modules() if name and type(module) in self.replace_factory]
        return {name: chosen.get(naming.get(id(module), name), default) for name, module in replaced}

    def check(self, model: nn.Module) -> None:
        """Check that the quantizer fits a network, before anything is changed.

        Raises:
            UserError: a pattern matches nothing, or nothing would be quantized.
        """
        chosen = self.bits_of(model)
        for name, bits in chosen.items():
            self.settings(name, bits)  # raises for an unsupported number of bits
        if not any((b.activations, b.weights, b.bias) != (None, None, None) for b in chosen.values()):
            raise UserError(f"{type(self).__name__} would quantize nothing: give bits_activations, bits_weights or overrides")

    def prepare_model(
        self,
        model: nn.Module,
        inputs: Tensor | None = None,
        optimizer: Optimizer | None = None,
        batches: Iterable[Tensor] | None = None,
    ) -> nn.Module:
        """Quantize a network in place: names are kept, a shared module is replaced once, Parameters remain the same objects.

        Args:
            model: the network; it is returned.
            inputs: a batch [B, C, H, W], normalised, on its device; required to fold batch norm or to track ranges.
            optimizer: its groups remain as they are; learned clips get a group of their own.
            batches: inputs for a quantizer that ``calibrates``; without them, it measures the network on ``inputs``.

        Raises:
            UserError: the network is quantized already, or the quantizer does not fit it; it is unchanged.
        """
        if is_quantized(model):
            raise UserError("the network is quantized already; a quantizer prepares it once")
        if type(self).param_quantization_fn is not Quantizer.param_quantization_fn:
            raise UserError(f"{type(self).__name__}.param_quantization_fn has no effect: name a function of IMAGES as the method")
        self.check(model)
        self.measure(model, inputs, batches)
        modules, replacements = dict(model.named_modules()), {}
        for name, bits in self.bits_of(model).items():
            new = self.replace_factory[type(modules[name])](modules[name], name, bits)
            if new is not None:
                replacements[name] = new
        replace_(model, replacements)
        self.model = model
        self.quantize_params()
        self.settle(model, inputs)
        if optimizer is not None:
            self.mend_(optimizer, model)
        return model

    def measure(self, model: nn.Module, inputs: Tensor | None, batches: Iterable[Tensor] | None) -> None:
        """Measure what the replacements need to know, before the network is changed."""

    def settle(self, model: nn.Module, inputs: Tensor | None) -> None:
        """Initialise the new modules, once they are in place."""

    def mend_(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Give new Parameters, if there are any, to an optimizer."""

    def param_quantization_fn(self, weight: Tensor, bits: int) -> Tensor:
        """Return the quantized image of a weight by ``method``, on its tape, as a layer without batch norm computes it.

        A layer followed by batch norm uses the grid of its folded weights.
        """
        return image_of(weight, bits, self.settings("", Bits(weights=bits)))

    def quantize_params(self) -> None:
        """Update the quantized images of the weights; call it after every step of the optimizer.

        Raises:
            UserError: no network has been prepared.
        """
        if self.model is None:
            raise UserError("prepare_model comes before quantize_params: no network has been prepared")
        refresh_(self.model)
