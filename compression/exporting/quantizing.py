"""Post-training quantization of exported graphs: onnxruntime's QDQ and NNCF for OpenVINO.

8-bit activations with a zero point, per tensor; 8-bit symmetric weights, per output channel (arXiv:1712.05877, section 2;
arXiv:1806.08342, section 3.1). Ranges come from training images alone; those of a network that was trained for 8 bits are
its own, and only tensors that it did not round are measured.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compression.exporting.graphs import ONNX_LAYERS, Source, layers_of, quiet
from compression.exporting.learned import Learned
from models.backends.exported import one_line, optional_module
from utils.errors import UserError


def quantize_onnx(source: Source, path: Path) -> None:
    """Write a classifier as an int8 ONNX file: QuantizeLinear and DequantizeLinear around every layer.

    What comes before the first layer (normalisation) and the softmax stay in float32: they cost nothing, and the error
    of rounding there is not made up for later.

    Raises:
        UserError: onnxruntime can't quantize the graph.
    """
    tools = optional_module("onnxruntime.quantization", "--int8 with ONNX")
    marks = optional_module("onnxruntime.quantization.quant_utils", "--int8 with ONNX")
    model = source.onnx()
    marks.add_pre_process_metadata(model)  # the exporter has folded and inferred what the quantizer would remark on
    nodes = list(model.graph.node)
    first = next((i for i, node in enumerate(nodes) if node.op_type in ONNX_LAYERS), 0)
    for i, node in enumerate(nodes):
        node.name = node.name or f"node_{i}"
    # A product of two activations (attention) stays in float: onnxruntime 1.31 optimises its int8 form into wrong outputs.
    float_only = {node.name for node in nodes if node.op_type == "Softmax" or node.op_type in ONNX_LAYERS} - set(layers_of(model))
    float_only |= source.learned.in_float if source.learned else set()
    excluded = [node.name for i, node in enumerate(nodes) if i < first or node.name in float_only]
    try:
        with quiet():
            tools.quantize_static(
                model,
                str(path),
                _reader(tools, source, model.graph.input[0].name),
                quant_format=tools.QuantFormat.QDQ,
                per_channel=source.learned.per_channel if source.learned else True,
                reduce_range=saturates(),
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
                nodes_to_exclude=excluded,
                op_types_to_quantize=list(ONNX_LAYERS) if is_transformer(model) else None,
                extra_options={
                    "TensorQuantOverrides": _learned_grids(source.learned, nodes) if source.learned else {},
                    # Logits of 8 bits would tie; the sums of the last layer are there in 32.
                    "OpTypesToExcludeOutputQuantization": ["Gemm"],
                },
            )
    except Exception as error:  # onnxruntime's errors have no common base
        raise UserError(f"onnxruntime can't quantize this network ({one_line(error)}); leave --int8 out") from None


def _learned_grids(learned: Learned, nodes: list[Any]) -> dict[str, Any]:
    """Return scale and zero point of the tensors whose ranges were learned, as onnxruntime takes them; the others are measured.

    Where 8 bits saturate, weights get 7, on a grid of their own.
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
    """Whether an ONNX model has layer norms: between its layers stand outliers that 8 bits for all do not hold."""
    return any(node.op_type == "LayerNormalization" for node in model.graph.node)


def _reader(tools: Any, source: Source, name: str) -> Any:
    class Reader(tools.CalibrationDataReader):
        """Hands the calibration images to onnxruntime."""

        def __init__(self) -> None:
            self.batches: Iterator[Any] = source.calibration_inputs()

        def get_next(self) -> Any:
            inputs = next(self.batches, None)
            return None if inputs is None else {name: inputs}

    return Reader()


def saturates() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, which overflow: x86 without VNNI.

    Weights of 7 bits avoid it. A file is best quantized where it will run.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return not any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni")) if capabilities else False


def quantize_openvino(source: Source, model: Any) -> Any:
    """Return an OpenVINO model quantized by NNCF.

    Args:
        source: the classifier, for its calibration images.
        model: as read from the classifier's ONNX form.

    Raises:
        UserError: NNCF can't quantize it, or is not installed.
    """
    nncf = import_nncf()
    batches = list(source.calibration_inputs())
    graph = source.onnx()
    layers = set(layers_of(graph))
    order = [op.get_friendly_name() for op in model.get_ordered_ops()]
    first = next((i for i, name in enumerate(order) if name in layers), 0)
    before = [op for op in model.get_ordered_ops()[:first] if op.get_type_name() in ("Add", "Multiply", "Subtract", "Convert")]
    ignored = nncf.IgnoredScope(names=[op.get_friendly_name() for op in before], types=["Softmax"], validate=False)
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
    """Import NNCF without its reports to its maker, which it makes unless this variable is set.

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
