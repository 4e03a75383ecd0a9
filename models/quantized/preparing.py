"""Put quantized modules into a network, by a recipe that a checkpoint's specification can hold."""

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
    # A subclass of the layer's own class with all that the layer has: the same Parameters, hooks and mode.
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
    """A kind of replacement: which modules it replaces, its settings, and what makes it."""

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
    """Return what takes a module's place; it shares the module's Parameters.

    Raises:
        UserError: this kind does not replace modules of this type.
    """
    if type(module) not in KINDS[kind].replaces:
        valid = ", ".join(cls.__name__ for cls in KINDS[kind].replaces)
        raise UserError(f"a {type(module).__name__} can't be quantized as '{kind}'; valid: {valid}")
    return KINDS[kind].make(module, settings)


def is_quantized(model: nn.Module) -> bool:
    """Whether some module of a network has been replaced."""
    return any(isinstance(module, QUANTIZED) for module in model.modules())


def replace_(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of those of these names, in place.

    A module that has several names is replaced under all of them, by the same one. What is new stands on the device of
    the network.
    """
    modules, device = dict(model.named_modules()), next(model.parameters()).device
    norms = {name: _norm(name, new, modules) for name, new in replacements.items()}
    _with(model, {modules[name]: new.to(device) for name, new in replacements.items()})
    for name, norm in norms.items():
        new = replacements[name]
        if isinstance(new, QuantizedLayer) and norm is not None:
            new.fold_with(norm)


def _norm(name: str, new: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """Return the batch norm that is folded into a layer."""
    if not isinstance(new, QuantizedLayer) or not new.settings.norm:
        return None
    norm = modules.get(new.settings.norm)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
        raise UserError(f"{name}: '{new.settings.norm}' is no batch norm with running statistics, so it can't be folded in")
    if len(norm.running_var) != new.weight.shape[0]:
        raise UserError(f"{name}: the batch norm '{new.settings.norm}' has {len(norm.running_var)} channels, not {new.weight.shape[0]}")
    return norm


def refresh_(model: nn.Module) -> None:
    """Bring the images of all float copies up to date, and learned clips back into their range, in place."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer | PactReLU):
            module.refresh_()


def recipe_of(model: nn.Module) -> Recipe:
    """Return how a network has been quantized, as ``prepare_`` takes it: JSON-able; empty for one that is not."""
    kinds = {made: name for name, kind in KINDS.items() for made in kind.made}
    return {name: {"kind": kinds[type(m)], **asdict(m.settings)} for name, m in model.named_modules() if type(m) in kinds}


def prepare_(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Quantize a network as a recipe says, in place; ranges and float copies are then loaded with its state dict.

    Raises:
        UserError: it is quantized already, or the recipe does not fit it; the network is as it was.
    """
    if is_quantized(model):
        raise UserError("the network is quantized already")
    modules, replacements = dict(model.named_modules()), {}
    for name, values in recipe.items():
        place = Place(f"quantization.{name}", {}, {})
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
    """Quantize a copy of a network (its moving average) as the network has been, with the same ranges, in place."""
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
    """Return a copy of a network without quantization: the layers that it was made of, with the float weights."""
    copy = deepcopy(model)
    relus: dict[nn.Module, nn.Module] = {m: nn.ReLU().train(m.training) for m in copy.modules() if isinstance(m, ClippedReLU | PactReLU)}
    return _with(copy, relus | _plain_layers(copy))


@torch.no_grad()
def rounded_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network in eval mode whose layers hold the rounded weights themselves; activations round as before."""
    copy = deepcopy(model).eval()
    for layer in copy.modules():
        if isinstance(layer, QuantizedLayer):
            for key, image in ((key, layer.image(key)) for key in KEYS):
                if image is not None:
                    layer._parameters.get(f"float_{key}", layer._parameters.get(key)).data = image  # type: ignore[union-attr]
    return _with(copy, _plain_layers(copy))


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


def _with(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the place of others, in place; what is shared stays shared."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[key] = replacements[child]
    return model


def weights_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a network's parameters under the names that they have before it is quantized: ``float_weight`` is ``weight``.

    So a mask or a pruner that names ``conv1.weight`` acts on what is trained.
    """
    found = {}
    for name, parameter in model.named_parameters():
        path, _, key = name.rpartition(".")
        found[f"{path}.{key.removeprefix('float_')}" if key in ("float_weight", "float_bias") else name] = parameter
    return found


def clips(model: nn.Module) -> list[nn.Parameter]:
    """Return the learned clips of a network (PACT's alpha), in the order of its modules."""
    return [module.alpha for module in model.modules() if isinstance(module, PactReLU)]


def input_tensors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the ranges of the quantized inputs by the names of their layers."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer))
    return {name: (module.input_low, module.input_high) for name, module in layers if module.settings.bits_inputs}
