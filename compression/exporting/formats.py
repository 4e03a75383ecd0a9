"""The formats that a classifier can leave in. A new one is one line in ``FORMATS``."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compression.exporting.audit import Audit, audit_onnx, audit_openvino, audit_torch
from compression.exporting.graphs import Source, describe_, layers_of, to_torchscript
from compression.exporting.quantizing import import_nncf, quantize_onnx, quantize_openvino
from models.backends.exported import optional_module
from models.backends.metadata import KEY, TORCHSCRIPT_FILE, Metadata
from models.backends.openvino_runtime import find_xml, read_model
from utils.files.checkpoint import atomic_write


@dataclass(frozen=True)
class Format:
    """How a format is written, and looked into.

    Attributes:
        suffix: of the file's or folder's name.
        write: writes a source in a precision to a path.
        audit: tells which layers of a written file run in int8.
        needs: libraries, beside torch.
        needs_for_int8: further ones; None where int8 can't be written.
    """

    suffix: str
    write: Callable[[Source, str, Path], None]
    audit: Callable[[Source, Path], Audit]
    needs: tuple[str, ...] = ()
    needs_for_int8: tuple[str, ...] | None = None

    def check(self, int8: bool) -> None:
        """Import what writing and running need.

        Raises:
            UserError: a library is not installed.
        """
        for name in (*self.needs, *((self.needs_for_int8 or ()) if int8 else ())):
            import_nncf() if name == "nncf" else optional_module(name, f"export to {self.suffix.lstrip('._')}")


def _metadata(source: Source, precision: str) -> Metadata:
    return replace(source.metadata, precision=precision)


def _layers(source: Source) -> list[str]:
    return layers_of(source.onnx())


def write_onnx(source: Source, precision: str, path: Path) -> None:
    """Write an ONNX file."""
    onnx = optional_module("onnx", "export to ONNX")
    with tempfile.TemporaryDirectory() as folder:
        if precision == "int8":
            quantized = Path(folder) / "int8.onnx"
            quantize_onnx(source, quantized)
            model = onnx.load(str(quantized))
        else:
            model = source.onnx(precision == "fp16")
    with atomic_write(path) as temporary:
        onnx.save(describe_(model, _metadata(source, precision)), str(temporary))


def write_openvino(source: Source, precision: str, path: Path) -> None:
    """Write an OpenVINO model into a folder: an .xml with the graph and the description, a .bin with the weights."""
    onnx, openvino = optional_module("onnx", "export to OpenVINO"), optional_module("openvino", "export to OpenVINO")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        learned = precision == "int8" and source.learned is not None
        if learned:  # OpenVINO reads the rounding of an int8 ONNX file, learned ranges among it
            quantize_onnx(source, file)
        else:
            onnx.save(source.onnx(), str(file))
        _, model = read_model(file)
        if precision == "int8" and not learned:
            model = quantize_openvino(source, model)
        model.set_rt_info(_metadata(source, precision).to_json(), [KEY])
        path.mkdir(parents=True, exist_ok=True)
        openvino.save_model(model, str(path / "model.xml"), compress_to_fp16=precision == "fp16")
        del model  # it maps the file in the folder
    find_xml(path)


def write_torchscript(source: Source, precision: str, path: Path) -> None:
    """Write a TorchScript file."""
    module = to_torchscript(source.shipped(precision == "fp16"), source.example())
    extra = {TORCHSCRIPT_FILE: _metadata(source, precision).to_json()}
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks that it would rather have another format
        torch.jit.save(module, str(temporary), _extra_files=extra)


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", write_onnx, lambda s, path: audit_onnx(path, _layers(s)), ("onnx", "onnxscript", "onnxruntime"), ()),
    "openvino": Format(
        "_openvino", write_openvino, lambda s, path: audit_openvino(path, _layers(s)), ("onnx", "onnxscript", "openvino"), ("nncf",)
    ),
    "torchscript": Format(".torchscript", write_torchscript, lambda s, path: audit_torch(s.model)),
}
QUANTIZABLE = tuple(name for name, kind in FORMATS.items() if kind.needs_for_int8 is not None)
