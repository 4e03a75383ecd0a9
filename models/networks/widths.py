"""Give a network the widths that a state dict has: shapes carry the widths, attributes follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def install_(model: nn.Module, tensors: Mapping[str, Tensor], groups: Mapping[str, int] | None = None) -> None:
    """Replace parameters and buffers by name, of any shape, and set the sizes that modules keep as attributes.

    Args:
        model: changed in place; tensors that are not named stay the same objects.
        tensors: new parameters and buffers; a parameter that has several names is replaced under all of them.
        groups: new numbers that no shape tells, by module name; see ``group_counts``.
    """
    replaced: dict[int, Tensor] = {}
    owners = {name: _owner(model, name) for name in tensors}
    for name, (module, key) in owners.items():
        old = getattr(module, key)
        if isinstance(old, nn.Parameter):
            replaced[id(old)] = nn.Parameter(tensors[name].detach(), requires_grad=old.requires_grad)
        else:
            replaced[id(old)] = tensors[name].detach()
    changed: list[nn.Module] = []
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for key, old in list(registry.items()):
                if old is not None and id(old) in replaced:
                    registry[key] = replaced[id(old)]  # type: ignore[assignment]
                    changed.append(module)
    modules = dict(model.named_modules())
    for name, count in (groups or {}).items():
        if (attribute := _unseen(modules[name])) is not None:
            setattr(modules[name], attribute, count)
    for module in {id(module): module for module in changed}.values():
        set_sizes_(module)


def resize_(model: nn.Module, state: Mapping[str, Tensor], groups: Mapping[str, int] | None = None) -> list[str]:
    """Give a network the widths of a state dict, with uninitialised values, and return the names of what changed."""
    target = model.state_dict()
    device = next(model.parameters()).device
    changed = {
        name: torch.zeros(state[name].shape, dtype=tensor.dtype, device=device)
        for name, tensor in target.items()
        if name in state and state[name].shape != tensor.shape and state[name].ndim == tensor.ndim
    }
    install_(model, changed, groups)
    return list(changed)


def set_sizes_(module: nn.Module) -> None:
    """Set a layer's size attributes from its tensors' shapes."""
    values: dict[str, Any] = {}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        values = {"in_channels": module.weight.shape[0], "out_channels": module.weight.shape[1] * module.groups}
    elif isinstance(module, nn.modules.conv._ConvNd):
        values = {"in_channels": module.weight.shape[1] * module.groups, "out_channels": module.weight.shape[0]}
    elif isinstance(module, nn.Linear):
        values = {"in_features": module.weight.shape[1], "out_features": module.weight.shape[0]}
    elif isinstance(module, nn.modules.batchnorm._NormBase) and (module.weight is not None or module.running_mean is not None):
        values = {"num_features": (module.weight if module.weight is not None else module.running_mean).shape[0]}
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        values = {"num_channels": module.weight.shape[0]}
    elif isinstance(module, nn.PReLU):
        values = {"num_parameters": module.weight.shape[0]}
    elif isinstance(module, nn.Embedding):
        values = {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}
    elif isinstance(module, nn.Bilinear):
        values = dict(zip(("out_features", "in1_features", "in2_features"), module.weight.shape, strict=True))
    for name, value in values.items():
        setattr(module, name, value)


def group_counts(model: nn.Module) -> dict[str, int]:
    """Return what no shape tells: numbers of groups of convolutions and group norms, channels of bare instance norms."""
    modules = model.named_modules()
    return {name: getattr(module, attribute) for name, module in modules if (attribute := _unseen(module)) is not None}


def _unseen(module: nn.Module) -> str | None:
    """Return the size attribute of a module that its tensors' shapes do not tell."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "groups"
    if isinstance(module, nn.GroupNorm):
        return "num_groups"
    bare = isinstance(module, nn.modules.batchnorm._NormBase) and not list(module.parameters()) and not list(module.buffers())
    return "num_features" if bare else None


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key
