"""Networks of torchvision, and of timm where it is installed. Importing this module imports torchvision."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torchvision
from torch import nn

from utils.errors import UserError, unknown

TIMM_PREFIX = "timm/"


def torchvision_names() -> list[str]:
    """Names of torchvision's classification networks."""
    return torchvision.models.list_models(module=torchvision.models)


def _timm(name: str) -> Any:
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"'{name}' needs timm: pip install timm")
    import timm

    return timm


def resolve(name: str, own: Iterable[str]) -> str:
    """Return the full name of a torchvision or timm network (``timm/...``).

    Args:
        name: as a user gives it.
        own: further valid names, for the error.

    Raises:
        UserError: neither library has such a network; the nearest name is suggested.
    """
    if name in torchvision_names():
        return name
    bare = name.removeprefix(TIMM_PREFIX)
    timm = _timm(name) if name.startswith(TIMM_PREFIX) or importlib.util.find_spec("timm") else None
    if timm is not None and timm.is_model(bare):
        return TIMM_PREFIX + bare
    raise unknown("model", name, [*own, *torchvision_names()])


def build(name: str, num_classes: int, channels: int) -> nn.Module:
    """Build a torchvision or timm network; ``name`` is what ``resolve`` returns.

    For other than 3 input channels the first convolution of torchvision's networks is replaced.

    Raises:
        UserError: the network is unknown, or has no such convolution.
    """
    if name.startswith(TIMM_PREFIX):
        model: nn.Module = _timm(name).create_model(name.removeprefix(TIMM_PREFIX), num_classes=num_classes, in_chans=channels)
        return model
    if name not in torchvision_names():
        raise unknown("model", name, torchvision_names())
    builder = torchvision.models.get_model_builder(name)
    # Auxiliary heads change what forward returns in training; they are not part of the classifier.
    options: dict[str, Any] = {"aux_logits": False} if "aux_logits" in inspect.getsource(builder) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # on initialisers that will change
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if channels != 3:
        _replace_stem(model, channels)
    return model


def _replace_stem(model: nn.Module, channels: int) -> None:
    """Give the first convolution another number of input channels."""
    for parent in model.modules():
        for child_name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and child.in_channels == 3:
                shape: dict[str, Any] = {"kernel_size": child.kernel_size, "stride": child.stride, "padding": child.padding}
                stem = nn.Conv2d(channels, child.out_channels, bias=child.bias is not None, **shape)
                setattr(parent, child_name, stem)
                return
    raise UserError(f"found no convolution with 3 input channels to replace by one with {channels}")


def pretrained_state(name: str) -> dict[str, torch.Tensor]:
    """Fetch torchvision's or timm's ImageNet weights of a network.

    Raises:
        UserError: they could not be fetched, or do not exist.
    """
    try:
        if name.startswith(TIMM_PREFIX):
            return dict(_timm(name).create_model(name.removeprefix(TIMM_PREFIX), pretrained=True).state_dict())
        state = torchvision.models.get_model_weights(name)["DEFAULT"].get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"could not fetch the pretrained weights of '{name}': {' '.join(str(error).split())[:200]}") from None
    auxiliary = ("AuxLogits.", "aux1.", "aux2.")
    return {key: value for key, value in state.items() if not key.startswith(auxiliary)}


def pretrained_preprocessing(name: str) -> dict[str, Any]:
    """Return mean, std, image size and crop of a pretrained network, as ``ModelSpec`` takes them."""
    if name.startswith(TIMM_PREFIX):
        config = _timm(name).get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))
        return {"mean": tuple(config.mean), "std": tuple(config.std), "imgsz": config.input_size[-1], "crop_fraction": config.crop_pct}
    transform = torchvision.models.get_model_weights(name)["DEFAULT"].transforms()
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    mean, std = tuple(transform.mean), tuple(transform.std)
    if "transform_input" in inspect.getsource(torchvision.models.get_model_builder(name)):
        mean = std = (0.5, 0.5, 0.5)  # pretrained, these networks turn ImageNet's normalisation into this one in forward
    return {"mean": mean, "std": std, "imgsz": crop, "crop_fraction": crop / resize}
