"""Post-training quantization of exported graphs: onnxruntime's QDQ and NNCF for OpenVINO.

Activations have 8 bits with a zero point, per tensor; weights 8 symmetric bits, per output channel (arXiv:1712.05877,
section 2; arXiv:1806.08342, section 3.1). Ranges are measured on training images, except those that quantization-aware
training has learned.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compression.exporting.graphs import ONNX_LAYERS, ExportSource, layers_of, quiet
from compression.exporting.learned import LearnedRanges
from models.backends.exported import one_line, optional_module
from utils.errors import UserError


def quantize_onnx(source: ExportSource, path: Path) -> None:
    """Write a classifier as an int8 ONNX file, with QuantizeLinear and DequantizeLinear around every layer.

    The normalisation before the first layer and the softmax remain in float32: they cost little, and rounding them would
    add errors that no later layer removes.

    Raises:
        UserError: onnxruntime can't quantize the graph.
    """
    tools = optional_module("onnxruntime.quantization", "--int8 with ONNX")
    utilities = optional_module("onnxruntime.quantization.quant_utils", "--int8 with ONNX")
    model = source.onnx()
    utilities.add_pre_process_metadata(model)  # the exporter has done the pre-processing whose absence would be warned about
    nodes = list(model.graph.node)
    first = next((i for i, node in enumerate(nodes) if node.op_type in ONNX_LAYERS), 0)
    for i, node in enumerate(nodes):
        node.name = node.name or f"node_{i}"
    # Products of two activations (attention) stay in float: onnxruntime 1.31 optimises their int8 form to wrong outputs.
    float_only = {node.name for node in nodes if node.op_type == "Softmax" or node.op_type in ONNX_LAYERS} - set(layers_of(model))
    float_only |= source.learned.in_float if source.learned else set()
    excluded = [node.name for i, node in enumerate(nodes) if i < first or node.name in float_only]
    try:
        with quiet():
            tools.quantize_static(
                model,
                str(path),
                CalibrationReader(source, model.graph.input[0].name),
                quant_format=tools.QuantFormat.QDQ,
                per_channel=source.learned.per_channel if source.learned else True,
                reduce_range=saturates(),
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
                nodes_to_exclude=excluded,
                op_types_to_quantize=list(ONNX_LAYERS) if is_transformer(model) else None,
                extra_options={
                    "TensorQuantOverrides": _learned_grids(source.learned, nodes) if source.learned else {},
                    # Logits of 8 bits would tie; the last layer's sums have 32.
                    "OpTypesToExcludeOutputQuantization": ["Gemm"],
                },
            )
    except Exception as error:  # onnxruntime's errors have no common base
        raise UserError(f"onnxruntime can't quantize this network ({one_line(error)}); leave --int8 out") from None


class CalibrationReader:
    """Hands the calibration images to onnxruntime, as its ``CalibrationDataReader``, under the name of the input."""

    def __init__(self, source: ExportSource, name: str) -> None:
        self.batches, self.name = source.calibration_inputs(), name

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch}


def _learned_grids(learned: LearnedRanges, nodes: list[Any]) -> dict[str, Any]:
    """Return scale and zero point of the tensors with learned ranges, as onnxruntime's ``TensorQuantOverrides``.

    If 8-bit products saturate, weights are left out: they get 7 bits, on grids that onnxruntime measures.
    """
    grids: dict[str, Any] = {}
    for node in nodes:
        if node.name not in learned.inputs:
            continue
        scale, zero = learned.inputs[node.name]
        grids[node.input[0]] = [{"scale": np.array(scale, np.float32), "zero_point": np.array(zero, np.uint8)}]
        by_output = node.op_type == "Conv" or any(entry.name == "transB" and entry.i for entry in node.attribute)  # else [in, out]
        if by_output and not saturates():
            grids[node.input[1]] = [{"scale": step, "zero_point": np.array(0, np.int8)} for step in learned.weights[node.name]]
            if learned.per_channel:
                grids[node.input[1]][0]["axis"] = 0
    return grids


def is_transformer(model: Any) -> bool:
    """Whether an ONNX model has layer norms; outliers between its layers are then too large for one 8-bit grid."""
    return any(node.op_type == "LayerNormalization" for node in model.graph.node)


def saturates() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, which can overflow: x86 without VNNI.

    Weights of 7 bits avoid that. A file is best quantized on the kind of processor that will run it.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return not any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni")) if capabilities else False


def quantize_openvino(source: ExportSource, model: Any) -> Any:
    """Return an OpenVINO model, read from the source's ONNX model, quantized by NNCF on the source's calibration images.

    Raises:
        UserError: NNCF can't quantize it, or is not installed.
    """
    nncf = import_nncf()
    batches, graph, operations = list(source.calibration_inputs()), source.onnx(), model.get_ordered_ops()
    layers = set(layers_of(graph))
    first = next((i for i, operation in enumerate(operations) if operation.get_friendly_name() in layers), 0)
    normalisation = [op for op in operations[:first] if op.get_type_name() in ("Add", "Multiply", "Subtract", "Convert")]
    ignored = nncf.IgnoredScope(names=[op.get_friendly_name() for op in normalisation], types=["Softmax"], validate=False)
    try:
        with quiet():
            return nncf.quantize(
                model,
                nncf.Dataset(batches),
                subset_size=len(batches),
                preset=nncf.QuantizationPreset.MIXED,
                ignored_scope=ignored,
                model_type=nncf.ModelType.TRANSFORMER if is_transformer(graph) else None,
            )
    except Exception as error:  # NNCF raises errors of its own and OpenVINO's
        raise UserError(f"NNCF can't quantize this network ({one_line(error)}); leave --int8 out") from None


def import_nncf() -> Any:
    """Import NNCF with its telemetry off, which the environment variable NNCF_CI disables.

    Raises:
        UserError: it is not installed.
    """
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"
    try:
        with quiet():
            return optional_module("nncf", "--int8 with OpenVINO")
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before
