"""The flags that val.py and predict.py share: which classifier runs, where, and where its results go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from models.backends import Backend, open_backend
from utils.arguments import flag, shared
from utils.spec import image_size

ROOT = Path(__file__).resolve().parents[2]  # what default paths are relative to, wherever a script is started


@dataclass(frozen=True)
class BackendArguments:
    """Flags of a script that runs a trained classifier."""

    weights: str = flag(
        "weights/digits.pt",
        "classifier: .pt, .onnx, .torchscript, or an OpenVINO folder",
        metavar="PATH",
        group="network",
    )
    model: str = shared.model()
    imgsz: tuple[int, ...] | None = shared.imgsz()
    device: str = shared.device()
    half: bool = shared.half()
    name: str = shared.name()
    exist_ok: bool = shared.exist_ok()

    def open_backend(self, given: set[str], device: torch.device) -> Backend:
        """Load the classifier into its runtime; ``given`` are the names of the flags on the command line."""
        weights = self.weights if "weights" in given else str(ROOT / self.weights)
        return open_backend(weights, device, self.half, self.model or None, image_size(self.imgsz))
