"""An ONNX model at other widths: its weights are cut like the network's, without exporting it again. Its outputs mean nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compression.exporting.graphs import ONNX_LAYERS, PREFIX
from compression.tracing.cutting import plan_cut
from compression.tracing.graph import ChannelGraph, Keep
from compression.tracing.record import Route
from models.backends.exported import optional_module

Place = tuple[str, dict[int, int]]  # a tensor of the network, and for dimensions of the ONNX one the dimension there
DEQUANTIZE = "DequantizeLinear"


class NarrowableModel:
    """An ONNX model of a network that was traced.

    Args:
        model: as export.py writes it, in float or quantized, for a fixed number of images.
        graph: of the network.
    """

    def __init__(self, model: Any, graph: ChannelGraph) -> None:
        self.onnx = optional_module("onnx", "a latency budget")
        self.model, self.graph = model, graph
        self.arrays = {tensor.name: self.onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.makers = {output: node for node in model.graph.node for output in node.output}
        self.places: dict[str, Place] = {}
        for name, array in self.arrays.items():
            tensor = name.removeprefix(PREFIX)
            if graph.shapes.get(tensor) == array.shape:
                self.places[name] = tensor, {dim: dim for dim in range(array.ndim)}
        for node in model.graph.node:
            if node.op_type in ONNX_LAYERS and f"{node.name}.weight" in graph.shapes:
                self._place_layer(node, f"{node.name}.weight")
        self.gathers = {name: route.buffer for name, array in self.arrays.items() for route in graph.routes if _is_index(array, route)}
        inferred = self.onnx.shape_inference.infer_shapes(model).graph
        values = [*inferred.value_info, *inferred.input, *inferred.output]
        self.shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}

    def at(self, keep: Keep) -> Any:
        """Return the model with what a keep-set leaves of each weight."""
        cut = plan_cut(self.graph, keep)
        found = self.onnx.ModelProto()
        found.CopyFrom(self.model)
        for tensor in found.graph.initializer:
            name, dims = self.places.get(tensor.name, ("", {}))
            stays = cut.indices.get(name, {})
            array = self.arrays[tensor.name]
            for dim, of_tensor in dims.items():
                if of_tensor in stays and array.shape[dim] > 1:
                    array = array.take(stays[of_tensor].numpy(), dim)
            if buffer := self.gathers.get(tensor.name):
                array = cut.of(buffer, cut.values[buffer]).numpy().astype(array.dtype).reshape(-1, *array.shape[1:])
            if array is not self.arrays[tensor.name]:
                tensor.CopyFrom(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
        self._regroup_(found, cut.groups)
        self._free_reshapes_(found)
        del found.graph.value_info[:]
        return found

    def _place_layer(self, node: Any, weight: str) -> None:
        """Note where a layer's weight and bias come from, through what dequantizes them."""
        turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute))
        for place, name in enumerate(node.input[1:3]):
            maker = self.makers.get(name)
            sources = list(maker.input) if maker is not None and maker.op_type == DEQUANTIZE else [name]
            for i, source in enumerate(sources):
                if (array := self.arrays.get(source)) is None:
                    continue
                if place == 0 and i == 0:
                    dims = {0: 1, 1: 0} if turned and array.ndim == 2 else {dim: dim for dim in range(array.ndim)}
                else:  # a bias, or a scale and a zero point for each output
                    dims = {0: 0}
                self.places[source] = weight, dims

    def _regroup_(self, model: Any, groups: Mapping[str, int]) -> None:
        for node in model.graph.node:
            if node.name in groups:
                for attribute in node.attribute:
                    if attribute.name in ("group", "num_groups"):
                        attribute.i = groups[node.name]

    def _free_reshapes_(self, model: Any) -> None:
        """Let the channels of each reshape follow from its input: the largest of the sizes that are none of the map's sides."""
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type != "Reshape" or node.input[1] not in constants:
                continue
            target, sides = self.arrays[node.input[1]].copy(), self.shapes.get(node.input[0], [])[2:]
            if (target > 0).all() and len(target) > 1:
                places = [place for place in range(1, len(target)) if target[place] not in sides] or [1]
                target[max(places, key=lambda place: target[place])] = -1
                constants[node.input[1]].CopyFrom(self.onnx.numpy_helper.from_array(target, node.input[1]))


def _is_index(array: Any, route: Route) -> bool:
    """Whether an array is a gather's index, perhaps of another shape."""
    return array.dtype.kind == "i" and array.size == len(route.index) and bool((array.reshape(-1) == route.index.numpy()).all())
