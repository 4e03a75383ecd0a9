"""OpenVINO models (a folder with an .xml and its .bin, or the .xml itself), on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from models.backends.exported import Shape, ignored_requests, one_line, optional_module
from models.backends.metadata import KEY, Metadata
from utils.errors import UserError

TYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "u8": "uint8"}


class OpenVinoRuntime:
    """A model compiled for one stream and torch's number of threads."""

    def __init__(self, path: Path, device: torch.device, half: bool) -> None:
        file = find_xml(path)
        core, model = read_model(file)
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise UserError(f"{file} has {len(model.inputs)} inputs and {len(model.outputs)} outputs; a classifier has one of each")
        kind = model.input().get_element_type().get_type_name()
        if kind not in TYPES:
            raise UserError(f"{file} takes {kind}; valid: {', '.join(TYPES)}")
        self.input_type = TYPES[kind]
        self.input_shape: Shape = tuple(size.get_length() if size.is_static else None for size in model.input().get_partial_shape())
        self.metadata = str(model.get_rt_info([KEY]).value) if model.has_rt_info([KEY]) else None
        precision = Metadata.from_json(self.metadata, file).precision if self.metadata else "fp32"
        self.compiled = compile_model(core, model, file, exact=precision == "fp32" and not half)
        self.request = self.compiled.create_infer_request()
        self.notes = ignored_requests(file, device, half=False)

    def run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        self.request.infer([inputs], share_inputs=True)
        return self.request.get_output_tensor().data.copy()


def find_xml(path: Path) -> Path:
    """Return the .xml in a folder, or the path itself if it is no folder.

    Raises:
        UserError: the folder holds none, or several.
    """
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.xml"))
    if len(found) != 1:
        raise UserError(f"{path} is a folder with {len(found)} .xml files; an OpenVINO model has one, with its .bin beside it")
    return found[0]


def read_model(file: Path) -> tuple[Any, Any]:
    """Read a model, .xml or .onnx.

    Returns:
        OpenVINO's core, and the model.

    Raises:
        UserError: the file is damaged, or OpenVINO is not installed.
    """
    core = optional_module("openvino", f"{file}").Core()
    if file.suffix == ".xml" and not file.with_suffix(".bin").is_file():
        raise UserError(f"{file} has no {file.stem}.bin beside it, which holds its weights")
    try:
        return core, core.read_model(file)
    except Exception as error:  # OpenVINO raises RuntimeError, and others for what is no XML
        raise UserError(f"{file} is not a model that OpenVINO can read, or is damaged ({one_line(error)})") from None


def compile_model(core: Any, model: Any, file: Path, exact: bool) -> Any:
    """Compile a model, read from ``file``, for the CPU.

    ``exact`` computes in float32; otherwise in bfloat16 where the processor has it. Int8 layers stay int8.

    Raises:
        UserError: it can't be compiled.
    """
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    try:
        return core.compile_model(model, "CPU", {**options, **({"INFERENCE_PRECISION_HINT": "f32"} if exact else {})})
    except Exception as error:
        raise UserError(f"{file} can't be compiled for this CPU ({one_line(error)})") from None
