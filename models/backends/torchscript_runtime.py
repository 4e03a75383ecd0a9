"""TorchScript files, on any device of torch."""

from __future__ import annotations

import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from models.backends.exported import CPU, Shape, ignored_requests, one_line
from models.backends.metadata import TORCHSCRIPT_FILE
from utils.errors import UserError

# A TorchScript file is a program. It can call what is registered with torch: as torch.NAME, of the namespace aten, and as
# ops.NAMESPACE.NAME. A file or an address is named by a text, so what takes a text is refused but for these, whose texts are
# modes, formats and keys.
NAMESPACES = ("aten", "prim", "quantized")
_TEXTS = (
    "Delete Float Int RaiseException __contains__ __getitem__ _convolution_mode _set_item add any clear conv1d conv2d conv3d copy count "
    "device dict div div_ divide divide_ einsum endswith eq find format ge gelu gelu_ get gt index items join keys le len "
    "linalg_matrix_norm linalg_norm linalg_qr linalg_svd list lower lt meshgrid ne ord pad percentFormat pop popitem replace scatter "
    "scatter_ scatter_reduce searchsorted setdefault slice sort sorted split startswith strip update upper values warn zfill"
)
TAKES_TEXT = frozenset(_TEXTS.split())
OPERATION = re.compile(rb"\btorch\s*\.\s*(\w+)|\bops\s*\.\s*(\w+)\s*\.\s*(\w+)")
OWN_NAME = re.compile(rb"__torch__(?:\.\w+)*")  # of a class or function in the file
RUNS_ON_LOADING = re.compile(rb"\b__setstate__\b")


class TorchScriptRuntime:
    """A file that export.py or ``torch.jit.save`` wrote."""

    input_shape: Shape = ()  # a TorchScript file records neither shape nor type
    input_type = ""

    def __init__(self, path: Path, device: torch.device, half: bool) -> None:
        extra: dict[str, Any] = {TORCHSCRIPT_FILE: ""}
        refuse_file_access(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch recommends another format
                self.module = torch.jit.load(str(path), map_location=device, _extra_files=extra).eval()
        except Exception as error:  # RuntimeError, and whatever unpickling raises
            raise UserError(f"{path} is not a TorchScript file, or is damaged ({one_line(error)})") from None
        content: str | bytes = extra[TORCHSCRIPT_FILE]
        self.metadata = (content.decode(errors="replace") if isinstance(content, bytes) else content) or None
        self.device = device
        self.notes = ignored_requests(path, CPU, half)  # the device is not ignored

    @torch.inference_mode()
    def run(self, inputs: NDArray[Any]) -> NDArray[Any]:
        outputs = self.module(torch.from_numpy(inputs).to(self.device))
        if not isinstance(outputs, torch.Tensor):
            raise UserError(f"a TorchScript classifier returns one tensor, this one a {type(outputs).__name__}")
        return outputs.float().cpu().numpy()


def refuse_file_access(path: Path) -> None:
    """Refuse a TorchScript file whose code could do more than compute: it is read as torch reads it, and every operation is looked up.

    Raises:
        UserError: it could, or it is no archive.
    """
    try:
        reader = torch._C.PyTorchFileReader(str(path))  # of an archive with two directories, torch's is the one that counts
        codes = [reader.get_record(name) for name in reader.get_all_records() if name.endswith(".py")]
    except RuntimeError as error:
        raise UserError(f"{path} is not a TorchScript file, or is damaged ({one_line(error)})") from None
    for code in codes:
        if RUNS_ON_LOADING.search(code):
            raise UserError(f"{path} is refused: its code uses __setstate__, which runs while the file is loaded")
        for name in OWN_NAME.findall(code):
            if b".torch.classes." in name and b".torch.classes.quantized." not in name:
                raise UserError(f"{path} is refused: its code uses the class {name.decode(errors='replace')}, which may do anything")
        for found in OPERATION.finditer(OWN_NAME.sub(b"", code)):
            short, namespace, long = (part.decode(errors="replace") if part else "" for part in found.groups())
            if not is_harmless(namespace or "aten", long or short):
                called = f"ops.{namespace}.{long}" if namespace else f"torch.{short}"
                raise UserError(f"{path} is refused: its code uses {called}, which may read or write files; a classifier needs none")


def is_harmless(namespace: str, name: str) -> bool:
    """Whether an operation only computes; one that is not registered can't be called."""
    if namespace not in NAMESPACES or name == "classes":
        return False
    return name in TAKES_TEXT or f"{namespace}::{name}" not in _taking_texts()


@cache
def _taking_texts() -> frozenset[str]:
    """Return the registered operations that take a text."""
    schemas = torch._C._jit_get_all_schemas()
    return frozenset(schema.name for schema in schemas if any("str" in str(argument.type) for argument in schema.arguments))
