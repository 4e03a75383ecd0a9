"""Quantized modules, and how a network is rebuilt with them: numbers, layers, activations, recipes."""

from __future__ import annotations

from models.quantized.activations import ClippedReLU, PactReLU
from models.quantized.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from models.quantized.preparing import (
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
    weights_by_name,
)
from models.quantized.settings import ClippedSettings, LayerSettings, PactSettings

__all__ = [
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
    "input_tensors",
    "is_quantized",
    "plain_copy",
    "prepare_",
    "prepare_alike_",
    "recipe_of",
    "refresh_",
    "replace_",
    "replacement",
    "weights_by_name",
]
