"""Which layers a runtime really computes in int8, read from the graph as it will run, not as it was written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from models.backends.exported import optional_module
from models.backends.onnx_runtime import open_session
from models.backends.openvino_runtime import compile_model, find_xml, read_model

# onnxruntime's operators that multiply 8-bit numbers; what it can't fuse into one remains a Conv, Gemm or MatMul in float32.
INT8_OPERATORS = {
    "QLinearConv", "QLinearConvTranspose", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}  # fmt: skip
INT8_TYPES = ("i8", "u8")  # OpenVINO's names


@dataclass(frozen=True)
class Audit:
    """Names of a file's convolutions and linear layers: those that run in int8, and the others."""

    int8: tuple[str, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, layers: Sequence[str], int8: Iterable[str]) -> Audit:
        """Split layers into those that were found in int8, and the others."""
        found = set(int8)
        return cls(tuple(name for name in layers if name in found), tuple(name for name in layers if name not in found))


def audit_onnx(path: Path, layers: Sequence[str]) -> Audit:
    """Read the graph that onnxruntime makes of a file on this machine.

    A layer counts as int8 only if an operator on 8-bit numbers reads its weights; one that is not found counts as float32.
    """
    onnx = optional_module("onnx", "the audit")
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        open_session(path, optimised)
        graph = onnx.load(str(optimised)).graph
    int8 = [node for node in graph.node if node.op_type in INT8_OPERATORS]
    by_weight = {layer for node in int8 for name in node.input if (layer := _layer_of(name))}
    return Audit.of(layers, by_weight | {node.name for node in int8})


def _layer_of(tensor: str) -> str:
    """Return the layer whose 8-bit weights a tensor is, by its name."""
    layer, found, rest = tensor.rpartition(".weight")
    return layer if found and rest.startswith("_quantized") else ""


def audit_openvino(path: Path, layers: Sequence[str]) -> Audit:
    """Read the precisions at which OpenVINO executes a model on this machine."""
    file = find_xml(path)
    core, model = read_model(file)
    compiled = compile_model(core, model, file, exact=False)
    int8: set[str] = set()
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        if _text(info, "runtimePrecision") in INT8_TYPES:
            # A fused operator lists the layers that went into it; a layer's own parts follow a slash.
            int8 |= {name.partition("/")[0] for name in _text(info, "originalLayersNames").split(",")}
    return Audit.of(layers, int8)


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def audit_torch(network: nn.Module) -> Audit:
    """Return the layers of a network that runs in torch, none of them in int8."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return Audit((), tuple(name for name, module in network.named_modules() if isinstance(module, kinds)))
