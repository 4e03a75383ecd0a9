"""Quantized modules, and how a network is rebuilt with them: numbers, layers, activations, recipes."""

from __future__ import annotations

from models.quantized.activations import ClippedReLU, PactReLU
from models.quantized.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, image_of
from models.quantized.preparing import (
    LAYER_KINDS,
    RELUS,
    Recipe,
    clips,
    input_tensors,
    is_quantized,
    plain_copy,
    prepare_,
    prepare_alike_,
    recipe_of,
    refresh_,
    replace_,
    replacement,
    rounded_copy,
    weights_by_name,
)
from models.quantized.settings import ClippedSettings, LayerSettings, PactSettings

__all__ = [
    "LAYER_KINDS",
    "RELUS",
    "ClippedReLU",
    "ClippedSettings",
    "LayerSettings",
    "PactReLU",
    "PactSettings",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "Recipe",
    "clips",
    "image_of",
    "input_tensors",
    "is_quantized",
    "plain_copy",
    "prepare_",
    "prepare_alike_",
    "recipe_of",
    "refresh_",
    "replace_",
    "replacement",
    "rounded_copy",
    "weights_by_name",
]
