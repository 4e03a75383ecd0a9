"""ONNX files in onnxruntime, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from models.backends.exported import Shape, ignored_requests, one_line, optional_module
from models.backends.metadata import KEY
from utils.errors import UserError

ERRORS_ONLY = 3  # onnxruntime's log level
TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(uint8)": "uint8"}


class OnnxRuntime:
    """A file in an onnxruntime session with torch's number of threads."""

    def __init__(self, path: Path, device: torch.device, half: bool) -> None:
        self.session = open_session(path)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise UserError(f"{path} has {len(inputs)} inputs and {len(outputs)} outputs; a classifier has one of each")
        if inputs[0].type not in TYPES:
            raise UserError(f"{path} takes {inputs[0].type}; valid: {', '.join(TYPES)}")
        self.name = inputs[0].name
        self.input_shape: Shape = tuple(size if isinstance(size, int) else None for size in inputs[0].shape)
        self.input_type = TYPES[inputs[0].type]
        self.metadata = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        self.notes = ignored_requests(path, device, half)

    def run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        return self.session.run(None, {self.name: inputs})[0]


def open_session(path: Path, optimised: Path | None = None) -> Any:
    """Open an ONNX file, and write the graph as onnxruntime will run it to ``optimised`` if that is given.

    Raises:
        UserError: the file is damaged, or onnxruntime is not installed.
    """
    ort = optional_module("onnxruntime", f"{path}")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = ERRORS_ONLY
    # Its threads would keep spinning after a pass, on cores that decode the next images.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimised:
        options.optimized_model_filepath = str(optimised)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base
        raise UserError(f"{path} is not an ONNX file that onnxruntime can run, or is damaged ({one_line(error)})") from None
