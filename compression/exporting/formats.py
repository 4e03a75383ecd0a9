"""The formats that a classifier can be exported to. A new one is one line in ``FORMATS``."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compression.exporting.audit import Audit, audit_onnx, audit_openvino, audit_torch
from compression.exporting.graphs import ExportSource, to_torchscript
from compression.exporting.quantizing import import_nncf, quantize_onnx, quantize_openvino
from models.backends.exported import optional_module
from models.backends.metadata import KEY, TORCHSCRIPT_FILE
from models.backends.openvino_runtime import read_model
from models.networks import build
from utils.files.checkpoint import atomic_write, save_safetensors


@dataclass(frozen=True)
class Format:
    """How files of a format are written and audited.

    Attributes:
        suffix: of the file's or folder's name.
        write: (source, precision, path) -> None.
        audit: (source, path) -> which layers run in int8.
        needs: libraries beside torch.
        needs_for_int8: further ones; None if the format has no int8.
    """

    suffix: str
    write: Callable[[ExportSource, str, Path], None]
    audit: Callable[[ExportSource, Path], Audit]
    needs: tuple[str, ...] = ()
    needs_for_int8: tuple[str, ...] | None = None

    def check(self, int8: bool) -> None:
        """Import the libraries that writing and running need.

        Raises:
            UserError: a library is not installed.
        """
        for name in (*self.needs, *((self.needs_for_int8 or ()) if int8 else ())):
            import_nncf() if name == "nncf" else optional_module(name, f"export to {self.suffix.lstrip('._')}")


def write_onnx(source: ExportSource, precision: str, path: Path) -> None:
    """Write an ONNX file."""
    onnx = optional_module("onnx", "export to ONNX")
    with tempfile.TemporaryDirectory() as folder:
        if precision == "int8":
            quantized = Path(folder) / "int8.onnx"
            quantize_onnx(source, quantized)
            model = onnx.load(str(quantized))
        else:
            model = source.onnx(precision == "fp16")
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, source.metadata_text(precision)
    with atomic_write(path) as temporary:
        onnx.save(model, str(temporary))


def write_openvino(source: ExportSource, precision: str, path: Path) -> None:
    """Write an OpenVINO model into a folder: an .xml with the graph and the metadata, a .bin with the weights."""
    onnx, openvino = optional_module("onnx", "export to OpenVINO"), optional_module("openvino", "export to OpenVINO")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        learned = precision == "int8" and source.learned is not None
        if learned:  # OpenVINO reads the learned ranges from an int8 ONNX file
            quantize_onnx(source, file)
        else:
            onnx.save(source.onnx(), str(file))
        _, model = read_model(file)
        if precision == "int8" and not learned:
            model = quantize_openvino(source, model)
        model.set_rt_info(source.metadata_text(precision), [KEY])
        path.mkdir(parents=True, exist_ok=True)
        openvino.save_model(model, str(path / "model.xml"), compress_to_fp16=precision == "fp16")
        del model  # it maps the file in the temporary folder


def write_torchscript(source: ExportSource, precision: str, path: Path) -> None:
    """Write a TorchScript file."""
    module = to_torchscript(source.module(precision == "fp16"), source.example())
    extra = {TORCHSCRIPT_FILE: source.metadata_text(precision)}
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends another format
        torch.jit.save(module, str(temporary), _extra_files=extra)


def write_safetensors(source: ExportSource, precision: str, path: Path) -> None:
    """Write the weights as safetensors; where the classes' names are known, with the specification in the metadata."""
    spec, state = source.metadata.spec, source.model.state_dict()
    if precision == "fp16":
        state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    with torch.device("meta"):
        dense = build(spec).state_dict()
    narrow = any(name in dense and dense[name].shape != tensor.shape for name, tensor in state.items())
    plan: dict[str, Any] | None = {"kept": {}, "sizes": {}} if narrow else None
    about = {"spec": spec.to_dict(), "plan": plan, "metrics": {}, "arguments": source.metadata.record}
    save_safetensors(path, state, about if source.metadata.named else {})


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", write_onnx, lambda source, path: audit_onnx(path, source.layers()), ("onnx", "onnxscript", "onnxruntime"), ()),
    "openvino": Format(
        "_openvino",
        write_openvino,
        lambda source, path: audit_openvino(path, source.layers()),
        needs=("onnx", "onnxscript", "openvino"),
        needs_for_int8=("nncf",),
    ),
    "torchscript": Format(".torchscript", write_torchscript, lambda source, path: audit_torch(source.model)),
    "safetensors": Format(".safetensors", write_safetensors, lambda source, path: audit_torch(source.model), ("safetensors",)),
}
QUANTIZABLE = tuple(name for name, kind in FORMATS.items() if kind.needs_for_int8 is not None)
