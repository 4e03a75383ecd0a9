"""Run a classifier from a file: uint8 images in, logits out. One line in ``BACKENDS`` per kind of file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.backends.exported import ExportedBackend, Start, finite, one_line
from models.backends.onnx import OnnxRuntime
from models.backends.openvino import OpenVinoRuntime
from models.backends.torchscript import TorchScriptRuntime
from models.loading import Loaded, load_classifier
from utils.errors import UserError
from utils.loop.engine import classifier
from utils.loop.precision import Precision
from utils.spec import ModelSpec


class Backend(Protocol):
    """A classifier that is ready to run.

    Attributes:
        spec: classes, input size and pre-processing.
        notes: what was mended or assumed while loading.
        named: whether the class names come from the file; else they are placeholders.
        record: the arguments of the training run that made the file, as far as the file tells.
    """

    spec: ModelSpec
    notes: list[str]
    named: bool
    record: dict[str, Any]

    def logits(self, images: Tensor) -> Tensor:
        """Classify uint8 [B, S, S, C]; return float32 [B, classes] on the CPU."""


class TorchBackend:
    """Runs a network in torch: channels-last, half precision on request."""

    def __init__(self, loaded: Loaded, device: torch.device, half: bool = False, imgsz: int | None = None) -> None:
        self.spec = loaded.spec if imgsz is None else loaded.spec.with_(imgsz=imgsz)
        self.notes, self.named = loaded.notes, loaded.named
        self.record = loaded.checkpoint.get("arguments", {})
        self.model = loaded.model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classify = classifier(self.model, self.spec, Precision.choose(device, half))

    @classmethod
    def open(cls, path: Path, device: torch.device, half: bool, model_name: str | None, imgsz: int | None) -> TorchBackend:
        """Load a checkpoint."""
        return cls(load_classifier(path, model_name), device, half, imgsz)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        return finite(self.classify(images).cpu(), self.spec.name)


Opener = Callable[[Path, torch.device, bool, str | None, int | None], Backend]


def exported(start: Start) -> Opener:
    """Return the opener of a kind of exported file."""

    def open_(path: Path, device: torch.device, half: bool, model_name: str | None, imgsz: int | None) -> Backend:
        if model_name:
            raise UserError(f"{path} is an exported network; leave --model {model_name} out")
        return ExportedBackend(start(path, device, half), path, imgsz)

    return open_


FOLDER = "an OpenVINO folder"
BACKENDS: dict[str, Opener] = {
    **dict.fromkeys((".pt", ".pth", ".th", ".bin", ".tar"), TorchBackend.open),
    ".onnx": exported(OnnxRuntime),
    ".torchscript": exported(TorchScriptRuntime),
    ".xml": exported(OpenVinoRuntime),
    FOLDER: exported(OpenVinoRuntime),
}


def open_backend(
    weights: str, device: torch.device, half: bool = False, model_name: str | None = None, imgsz: int | None = None
) -> Backend:
    """Open a classifier's file.

    Args:
        weights: the file, or an OpenVINO model's folder.
        device: where to run it.
        half: compute in half precision where the device has it.
        model_name: the architecture, for a plain state dict that does not tell.
        imgsz: side of the input where it shall not be the file's own.

    Raises:
        UserError: no backend reads this kind of file, or the file is not sound.
    """
    kind = kind_of(weights)
    if not weights or not Path(weights).exists():
        raise UserError(f"no weights file {weights}" if weights else "--weights is empty; give a file")
    if kind not in BACKENDS:
        raise UserError(f"weights {weights} are of an unknown kind; valid suffixes: {', '.join(BACKENDS)}")
    return BACKENDS[kind](Path(weights), device, half, model_name, imgsz)


def kind_of(weights: str) -> str:
    """Return a file's entry in ``BACKENDS``, if it has one."""
    return FOLDER if Path(weights).is_dir() else Path(weights).suffix.lower()


def is_exported(weights: str) -> bool:
    """Whether a file is one that export.py or another exporter writes; a folder is one if it holds an .xml."""
    kind = kind_of(weights)
    return any(Path(weights).glob("*.xml")) if kind == FOLDER else BACKENDS.get(kind, TorchBackend.open) != TorchBackend.open


def warm_up(backend: Backend, batch_size: int, passes: int = 2) -> None:
    """Run zeros through a backend, so that what is set up on first use is not counted as an image's time.

    Raises:
        UserError: the network does not take images of this size.
    """
    spec = backend.spec
    images = torch.zeros(batch_size, spec.imgsz, spec.imgsz, spec.channels, dtype=torch.uint8)
    try:
        for _ in range(passes):
            backend.logits(images)
    except RuntimeError as error:
        raise UserError(f"{spec.name} does not take images of {spec.imgsz} px ({one_line(error)}); choose another --imgsz") from None
