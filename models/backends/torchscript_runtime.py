"""TorchScript files, on any device of torch."""

from __future__ import annotations

import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from models.backends.exported import CPU, Shape, ignored_requests, one_line
from models.backends.metadata import TORCHSCRIPT_FILE
from utils.errors import UserError

# A TorchScript file is a program; these are all of its operations on files, and the method that runs while it is loaded.
FILE_ACCESS = re.compile(rb"\b(from_file|save|__setstate__)\b")


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
    """Refuse a TorchScript file whose code could read or write files.

    Raises:
        UserError: it could, or it is no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            codes = [archive.read(entry) for entry in archive.infolist() if entry.filename.endswith(".py")]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is not a TorchScript file, or is damaged ({one_line(error)})") from None
    for code in codes:
        if found := FILE_ACCESS.search(code):
            raise UserError(f"{path} is refused: its code uses {found[1].decode()}, which can read or write files; a classifier needs none")
