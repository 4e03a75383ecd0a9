"""From a network to the graphs that are exported: ONNX with layers named after modules, and TorchScript."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compression.exporting.learned import LearnedRanges
from compression.scoring.calibration import Calibration
from models.backends.exported import one_line, optional_module
from models.backends.metadata import Metadata
from utils.errors import UserError
from utils.spec import ModelSpec

ONNX_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # operators that multiply by weights
PREFIX = "network."  # of the names of the classifier's tensors in a graph
SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note on a node: the modules around it, then the operation
CALIBRATION_BATCH = 32


class ExportedModule(nn.Module):
    """The module that goes into a file: the classifier, with normalisation before it and softmax after it if ``baked``.

    Args:
        network: the classifier, in eval mode.
        spec: mean and std.
        baked: from uint8 [B, S, S, C] to probabilities [B, classes]; else from normalised float32 [B, C, S, S] to logits.
        half: compute in float16, between the same inputs and outputs.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, spec: ModelSpec, baked: bool, half: bool) -> None:
        super().__init__()
        self.network = deepcopy(network).half() if half else network
        self.baked, self.half_ = baked, half
        self.register_buffer("mean", torch.tensor(spec.mean) * 255)
        self.register_buffer("scale", 1 / (torch.tensor(spec.std) * 255))

    def forward(self, images: Tensor) -> Tensor:
        x = ((images.float() - self.mean) * self.scale).permute(0, 3, 1, 2) if self.baked else images
        logits = self.network(x.half()).float() if self.half_ else self.network(x)
        return logits.softmax(1) if self.baked else logits


@dataclass
class ExportSource:
    """What the files of a classifier are written from.

    Attributes:
        model: float32, in eval mode, on the CPU.
        metadata: of the files, except for the precision.
        opset: version of ONNX's operators.
        calibration: training images, for int8.
        learned: the ranges of a network that was trained for int8; its model then comes without the rounding.
        graphs: the ONNX models in float32 and float16, by whether they are half; each is exported once.
    """

    model: nn.Module
    metadata: Metadata
    opset: int = 18
    calibration: Calibration | None = None
    learned: LearnedRanges | None = None
    graphs: dict[bool, Any] = field(default_factory=dict)

    def metadata_text(self, precision: str) -> str:
        """Return the text that a file in this precision holds of itself."""
        return replace(self.metadata, precision=precision).to_json()

    def module(self, half: bool) -> ExportedModule:
        """Return the module that goes into a file."""
        return ExportedModule(self.model, self.metadata.spec, self.metadata.preprocessing, half).eval()

    def layers(self) -> list[str]:
        """Return the names of the layers of the ONNX model."""
        return layers_of(self.onnx())

    def example(self) -> Tensor:
        """Return zeros for the file's input; two images if it takes any number, since the exporter would fix a batch of one."""
        shape = [size or 2 for size in self.metadata.input_shape]
        return torch.zeros(shape, dtype=getattr(torch, self.metadata.input_type))

    def onnx(self, half: bool = False) -> Any:
        """Return a copy of the ONNX model."""
        if half not in self.graphs:
            self.graphs[half] = to_onnx(self.module(half), self.example(), self.metadata.batch_size is None, self.opset)
        return deepcopy(self.graphs[half])

    def calibration_inputs(self) -> Iterator[NDArray[Any]]:
        """Yield the calibration images in the form of the file's input; a short last batch is filled with the first images."""
        assert self.calibration is not None, "int8 is refused without --data"
        size = self.metadata.batch_size or min(CALIBRATION_BATCH, len(self.calibration))
        images = self.calibration.images
        order = np.resize(np.arange(len(images)), -(-len(images) // size) * size)
        whole = Calibration(images[order], self.calibration.labels[order], self.calibration.spec, size)
        if self.metadata.preprocessing:
            yield from (part.numpy() for part in whole.images.split(size))
        else:
            yield from (inputs.contiguous().numpy() for inputs, _ in whole.batches())


def to_onnx(network: nn.Module, example: Tensor, dynamic: bool, opset: int) -> Any:
    """Export a network in eval mode to an ONNX model, with batch norms folded into the convolutions before them.

    Args:
        network: what to export.
        example: an input.
        dynamic: whether the model takes any number of images.
        opset: version of the operators.

    Raises:
        UserError: the exporter does not understand the network, or a library is not installed.
    """
    for name in ("onnx", "onnxscript"):
        optional_module(name, "export to ONNX")
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    names = ("images", "probabilities" if getattr(network, "baked", False) else "logits")
    try:
        with quiet():
            # Left to itself, torch.onnx falls back to a draft export, which is right for the example's size alone.
            traced = torch.export.export(network, (example,), dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(
                traced, dynamo=True, opset_version=opset, input_names=names[:1], output_names=names[1:], verbose=False
            )
    except Exception as error:  # the exporter wraps errors in its own
        reason = one_line(error.__cause__ or error)
        raise UserError(f"this network can't be exported{' with --dynamic' if dynamic else ''} ({reason})") from None
    assert program is not None
    model = program.model_proto
    written = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if written != opset:
        raise UserError(f"this network can't be written in opset {opset}; it needs {written}: give --opset {written}")
    name_layers_(model)
    clean_(model)
    return model


def clean_(model: Any) -> None:
    """Remove the exporter's notes, in place: stack traces, which hold paths of this machine."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


def name_layers_(model: Any) -> None:
    """Name the nodes that multiply by weights, and their weights, after the modules, in place.

    The names survive quantization and the runtimes' own optimisation, so that an audit finds the layers again.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    renamed, taken = {}, set()
    for i, node in enumerate(model.graph.node):
        weight = next((name for name in node.input if name in weights), None) if node.op_type in ONNX_LAYERS else None
        if weight is None:
            continue
        name = weight.removesuffix(".weight") if weight.endswith(".weight") else _scope(node) or node.name.removeprefix("node_")
        name = name.removeprefix(PREFIX)
        name = f"{name}.{i}" if name in taken else name
        taken.add(name)
        node.name = name
        if uses[weight] == 1:
            renamed[weight] = f"{name}.weight"
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    rest = [value for value in model.graph.value_info if value.name not in renamed]
    del model.graph.value_info[:]
    model.graph.value_info.extend(rest)


def _scope(node: Any) -> str:
    """Return the module that a node comes from by the exporter's note: weights that it transposes lose their names."""
    noted = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    try:
        scopes = ast.literal_eval(noted)
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""


def layers_of(model: Any) -> list[str]:
    """Return the names of the nodes that multiply by weights, in the graph's order."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type in ONNX_LAYERS and any(name in weights for name in node.input)]


def to_torchscript(network: nn.Module, example: Tensor) -> Any:
    """Trace a network and freeze it, with batch norms folded.

    Raises:
        UserError: it can't be traced.
    """
    try:
        with quiet(), torch.no_grad():
            return torch.jit.freeze(torch.jit.trace(network, example, check_trace=False))
    except Exception as error:
        raise UserError(f"this network can't be traced to TorchScript ({one_line(error)})") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what the exporters print, log and warn about."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
