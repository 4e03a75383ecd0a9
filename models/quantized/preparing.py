"""Replace modules of a network by quantized ones, by a recipe that a checkpoint's specification can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.quantized.activations import ClippedReLU, PactReLU
from models.quantized.layers import KEYS, QuantizedConv2d, QuantizedLayer, QuantizedLinear
from models.quantized.settings import ClippedSettings, LayerSettings, PactSettings
from utils.errors import UserError, unknown
from utils.options import Place, build, mapping, shown

Recipe = dict[str, dict[str, Any]]
RELUS = (nn.ReLU, nn.ReLU6)
LAYER_KINDS: dict[type[nn.Module], type[QuantizedLayer]] = {nn.Conv2d: QuantizedConv2d, nn.Linear: QuantizedLinear}


def _layer(module: nn.Module, settings: Any) -> nn.Module:
    quantized = LAYER_KINDS[type(module)].__new__(LAYER_KINDS[type(module)])
    # The new layer's class is a subclass of the old one's; it takes over everything: Parameters, hooks, mode.
    quantized.__dict__.update({key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()})
    quantized.prepare_(settings)
    return quantized


def _activation(kind: type[nn.Module]) -> Callable[[nn.Module, Any], nn.Module]:
    def make(module: nn.Module, settings: Any) -> nn.Module:
        made = kind(settings)
        made.training = module.training
        return made

    return make


@dataclass(frozen=True)
class Kind:
    """A kind of replacement: which modules it replaces, its settings, what makes it, and the modules that are made."""

    replaces: tuple[type[nn.Module], ...]
    settings: type
    make: Callable[[nn.Module, Any], nn.Module]
    made: tuple[type[nn.Module], ...]


KINDS = {
    "layer": Kind(tuple(LAYER_KINDS), LayerSettings, _layer, tuple(LAYER_KINDS.values())),
    "clipped_relu": Kind(RELUS, ClippedSettings, _activation(ClippedReLU), (ClippedReLU,)),
    "pact": Kind(RELUS, PactSettings, _activation(PactReLU), (PactReLU,)),
}
QUANTIZED = tuple(made for kind in KINDS.values() for made in kind.made)


def replacement(module: nn.Module, kind: str, settings: Any) -> nn.Module:
    """Return the quantized module that takes a module's place and shares its Parameters.

    Raises:
        UserError: a module of this type has no such replacement.
    """
    if type(module) not in KINDS[kind].replaces:
        valid = ", ".join(cls.__name__ for cls in KINDS[kind].replaces)
        raise UserError(f"a {type(module).__name__} can't be quantized as '{kind}'; valid: {valid}")
    return KINDS[kind].make(module, settings)


def is_quantized(model: nn.Module) -> bool:
    """Whether some module of a network has been replaced."""
    return any(isinstance(module, QUANTIZED) for module in model.modules())


def replace_(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Replace modules by name, in place, and move the new ones to the network's device.

    A module that has several names is replaced under all of them. The network is unchanged if this raises.

    Raises:
        UserError: a layer names a batch norm that can't be folded into it.
    """
    modules, device = dict(model.named_modules()), next(model.parameters()).device
    norms = {}
    for name, new in replacements.items():
        if isinstance(new, QuantizedLayer) and new.settings.norm:
            norms[new] = _foldable_norm(name, new, modules)
    _swap_(model, {modules[name]: new.to(device) for name, new in replacements.items()})
    for layer, norm in norms.items():
        layer.fold_with(norm)


def _foldable_norm(name: str, layer: QuantizedLayer, modules: Mapping[str, nn.Module]) -> nn.Module:
    norm = modules.get(layer.settings.norm or "")
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
        raise UserError(f"{name}: '{layer.settings.norm}' is no batch norm with running statistics, so it can't be folded in")
    if len(norm.running_var) != layer.weight.shape[0]:
        raise UserError(f"{name}: the batch norm '{layer.settings.norm}' has {len(norm.running_var)} channels, not {layer.weight.shape[0]}")
    return norm


def refresh_(model: nn.Module) -> None:
    """Update the images of all float copies, and bring learned clips back into their range, in place."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer | PactReLU):
            module.refresh_()


def recipe_of(model: nn.Module) -> Recipe:
    """Return how a network was quantized, JSON-able, as ``prepare_`` takes it; empty if it was not."""
    kinds = {made: name for name, kind in KINDS.items() for made in kind.made}
    return {name: {"kind": kinds[type(m)], **asdict(m.settings)} for name, m in model.named_modules() if type(m) in kinds}


def prepare_(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Quantize a network by a recipe, in place; ranges and float copies come with its state dict.

    Raises:
        UserError: it is quantized already, or the recipe does not fit it; the network is unchanged.
    """
    if is_quantized(model):
        raise UserError("the network is quantized already")
    modules, replacements = dict(model.named_modules()), {}
    whole = Place("quantization", {}, {})
    for name, values in mapping(recipe, whole).items():
        place = whole / str(name)
        given = dict(mapping(values, place))
        kind = given.pop("kind", None)
        if not isinstance(kind, str) or kind not in KINDS:
            raise place.error(f"kind is {shown(kind)}; valid: {', '.join(KINDS)}")
        if name not in modules:
            raise unknown("quantized module", str(name), modules)
        settings: Any = build(KINDS[kind].settings, given, place)
        replacements[name] = replacement(modules[name], kind, settings)
    replace_(model, replacements)
    refresh_(model)


@torch.no_grad()
def prepare_alike_(copy: nn.Module, model: nn.Module) -> None:
    """Quantize a copy of a network (its moving average) like the network, with the same ranges, in place."""
    trained = any(parameter.requires_grad for parameter in copy.parameters())
    prepare_(copy, recipe_of(model))
    copies = dict(copy.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and module.settings.bits_inputs:
            for key in ("input_low", "input_high", "input_seen"):
                getattr(copies[name], key).copy_(getattr(module, key))
        elif isinstance(module, PactReLU):
            copies[name].requires_grad_(trained)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network without quantization: its original layers, with the float weights."""
    copy = deepcopy(model)
    relus: dict[nn.Module, nn.Module] = {m: nn.ReLU().train(m.training) for m in copy.modules() if isinstance(m, ClippedReLU | PactReLU)}
    return _swap_(copy, relus | _plain_layers(copy))


@torch.no_grad()
def rounded_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network, in eval mode, whose plain layers hold the rounded weights; activations are still quantized."""
    copy = deepcopy(model).eval()
    for layer in copy.modules():
        if isinstance(layer, QuantizedLayer):
            for key in KEYS:
                if (image := layer.image(key)) is not None:
                    layer._parameters.get(f"float_{key}", layer._parameters.get(key)).data = image  # type: ignore[union-attr]
    return _swap_(copy, _plain_layers(copy))


def _plain_layers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return a plain layer for each quantized one, with its float parameters."""
    plain: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            kind = next(kind for kind, quantized in LAYER_KINDS.items() if type(layer) is quantized)
            bare = plain[layer] = kind.__new__(kind)
            bare.__dict__.update({key: value for key, value in layer.__dict__.items() if key not in QuantizedLayer.__annotations__})
            bare._buffers = {}
            bare._parameters = {name.removeprefix("float_"): p for name, p in layer._parameters.items()}
    return plain


def _swap_(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules by others, in place, wherever they occur, and return the model."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[key] = replacements[child]
    return model


def weights_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a network's parameters under their names in the unquantized network: ``float_weight`` is ``weight``.

    A mask or a pruner that names ``conv1.weight`` thus acts on the parameter that is trained.
    """
    found = {}
    for name, parameter in model.named_parameters():
        path, _, key = name.rpartition(".")
        found[f"{path}.{key.removeprefix('float_')}" if key in ("float_weight", "float_bias") else name] = parameter
    return found


def clips(model: nn.Module) -> list[nn.Parameter]:
    """Return the learned clips of a network (PACT's alpha), in the order of its modules."""
    return [module.alpha for module in model.modules() if isinstance(module, PactReLU)]


def input_ranges(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the range (low, high) of each quantized input by the name of its layer."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer))
    return {name: (module.input_low, module.input_high) for name, module in layers if module.settings.bits_inputs}
