"""Resize a network to the shapes of a state dict, with the size attributes of its modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

HEADS = ("num_heads", "n_heads", "n_head", "heads", "num_attention_heads")  # how modules call the heads of an attention
HEADS_WIDTHS = ("attn_dim", "inner_dim", "all_head_dim", "all_head_size", "attention_dim", "dim_attn")  # and the channels of all of them


def install_(model: nn.Module, tensors: Mapping[str, Tensor], groups: Mapping[str, int] | None = None) -> None:
    """Replace parameters and buffers by name, in place, and update the size attributes of their modules.

    Args:
        model: all tensors that are not named remain the same objects.
        tensors: new parameters and buffers, of any shape; a parameter with several names is replaced under all of them.
        groups: new numbers of groups, by module name; see ``group_counts``.
    """
    replaced: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        old, new = getattr(model.get_submodule(path), key), tensor.detach()
        replaced[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    changed: set[nn.Module] = set()
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for key, old in list(registry.items()):
                if old is not None and id(old) in replaced:
                    registry[key] = replaced[id(old)]  # type: ignore[assignment]
                    changed.add(module)
    modules = dict(model.named_modules())
    for name, count in (groups or {}).items():
        if (attribute := _size_without_shape(modules[name])) is not None:
            _set_count_(modules[name], attribute, count)
    for module in changed:
        set_sizes_(module)


def resize_(model: nn.Module, state: Mapping[str, Tensor], groups: Mapping[str, int] | None = None) -> list[str]:
    """Give a network the shapes of a state dict, filled with zeros, and return the names of the tensors that changed."""
    device = next(model.parameters()).device
    changed = {
        name: torch.zeros(state[name].shape, dtype=tensor.dtype, device=device)
        for name, tensor in model.state_dict().items()
        if name in state and state[name].shape != tensor.shape and state[name].ndim == tensor.ndim
    }
    install_(model, changed, groups)
    return list(changed)


def set_sizes_(module: nn.Module) -> None:
    """Set a layer's size attributes to its tensors' shapes."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.in_channels, module.out_channels = module.weight.shape[1] * module.groups, module.weight.shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        values = module.weight if module.weight is not None else module.running_mean
        module.num_features = module.num_features if values is None else len(values)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = module.weight.shape


def group_counts(model: nn.Module) -> dict[str, int]:
    """Return the sizes that no tensor's shape gives: groups of convolutions and group norms, channels of bare instance norms, heads."""
    modules = model.named_modules()
    return {name: getattr(module, attribute) for name, module in modules if (attribute := _size_without_shape(module)) is not None}


def is_depthwise(module: nn.Module) -> bool:
    """Return whether each channel is a group of its own, so that the number of channels gives that of the groups."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def _set_count_(module: nn.Module, attribute: str, count: int) -> None:
    if attribute in HEADS:
        for name in HEADS_WIDTHS:
            if type(width := getattr(module, name, None)) is int:
                setattr(module, name, width * count // getattr(module, attribute))
    setattr(module, attribute, count)


def _size_without_shape(module: nn.Module) -> str | None:
    """Return the name of a module's size attribute that does not follow from its tensors' shapes."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "groups"
    if isinstance(module, nn.GroupNorm):
        return "num_groups"
    bare = isinstance(module, nn.modules.batchnorm._NormBase) and not list(module.parameters()) and not list(module.buffers())
    return "num_features" if bare else next((name for name in HEADS if type(getattr(module, name, None)) is int), None)
