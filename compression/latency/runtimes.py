"""The runtimes that a latency budget may be for. A new one is one line in ``RUNTIMES``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compression.exporting.formats import FORMATS
from compression.exporting.graphs import ExportSource
from compression.exporting.quantizing import quantize_onnx
from compression.latency.narrowed import NarrowableModel
from compression.tracing.cutting import apply_cut_, plan_cut
from compression.tracing.graph import ChannelGraph, Keep
from models.backends import Backend, TorchBackend, open_backend
from models.backends.exported import CPU, ExportedBackend, Runtime, optional_module
from models.backends.metadata import KEY
from models.backends.onnx_runtime import OnnxRuntime
from models.backends.openvino_runtime import OpenVinoRuntime
from models.loading import LoadedClassifier
from utils.errors import UserError
from utils.spec import ModelSpec

Opener = Callable[[Path, torch.device, bool], Runtime]
# Runtime -> the format of its files, and what opens an ONNX file in it; torch runs the network itself.
RUNTIMES: dict[str, tuple[str, Opener | None]] = {
    "torch": ("", None),
    "onnxruntime": ("onnx", OnnxRuntime),
    "openvino": ("openvino", OpenVinoRuntime),
}
PRECISIONS = ("fp32", "int8")


class Candidates:
    """Opens narrow forms of a network in a runtime, fast and without training: what they compute means nothing.

    Args:
        source: of the dense network, with calibration images for int8.
        graph: its channel groups.
        runtime, precision: what will run it.
    """

    def __init__(self, source: ExportSource, graph: ChannelGraph, runtime: str, precision: str) -> None:
        check_runtime(runtime, precision)
        self.source, self.graph, self.precision = source, graph, precision
        self.format, self.open_onnx = RUNTIMES[runtime]
        self.model = NarrowableModel(onnx_of(self.source, precision), graph) if self.open_onnx else None
        self.by_export = False

    def narrow(self, keep: Keep) -> Backend:
        """Open the network at a keep-set: its file is narrowed, or exported where widths stand in it in a way that is not known."""
        if self.model is None or self.open_onnx is None:
            return torch_backend(cut_copy(self.source.model, self.graph, keep), self.source.metadata.spec)
        onnx = optional_module("onnx", "a latency budget")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            if not self.by_export:
                onnx.save(self.model.at(keep), str(path))
                try:
                    return ExportedBackend(self.open_onnx(path, CPU, False), path)
                except UserError:
                    self.by_export = True
            narrow = replace(self.source, model=cut_copy(self.source.model, self.graph, keep), graphs={})
            onnx.save(onnx_of(narrow, self.precision), str(path))
            return ExportedBackend(self.open_onnx(path, CPU, False), path)

    def shipped(self, model: torch.nn.Module, folder: Path) -> Backend:
        """Write the file of a network as export.py does, and open it; in torch the network itself."""
        if not self.format:
            return torch_backend(deepcopy(model), self.source.metadata.spec)
        source = ExportSource(model, self.source.metadata, self.source.opset, self.source.calibration)
        path = folder / f"network{FORMATS[self.format].suffix}"
        FORMATS[self.format].write(source, self.precision, path)
        return open_backend(str(path), CPU)


def onnx_of(source: ExportSource, precision: str) -> Any:
    """Return the ONNX model of a network in a precision, with its metadata."""
    model = source.onnx()
    if precision == "int8":
        onnx = optional_module("onnx", "a latency budget")
        with tempfile.TemporaryDirectory() as folder:
            quantize_onnx(source, Path(folder) / "int8.onnx")
            model = onnx.load(str(Path(folder) / "int8.onnx"))
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, source.metadata_text(precision)
    return model


def check_runtime(runtime: str, precision: str) -> None:
    """Import what a runtime needs.

    Raises:
        UserError: a library is not installed, or the runtime has no such precision.
    """
    form, _ = RUNTIMES[runtime]
    if form:
        FORMATS[form].check(precision == "int8")
    elif precision == "int8":
        raise UserError(f"--runtime {runtime} has no int8; valid: {', '.join(name for name, (form, _) in RUNTIMES.items() if form)}")


def cut_copy(model: torch.nn.Module, graph: ChannelGraph, keep: Keep) -> torch.nn.Module:
    """Return a copy of a network that is cut, without a proof."""
    narrow = deepcopy(model)
    apply_cut_(narrow, plan_cut(graph, keep))
    return narrow


def torch_backend(model: torch.nn.Module, spec: ModelSpec) -> TorchBackend:
    """Return a network ready to run in torch."""
    return TorchBackend(LoadedClassifier(model, spec), CPU)
