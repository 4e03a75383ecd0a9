"""Run a classifier from a file: uint8 images in, logits out. A runtime for another kind of file is one line in ``RUNTIMES``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.backends.exported import ExportedBackend, Runtime, finite, one_line
from models.backends.onnx_runtime import OnnxRuntime
from models.backends.openvino_runtime import OpenVinoRuntime
from models.backends.torchscript_runtime import TorchScriptRuntime
from models.loading import LoadedClassifier, load_classifier
from utils.errors import UserError
from utils.loop.engine import classifier
from utils.loop.memory_format import channels_last
from utils.loop.precision import Precision
from utils.spec import ImageSize, ModelSpec

FOLDER = "an OpenVINO folder"
WEIGHTS_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".tar", ".ckpt", ".safetensors")  # usual ones; what a file holds decides
RUNTIMES: dict[str, Callable[[Path, torch.device, bool], Runtime]] = {
    ".onnx": OnnxRuntime,
    ".torchscript": TorchScriptRuntime,
    ".xml": OpenVinoRuntime,
    FOLDER: OpenVinoRuntime,
}


class Backend(Protocol):
    """A classifier that is ready to run.

    Attributes:
        spec: classes, input size and pre-processing.
        notes: what was adapted or assumed while loading.
        named: whether the class names come from the file; else they are placeholders.
        record: arguments of the training run that made the file, as far as it holds them.
    """

    spec: ModelSpec
    notes: list[str]
    named: bool
    record: dict[str, Any]

    def logits(self, images: Tensor) -> Tensor:
        """Classify uint8 [B, S, S, C]; return float32 [B, classes] on the CPU."""


class TorchBackend:
    """Runs a network in torch: channels-last, half precision on request."""

    def __init__(self, loaded: LoadedClassifier, device: torch.device, half: bool = False, imgsz: ImageSize | None = None) -> None:
        self.spec = loaded.spec if imgsz is None else loaded.spec.with_(imgsz=imgsz)
        self.notes, self.named = loaded.notes, loaded.named
        self.record = loaded.checkpoint.get("arguments", {})
        self.model = channels_last(loaded.model.eval().to(device))
        self.classify = classifier(self.model, self.spec, Precision.choose(device, half))

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        return finite(self.classify(images).cpu(), self.spec.name)


def open_backend(
    weights: str, device: torch.device, half: bool = False, model_name: str | None = None, imgsz: ImageSize | None = None
) -> Backend:
    """Open a classifier's file.

    Args:
        weights: the file, or an OpenVINO model's folder.
        device: where to run it.
        half: compute in half precision if the device can.
        model_name: the architecture, for a plain state dict, which does not tell.
        imgsz: side of the input, if not the file's own.

    Raises:
        UserError: the file is of none of these kinds, or not sound.
    """
    kind, path = kind_of(weights), Path(weights)
    if not weights or not path.exists():
        raise UserError(f"no weights file {weights}" if weights else "--weights is empty; give a file")
    if kind not in RUNTIMES:
        return TorchBackend(load_classifier(path, model_name, size_known=imgsz is not None), device, half, imgsz)
    if model_name:
        raise UserError(f"{weights} is an exported network; leave --model {model_name} out")
    return ExportedBackend(RUNTIMES[kind](path, device, half), path, imgsz)


def kind_of(weights: str) -> str:
    """Return a file's suffix, or ``FOLDER``."""
    return FOLDER if Path(weights).is_dir() and not (Path(weights) / "weights").is_dir() else Path(weights).suffix.lower()


def is_exported(weights: str) -> bool:
    """Whether a file is one that export.py or another exporter writes; a folder is one if it holds an .xml."""
    kind = kind_of(weights)
    return any(Path(weights).glob("*.xml")) if kind == FOLDER else kind in RUNTIMES


def name_outputs_(backend: Backend, class_names: tuple[str, ...], data: str) -> None:
    """Give a classifier without class names those of a data set, in place, in the data set's order.

    Raises:
        UserError: there are not as many as outputs.
    """
    if backend.named:
        return
    if len(class_names) != backend.spec.num_classes:
        raise UserError(f"data '{data}' has {len(class_names)} classes, the weights have {backend.spec.num_classes} outputs and no names")
    backend.spec = backend.spec.with_(class_names=class_names)
    backend.notes.append("the weights carry no class names; their outputs are taken in the order of the data's classes")


def warm_up(backend: Backend, batch_size: int, passes: int = 2) -> None:
    """Run zeros through a backend, so that set-up on first use does not count as an image's time.

    Raises:
        UserError: the network does not take images of this size.
    """
    spec = backend.spec
    images = torch.zeros(batch_size, *spec.size, spec.channels, dtype=torch.uint8)
    try:
        for _ in range(passes):
            backend.logits(images)
    except RuntimeError as error:
        raise UserError(f"{spec.name} does not take images of {spec.size_text} ({one_line(error)}); choose another --imgsz") from None
